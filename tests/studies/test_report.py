"""Intervals of few seeds are Student's; cells and curves use them."""

import math

import numpy as np
import pytest

from studies import report
from studies.report import T_QUANTILES, interval


def test_an_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])  # deviation 1, t of two degrees of freedom
    half = 4.303 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    values = np.arange(1000.0)  # more than the table has: never too narrow
    _, low, high = interval(values)
    assert 1 < (high - low) / (2 * 1.96 * values.std() / math.sqrt(1000)) < 1.07


def test_each_quantile_leaves_two_and_a_half_percent():
    for freedom, quantile in enumerate(T_QUANTILES, 2):
        x = np.linspace(0, quantile, 20001)
        factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        factor /= math.sqrt(freedom * math.pi)
        density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=5e-5)


def test_a_cell_has_an_interval_from_three_seeds_on():
    assert report.cell([80.0, 90.0]) == "85.0"
    assert report.cell([80.0, 90.0, 100.0]) == "90.0 ± 24.8"  # 4.303 * 10 / sqrt(3)


def test_a_curve_has_the_steps_that_all_seeds_reached():
    runs = [{"curve": {"10": {"all": 30.0}, "5": {"all": 20.0}}}, {"curve": {"10": {"all": 50.0}}}]
    assert report.curves({"shift": runs}) == {"shift": [(10, 40.0, 40.0, 40.0)]}
    assert report.curves({"shift": runs[:1]})["shift"][0] == (5, 20.0, 20.0, 20.0)
