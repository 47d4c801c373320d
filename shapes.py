"""MovingShapes: a toy text-to-video data set whose clips are drawn, so their truth is known.

One coloured shape moves in a straight line over a dark background: "a red circle moving left". A
caption names a colour, a shape and a direction, and all three can be measured in the pixels of a
clip (evaluate.py does that). 12 of the 72 combinations are held out of training: a model that draws
those has learned what the words mean, not only which clips it has seen.
"""

import math

import numpy as np
import torch

COLOURS = {
    "red": (1.0, 0.15, 0.15), "green": (0.15, 0.9, 0.15), "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1), "magenta": (1.0, 0.2, 1.0), "cyan": (0.1, 0.95, 1.0),
}
BACKGROUND = 0.06  # in [0, 1], in all three channels
SHAPES = {"circle": math.pi, "square": 4.0, "triangle": math.pi}  # areas at radius 1
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x right, y down
COMBINATIONS = [(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def caption_of(colour, shape, direction):
    """The caption of a combination."""
    return f"a {colour} {shape} moving {direction}"


# 12 combinations: two of the three shapes of each colour lose one direction each
HELD_OUT = [(colour, shape, list(DIRECTIONS)[(c - s) % 4]) for c, colour in enumerate(COLOURS)
            for s, shape in enumerate(SHAPES) if (c + s) % 3]
SEEN = [combination for combination in COMBINATIONS if combination not in HELD_OUT]


def coverage(shape, x, y, radius):
    """The fraction of each pixel that a shape covers. x and y: pixels from its centre."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    else:  # equilateral, one corner up; the largest of the distances to its three sides
        inner = 0.778 * radius  # incircle radius at the circle's area: sqrt(pi / (3 sqrt(3)))
        y = y - inner / 2  # the incircle's centre is 0.389 radii below the middle of the height
        slope = np.abs(x) * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
        distance = np.maximum(slope, y) - inner
    return np.clip(0.5 - distance, 0.0, 1.0)  # anti-aliased; the distance is negative inside


def render(combination, centres, radius, image_size):
    """Frames uint8 (t, 3, image_size, image_size) of a shape at centres (t, 2), in pixels."""
    colour, shape, _ = combination
    axis = np.arange(image_size) + 0.5
    x = axis[None, None, :] - centres[:, 0, None, None]  # from the shape to each pixel: w -> t 1 w
    y = axis[None, :, None] - centres[:, 1, None, None]  # h -> t h 1
    alpha = coverage(shape, x, y, radius)[:, None]  # t h w -> t 1 h w
    paint = np.array(COLOURS[colour])[None, :, None, None]
    frames = BACKGROUND + alpha * (paint - BACKGROUND)
    return np.round(255 * frames).astype(np.uint8)


class MovingShapes:
    """A sequence of (frames uint8 (num_frames, 3, image_size, image_size), caption).

    Clip i depends only on (seed, i), its combination and its size. `combinations` take turns. At
    image_size 16, the smallest that makes sense, a shape's radius is 3 pixels.
    """

    def __init__(self, num_clips=1536, num_frames=8, image_size=32, seed=0, combinations=SEEN):
        self.num_frames = self.max_frames = num_frames  # of every clip
        self.image_size, self.seed = image_size, seed
        self.combinations = [combinations[i % len(combinations)] for i in range(num_clips)]
        self.captions = [caption_of(*combination) for combination in self.combinations]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        radius, middle, travel = self.motion(i)
        progress = np.linspace(-0.5, 0.5, self.num_frames) if self.num_frames > 1 else np.zeros(1)
        centres = middle + progress[:, None] * travel  # t -> t 2
        frames = render(self.combinations[i], centres, radius, self.image_size)
        return torch.from_numpy(frames), self.captions[i]

    def version(self, i):
        """Everything that clip i depends on, as a tuple."""
        return f"clip {i}", self.captions[i], self.seed, self.num_frames, self.image_size

    def motion(self, i):
        """(radius, middle of the path (2,), travel from first to last frame (2,)), in pixels."""
        rng, size = np.random.default_rng([self.seed, i]), self.image_size
        # The largest shape has room for the longest travel from the first frame to the last,
        # because 2 * 1.4 * 0.23 + 0.35 = 0.994 of the size.
        radius = size * rng.uniform(0.19, 0.23)
        travel = size * rng.uniform(0.25, 0.35)
        towards = np.array(DIRECTIONS[self.combinations[i][2]], dtype=float)
        margin = 1.4 * radius  # the triangle's half width is sqrt(3) * 0.778 = 1.35 radii
        room = size - 2 * margin - travel * np.abs(towards)
        return radius, size / 2 + room * rng.uniform(-0.5, 0.5, 2), travel * towards
