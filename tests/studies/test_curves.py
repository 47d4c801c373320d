"""A plot is checked by its pixels: where is which colour?"""

import numpy as np
import pytest
from PIL import Image, ImageColor

import plot as module
from studies.curves import COLOURS, plot, round_log_ticks, round_ticks

RISING = {"shift": [(0, 0), (50, 50), (100, 100)]}


def draw(path, series, **options):
    """The picture of a plot, (560, 900, 3)."""
    plot(path / "plot.png", series, "title", "steps", "%", **options)
    return np.asarray(Image.open(path / "plot.png")).astype(int)


def places(picture, colour, within=30):
    """(x, y) of the pixels left of the legend that have a colour, from the lower left."""
    near = abs(picture - np.array(ImageColor.getrgb(colour))).max(-1) < within
    y, x = np.nonzero(near[:, : near.shape[1] - 120])
    return x, len(picture) - y


# Round numbers


@pytest.mark.parametrize("low, high, expected", [
    (0, 100, [0, 20, 40, 60, 80, 100]),
    (3, 97, [0, 20, 40, 60, 80, 100]),
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0.011, 0.029, [0.01, 0.015, 0.02, 0.025, 0.03]),
    (0, 1200, [0, 200, 400, 600, 800, 1000, 1200]),
    (5, 5, [2, 3, 4, 5, 6, 7, 8]),
    (0, 0, [-1, -0.5, 0, 0.5, 1]),
])
def test_ticks_are_round_and_cover_the_data(low, high, expected):
    assert round_ticks(low, high) == expected


@pytest.mark.parametrize("low, high, expected", [
    (1, 1e5, [1, 10, 100, 1000, 1e4, 1e5]),
    (50, 1200, [50, 100, 200, 500, 1000]),
    (30, 95, [30, 40, 50, 60, 70, 80, 90]),
    (1.2, 1.8, [1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8]),
])
def test_log_ticks_are_round_and_lie_in_the_range(low, high, expected):
    assert round_log_ticks(low, high) == pytest.approx(expected)


# Pixels


def test_a_plot_has_its_size_and_is_the_same_each_time(tmp_path):
    first = draw(tmp_path, RISING)
    assert first.shape == (560, 900, 3)
    assert np.array_equal(first, draw(tmp_path, RISING))


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right(tmp_path):
    x, y = places(draw(tmp_path, RISING), COLOURS[0])
    assert x.max() - x.min() > 500 and y.max() - y.min() > 350
    assert np.corrcoef(x, y)[0, 1] > 0.99


def test_points_are_joined_from_left_to_right_in_whatever_order(tmp_path):
    points = [(0, 0), (50, 80), (100, 100)]
    turned = {"shift": points[1:] + points[:1]}
    assert np.array_equal(draw(tmp_path, {"shift": points}), draw(tmp_path, turned))


def test_a_log_axis_makes_equal_steps_of_equal_factors(tmp_path):
    series = {"shift": [(1, 0), (10, 50), (100, 100)]}
    x, y = places(draw(tmp_path, series, log_x=True), COLOURS[0])
    assert np.corrcoef(x, y)[0, 1] > 0.99
    x, y = places(draw(tmp_path, series), COLOURS[0])
    assert np.corrcoef(x, y)[0, 1] < 0.95


def test_an_interval_is_a_band_around_its_line(tmp_path):
    band = [(0, 50, 20, 80), (100, 50, 20, 80)]
    line, shaded = (draw(tmp_path, {"shift": p}) for p in ([(0, 20), (100, 80)], band))
    pale = "#" + "".join(
        f"{round(255 + (value - 255) * module.BAND / 255):02x}"
        for value in ImageColor.getrgb(COLOURS[0])
    )
    assert len(places(line, pale, 4)[0]) < 2000 < 200_000 < len(places(shaded, pale, 4)[0])


def test_a_single_point_has_a_bar(tmp_path):
    _, bare = places(
        draw(
            tmp_path,
            {
                "shift": [
                    (5, 50),
                ],
                "x": [(0, 0), (9, 100)],
            },
        ),
        COLOURS[0],
    )
    _, bar = places(draw(tmp_path, {"shift": [(5, 50, 20, 80)], "x": [(0, 0), (9, 100)]}),
                    COLOURS[0])
    assert np.ptp(bare) < 15 and 200 < np.ptp(bar) < 300


def test_every_series_is_drawn_and_named(tmp_path):
    series = {f"way {i}": [(0, i), (1, i + 1)] for i in range(7)}
    picture = draw(tmp_path, series)
    legend = picture[:, 780:]
    for colour in COLOURS:
        assert len(places(picture, colour)[0]) > 500
        assert (abs(legend - np.array(ImageColor.getrgb(colour))).max(-1) < 30).sum() > 40


def test_a_point_and_a_flat_line_can_be_drawn(tmp_path):
    for points in ([(3, 0)], [(0, 2), (5, 2)]):
        for log_x in (False, points[0][0] > 0):
            assert len(places(draw(tmp_path, {"none": points}, log_x=log_x), COLOURS[0])[0]) > 50


# Refusals


@pytest.mark.parametrize("series, options, message", [
    ({}, {}, "needs a series"),
    ({"a": []}, {}, "a point in each"),
    ({"a": [(1, float("nan"))]}, {}, "finite numbers, got .*nan.* in 'a'"),
    ({"a": [(1, 2, 3)]}, {}, r"points \(x, y\) or"),
    ({"a": [(0, 1)]}, {"log_x": True}, "x > 0 on a log axis, got 0 in 'a'"),
    ({str(i): [(0, 1)] for i in range(22)}, {}, "<= 21 series, got 22"),
])
def test_what_cannot_be_drawn_is_refused(tmp_path, series, options, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path, series, **options)
    assert not list(tmp_path.iterdir())
