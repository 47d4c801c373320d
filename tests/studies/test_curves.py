"""A plot is checked by its pixels: where is which colour?"""

import numpy as np
from PIL import Image, ImageColor

from studies.curves import COLOURS, plot

RISING = {"shift": [(x, x, x - 5, x + 5) for x in (0, 50, 100)]}


def draw(path, series):
    """The image of a plot, (560, 900, 3)."""
    plot(path / "plot.png", series, "title", "steps", "%")
    return np.asarray(Image.open(path / "plot.png").convert("RGB")).astype(int)


def positions(image, colour, within=30):
    """(x, y) of the pixels left of the legend that have a colour, from the lower left."""
    near = abs(image - np.array(ImageColor.getrgb(colour))).max(-1) < within
    y, x = np.nonzero(near[:, :770])
    return x, len(image) - y


def test_a_rising_series_is_a_rising_line_the_same_each_time(tmp_path):
    image = draw(tmp_path, RISING)
    assert image.shape == (560, 900, 3)
    x, y = positions(image, COLOURS[0])
    assert np.corrcoef(x, y)[0, 1] > 0.98 and np.ptp(x) > 500
    shuffled = {"shift": [RISING["shift"][i] for i in (1, 2, 0)]}
    assert np.array_equal(draw(tmp_path, shuffled), image)


def test_each_series_has_a_colour_of_its_own(tmp_path):
    series = {str(i): [(0, i, i, i), (1, i, i, i)] for i in range(len(COLOURS))}
    image = draw(tmp_path, series)
    assert all(len(positions(image, colour)[0]) > 300 for colour in COLOURS)


def test_an_interval_is_a_band_along_a_line_and_a_bar_at_a_single_point(tmp_path):
    wide = {"shift": [(x, 50, 0, 100) for x in (0, 100)], "x": [(0, 0, 0, 0), (100, 100, 100, 100)]}
    pale = "#D9EAF3"  # 15 % of the first colour on white
    assert len(positions(draw(tmp_path, wide), pale, 6)[0]) > 100_000
    _, y = positions(draw(tmp_path, {**wide, "shift": [(50, 50, 0, 100)]}), COLOURS[0])
    assert np.ptp(y) > 300
