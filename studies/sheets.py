"""Figures as files: PNGs of few colours, diagrams, and tables of images with names."""

import io
import sys

import numpy as np
import torch
from PIL import Image

from media.write import SEPARATOR, contact_sheet, to_uint8
from support.files import atomic

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("studies need matplotlib; install it with `pip install matplotlib`")

# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"


def new_figure(height, dpi=150):
    """A figure 8 inches (1,200 pixels) wide, which web pages show at 800 pixels."""
    return Figure(figsize=(8, height), dpi=dpi, layout="constrained")


def image_of(figure):
    """A figure as an image of at most 256 colours, which make a small PNG."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi="figure")
        return Image.open(file).convert("RGB").quantize(256, kmeans=1)


def drawn(picture, run, height):
    """The image that picture(run, figure) draws on a figure `height` inches high."""
    figure = new_figure(height)
    with torch.no_grad():
        picture(run, figure)
    return image_of(figure)


def save(image, path):
    """Write a PNG."""
    with atomic(path) as file:
        image.save(file, "PNG", optimize=True)


def diagram(axes, boxes, arrows):
    """Draw boxes (x, y, text, colour) and arrows (x, y, x, y) on axes, in inches."""
    axes.set(xlim=(0, 8), ylim=(0, axes.figure.get_figheight()), aspect="equal")
    axes.set_axis_off()
    for x, y, *end in arrows:
        axes.annotate("", end, (x, y), arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0})
    for x, y, text, colour in boxes:
        axes.text(x, y, text, ha="center", va="center", fontsize=9,
                  bbox={"boxstyle": "round", "facecolor": colour, "edgecolor": "none"})


def show(axes, clips, rows, title, x_label="frame", columns=None):
    """Draw clips (t, 3, h, w) in [-1, 1], one per row, with names of rows and columns."""
    axes.imshow(to_uint8(contact_sheet(clips))[0], interpolation="nearest")
    height, width = (n + SEPARATOR for n in clips[0].shape[-2:])
    columns = range(1, 1 + max(map(len, clips))) if columns is None else columns
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height, rows, fontsize=9)
    axes.set_xticks((np.arange(len(columns)) + 0.5) * width, columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
