"""Curves with ranges, drawn by matplotlib.

    plot("steps.png", {"shift": [(100, 20, 10, 30), (200, 60, 45, 75)]}, "Motion", "steps", "%")

The colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ as well.
"""

import sys

from support.files import atomic

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("studies need matplotlib; install it with `pip install -r studies/requirements.txt`")

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "o", "s", "^"  # with the 7 colours, 21 different looks


def plot(path, series, title, x_label, y_label):
    """Write a PNG of 900 x 560 pixels with a line for each of series {name: [point, ...]}.

    A point is (x, y, low, high), y with its range, drawn as a band along the line; a series of
    one point gets a bar. Each line is thinner than the one below it, so that both show.
    """
    figure = Figure(figsize=(9, 5.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(series.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        width = 1 + 0.7 * (len(series) - 1 - i)
        axes.plot(x, y, color=colour, marker=marker, label=name, linewidth=width,
                  markersize=4 + 1.5 * width)
        if len(points) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.errorbar(x, y, [[y[0] - low[0]], [high[0] - y[0]]], color=colour, capsize=4)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    with atomic(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
