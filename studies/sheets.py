"""Figures as files: PNGs of few colours, and tables of images with names of rows and columns."""

import io
import sys

import numpy as np
from PIL import Image

from media.write import SEPARATOR, contact_sheet, to_uint8
from support.files import atomic

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("studies need matplotlib; install it with `pip install -r studies/requirements.txt`")

# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"


def new_figure(height, dpi=150):
    """A figure 8 inches (1,200 pixels) wide, which web pages show at 800 pixels."""
    return Figure(figsize=(8, height), dpi=dpi, layout="constrained")


def pixels(figure):
    """A figure as an array (h, w, 3) uint8."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi="figure")
        return np.asarray(Image.open(file).convert("RGB"))


def save(figure, path):
    """Write a PNG of at most 256 colours."""
    with atomic(path) as file:
        Image.fromarray(pixels(figure)).quantize(256, kmeans=1).save(file, "PNG", optimize=True)


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
