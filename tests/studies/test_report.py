"""Cells and tables of a comparison's report, by hand."""

import pytest

from studies import report


def test_a_cell_has_the_mean_and_the_range_over_seeds():
    assert report.cell([80.0]) == report.cell([80.0, 80.0]) == "80.0"
    assert report.cell([0.8, 1.0, 0.9], 2) == "0.90 (0.80 to 1.00)"


@pytest.mark.parametrize("curve, found", [
    ([50, 60, 70], True), ([50, 70, 70.5], False), ([70, 60, 65], False), ([70], False)])
def test_a_curve_that_ends_above_all_its_points_is_still_rising(curve, found):
    runs = [{"curve": {str(10 * i): {"all": p + shift} for i, p in enumerate(curve)}}
            for shift in (-5, 5)]
    flat = [{"curve": {str(10 * i): {"all": 100.0} for i in range(len(curve))}}]
    sentence = report.rising({"shift": flat, "mine": runs})
    assert sentence == ("Still rising at the end: mine; more --steps may help." if found else "")


def test_a_curve_has_the_steps_that_all_seeds_reached():
    runs = [{"curve": {"10": {"all": 30.0}, "5": {"all": 20.0}}}, {"curve": {"10": {"all": 50.0}}}]
    assert report.curve_table({"shift": runs}).splitlines()[::2] == [
        "| variant | 10 steps |", "| shift | 40.0 (30.0 to 50.0) |"]
