"""MovingShapes: endless captioned clips whose truth is known, a text-to-video world in one file.

One coloured shape moves in a straight line over a dark background: "a red circle moving left". A
caption names a colour, a shape and a direction, so whether a model listens to its text can be read
off the pixels (evaluate.py does). Some of the 72 combinations are held out of training: a model
that draws those has understood the words and not learnt the clips by heart.

Size, speed and place differ from clip to clip. Edges are anti-aliased by the signed distance to the
shape: a pixel's coverage is 1/2 on the edge.
"""

import math

import numpy as np
import torch

COLOURS = {
    "red": (1.0, 0.15, 0.15), "green": (0.15, 0.9, 0.15), "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1), "magenta": (1.0, 0.2, 1.0), "cyan": (0.1, 0.95, 1.0),
}
BACKGROUND = 0.06  # of 1, in all three channels
SHAPES = {"circle": math.pi, "square": 4.0, "triangle": math.pi}  # and their areas at radius 1
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x right, y down
COMBINATIONS = [(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def caption_of(colour, shape, direction):
    """The sentence for a combination."""
    return f"a {colour} {shape} moving {direction}"


def _held_out():
    """12 combinations of which every colour, shape and direction has its equal part."""
    held_out = []
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            if (c + s) % 3:  # 12 of the 18 pairs lose one of their four directions
                direction = list(DIRECTIONS)[(c - s) % 4]
                held_out.append((colour, shape, direction))
    return held_out


HELD_OUT = _held_out()
SEEN = [combination for combination in COMBINATIONS if combination not in HELD_OUT]


def coverage(shape, x, y, radius):
    """How much of each pixel a shape covers, in [0, 1]. x and y are pixels from its centre.

    A square is as wide as a circle of the same radius; a triangle has the circle's area.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius
    else:  # upright, equilateral: the largest distance to its three sides
        inner = 0.778 * radius  # radius of the circle inside: sqrt(pi / (3 sqrt(3)))
        y = y - inner / 2  # half its height above the centre, half below
        slope = np.abs(x) * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
        distance = np.maximum(slope, y) - inner
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(combination, centres, radius, image_size):
    """Frames uint8 (t, 3, image_size, image_size) of a shape at centres (t, 2), in pixels."""
    colour, shape, _ = combination
    axis = np.arange(image_size) + 0.5  # a pixel's centre
    x = axis[None, None, :] - centres[:, 0, None, None]
    y = axis[None, :, None] - centres[:, 1, None, None]
    alpha = coverage(shape, x, y, radius)[:, None]  # t 1 h w
    paint = np.array(COLOURS[colour])[None, :, None, None]
    frames = BACKGROUND + alpha * (paint - BACKGROUND)
    return np.round(255 * frames).astype(np.uint8)


class MovingShapes:
    """A sequence of (frames uint8 (num_frames, 3, image_size, image_size), caption).

    Clip i is a function of (seed, i) alone. Combinations take turns, those in `combinations`.
    """

    def __init__(self, num_clips=1536, num_frames=8, image_size=32, seed=0, combinations=SEEN):
        if num_clips < 1 or num_frames < 1 or image_size < 16:
            raise ValueError("MovingShapes needs num_clips, num_frames >= 1 and image_size >= 16, "
                             f"got {num_clips}, {num_frames}, {image_size}")
        self.num_frames, self.image_size, self.seed = num_frames, image_size, seed
        self.combinations = [combinations[i % len(combinations)] for i in range(num_clips)]
        self.captions = [caption_of(*combination) for combination in self.combinations]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        rng = np.random.default_rng([self.seed, i])
        size = self.image_size
        radius = size * rng.uniform(0.19, 0.23)
        travel = size * rng.uniform(0.25, 0.35)  # from the first frame to the last
        towards = np.array(DIRECTIONS[self.combinations[i][2]], dtype=float)
        margin = 1.4 * radius  # keeps the widest shape, the triangle, inside
        room = size - 2 * margin - travel * np.abs(towards)
        middle = size / 2 + room * rng.uniform(-0.5, 0.5, 2)
        progress = np.linspace(-0.5, 0.5, self.num_frames) if self.num_frames > 1 else np.zeros(1)
        centres = middle + travel * progress[:, None] * towards
        frames = render(self.combinations[i], centres, radius, size)
        return torch.from_numpy(frames), self.captions[i]
