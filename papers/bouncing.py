"""BouncingShapes: MovingShapes that never end, so the truth of a long video is known.

With step=1 the first 8 frames equal a clip of MovingShapes. Then the shape moves on at its constant
speed, and is reflected where its edge meets the edge of the frame. Colour, shape, size and speed
stay the same; `laws` says how well a long clip keeps these laws.
"""

from collections import namedtuple

import numpy as np
import torch

from evaluate import centres_of, recognise, segment
from shapes import SEEN, SHAPES, MovingShapes, render

PART = 50  # frames over which laws() averages
DRIFT_AT = 192  # first frame in which the drift across the motion is measured
SHORTEST = DRIFT_AT + 16  # frames of the shortest clip that laws() takes
BASE_FRAMES = 8  # frames of a clip of MovingShapes, whose travel takes 7 steps
# Half of a shape's width and height, in radii. A triangle's incircle is 0.778 radii (shapes.py).
EXTENTS = {"circle": (1.0, 1.0), "square": (1.0, 1.0), "triangle": (3**0.5 * 0.778, 1.5 * 0.778)}


def plain_caption(caption):
    """A caption of MovingShapes without its direction, which is wrong after the first bounce."""
    return caption.split(" moving ")[0]


def reflect(positions, low, high):
    """Fold positions on an endless path back into [low, high]."""
    length = high - low
    u = (positions - low) % (2 * length)
    return low + np.where(u < length, u, 2 * length - u)


class BouncingShapes(MovingShapes):
    """A sequence of (frames uint8 (num_frames, 3, image_size, image_size), caption).

    Successive frames are `step` frames of MovingShapes apart, any positive number. The caption
    names the direction of the first frames.
    """

    def __init__(self, num_clips, num_frames, image_size=32, seed=0, combinations=SEEN, step=1.0):
        super().__init__(num_clips, num_frames, image_size, seed, combinations)
        self.step = step

    def centres(self, i):
        """(radius, centres (num_frames, 2)) of clip i, in pixels."""
        radius, middle, travel = self.motion(i)
        progress = self.step * np.arange(self.num_frames) / (BASE_FRAMES - 1) - 0.5
        extent = radius * np.array(EXTENTS[self.combinations[i][1]])
        straight = middle + progress[:, None] * travel  # t -> t 2
        return radius, reflect(straight, extent, self.image_size - extent)

    def __getitem__(self, i):
        radius, centres = self.centres(i)
        frames = render(self.combinations[i], centres, radius, self.image_size)
        return torch.from_numpy(frames), self.captions[i]


# A shape in each frame: centres (t, 2) and areas (t,) in pixels, paint (t, 3) in [0, 1]
Track = namedtuple("Track", "centres areas paint")


def track(clip, shape):
    """The Track of a clip (t, 3, h, w) in [-1, 1] of a shape. Paint is the mean of ten frames."""
    frames, rows = (clip.double().numpy() + 1) / 2, []
    for piece in np.split(frames, range(10, len(frames), 10)):
        found = segment(piece)
        paint, covered = found if found else (np.full(3, np.nan), np.zeros(piece[:, 0].shape))
        x, y, area = centres_of(covered)
        if shape == "triangle":  # its centre of mass lies below the middle of its height
            y = y - 0.389 * np.sqrt(area / SHAPES[shape])
        rows.append((np.stack([x, y], 1), area, np.tile(paint, (len(piece), 1))))
    return Track(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def turns_of(positions, away=1.5):
    """The turning points of a path, from which it moves back by more than `away` pixels."""
    turns, farthest = [], positions[0]
    towards = np.sign(np.diff(positions[:BASE_FRAMES]).sum())
    for x in positions[1:]:
        if (x - farthest) * towards > 0:
            farthest = x
        elif (farthest - x) * towards > away:
            turns.append(farthest)
            farthest, towards = x, -towards
    return turns


def step_changes(centres, num_frames, num_new):
    """The change of the step of centres (t, 2) where windows meet, over the change inside windows.

    The first window has num_frames frames, later ones have num_new new frames.
    """
    change = np.abs(np.diff(centres, n=2, axis=0)).sum(1)  # change of the step to frame i + 2
    frame = np.arange(2, len(centres))
    at_joint = (frame >= num_frames) & ((frame - num_frames) % num_new == 0)
    return change[at_joint].mean() / change[~at_joint].mean()


def laws(clip, combination, joints):
    """How well a long clip (t, 3, h, w) in [-1, 1] keeps the laws of its first 8 frames.

    The end is the last PART frames. "speed" is the length of a step over the true length,
    for every PART frames, and `joints` are the arguments of step_changes(). The clip needs SHORTEST
    frames or more. A shape that disappears makes some numbers NaN.
    """
    colour, shape, direction = combination
    size, seen = clip.shape[-1], track(clip, shape)
    axis = 0 if direction in ("left", "right") else 1
    along, across = seen.centres[:, axis], seen.centres[:, 1 - axis]
    first_area, last_area = seen.areas[:BASE_FRAMES].mean(), seen.areas[-PART:].mean()
    extent = np.sqrt(first_area / SHAPES[shape]) * EXTENTS[shape][axis]
    step = np.diff(along[:BASE_FRAMES]).mean()
    truth = reflect(along[0] + step * np.arange(len(clip)), extent, size - extent)
    chunks = (clip[-PART:].double().numpy() + 1)[: PART // 8 * 8] / 2
    right = [recognise(chunk)[:2] == (colour, shape) for chunk in np.split(chunks, PART // 8)]
    speeds = [[np.abs(np.diff(path[i : i + PART + 1])).mean() for path in (along, truth)]
              for i in range(0, len(clip) - PART + 1, PART)]
    turns = turns_of(along)
    in_air = [min(x - extent, size - extent - x) > 2.5 for x in turns]  # pixels from the wall
    return {
        "colour and shape right at the end, %": 100 * np.mean(right),
        "size at the end, change, %": 100 * abs(np.sqrt(last_area / first_area) - 1),
        "paint at the end, change": np.abs(seen.paint[-PART:].mean(0) - seen.paint[0]).max(),
        "turns over true": len(turns) / max(1, len(turns_of(truth))),
        "turns away from walls, %": 100 * sum(in_air) / max(1, len(turns)),
        "drift across, px": abs(across[DRIFT_AT:][:16].mean() - across[:BASE_FRAMES].mean()),
        "steps at joints over inside": step_changes(seen.centres, *joints),
        "speed": np.array([drawn / true for drawn, true in speeds]),
    }
