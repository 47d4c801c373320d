"""BouncingShapes: MovingShapes that never end, so the truth of a long video is known.

At step 1 the first 8 frames are those of MovingShapes. Then the shape moves on at its constant
speed and is reflected where its edge meets the edge of the picture. Colour, shape, size and speed
stay.

`track` measures these in the pixels of a clip, and `laws` says how well a long clip keeps them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from evaluate import centres_of, recognise, segment
from shapes import SEEN, SHAPES, MovingShapes, render

DRIFT_AT = 192  # frame from which on the drift across the motion is measured
SHORTEST = DRIFT_AT + 16  # frames of a clip whose laws can be measured
BASE_FRAMES = 8  # of MovingShapes: its travel takes 7 steps
# Half of a shape's width and height, in radii. A triangle's incircle has 0.778 radii (shapes.py).
EXTENTS = {"circle": (1.0, 1.0), "square": (1.0, 1.0), "triangle": (3**0.5 * 0.778, 1.5 * 0.778)}


def plain_caption(caption):
    """A caption of MovingShapes without its direction, which is wrong after the first bounce."""
    return caption.split(" moving ")[0]


def reflect(positions, low, high):
    """Positions that move on without end, folded back into [low, high] at its ends."""
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

    def version(self, i):
        return *super().version(i), self.step

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        radius, centres = self.centres(i)
        frames = render(self.combinations[i], centres, radius, self.image_size)
        return torch.from_numpy(frames), self.captions[i]


@dataclass
class Track:
    """What a clip shows in each frame: centres (t, 2) and areas (t,) in pixels, paint (t, 3)."""

    centres: np.ndarray
    areas: np.ndarray
    paint: np.ndarray


def track(clip, shape, part=10):
    """The Track of a clip (t, 3, h, w) in [-1, 1] of a shape, read in parts of so many frames."""
    frames, rows = (clip.double().numpy() + 1) / 2, []
    for start in range(0, len(frames), part):
        piece = frames[start : start + part]
        found = segment(piece)
        paint, covered = found if found else (np.full(3, np.nan), np.zeros(piece[:, 0].shape))
        x, y, area = centres_of(covered)
        if shape == "triangle":  # its centre of mass is below the middle of its height
            y = y - 0.389 * np.sqrt(area / SHAPES[shape])
        rows.append((np.stack([x, y], 1), area, np.tile(paint, (len(piece), 1))))
    return Track(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def ideal(track, axis, extent, num_frames, size):
    """Positions along an axis of a shape that moves on as a track's first frames do."""
    start, step = track.centres[0, axis], np.diff(track.centres[:BASE_FRAMES, axis]).mean()
    return reflect(start + step * np.arange(num_frames), extent, size - extent)


def turns_of(positions, away=1.5):
    """The positions where a path turns back: it moves `away` pixels from the farthest point."""
    turns, farthest = [], positions[0]
    towards = np.sign(np.diff(positions[:BASE_FRAMES]).sum())
    for x in positions[1:]:
        if (x - farthest) * towards > 0:
            farthest = x
        elif (farthest - x) * towards > away:
            turns.append(farthest)
            farthest, towards = x, -towards
    return turns


def laws(clip, combination, joints=None, window=50):
    """How well a long clip (t, 3, h, w) in [-1, 1] keeps the laws of its first 8 frames.

    Of each 50 frames (a list):
    right    part of the 8-frame chunks with the colour and shape asked for
    size     over that of the first frames
    speed    mean distance of a step over what it should be
    turns    so far, over how many there should be

    Of the whole clip:
    paint    largest difference of a channel between the last 50 frames and the first ones
    mid_air  part of the turns that are 2.5 pixels and more from the wall
    drift    pixels across the motion, mean of frames 192 to 207
    joints   change of the step where windows meet, over that inside them, for joints = (first frame
             of the second window, new frames of a window)

    A shape that disappears makes some of them NaN. Raises ValueError for a clip of < 208 frames.
    """
    if len(clip) < SHORTEST:
        raise ValueError(f"laws needs clips of >= {SHORTEST} frames, got {len(clip)}")
    colour, shape, direction = combination
    size, seen = clip.shape[-1], track(clip, shape)
    axis = 0 if direction in ("left", "right") else 1
    along, across = seen.centres[:, axis], seen.centres[:, 1 - axis]
    first_area = seen.areas[:BASE_FRAMES].mean()
    extent = np.sqrt(first_area / SHAPES[shape]) * EXTENTS[shape][axis]
    truth = ideal(seen, axis, extent, len(clip), size)
    frames = (clip.double().numpy() + 1) / 2
    result = {"right": [], "size": [], "speed": [], "turns": []}
    for start in range(0, len(clip) - window + 1, window):
        end = start + window
        chunks = [recognise(frames[i : i + 8])[:2] for i in range(start, end - 7, 8)]
        result["right"].append(np.mean([chunk == (colour, shape) for chunk in chunks]))
        result["size"].append(np.sqrt(seen.areas[start:end].mean() / first_area))
        steps = [np.abs(np.diff(x[start : end + 1])).mean() for x in (along, truth)]
        result["speed"].append(steps[0] / steps[1])
        result["turns"].append(len(turns_of(along[:end])) / max(1, len(turns_of(truth[:end]))))
    turns = turns_of(along)
    in_air = [min(x - extent, size - extent - x) > 2.5 for x in turns]
    result["paint"] = np.abs(seen.paint[-window:].mean(0) - seen.paint[0]).max()
    result["mid_air"] = sum(in_air) / max(1, len(turns))
    result["drift"] = abs(across[DRIFT_AT:][:16].mean() - across[:BASE_FRAMES].mean())
    if joints is not None:
        change = np.abs(np.diff(seen.centres, n=2, axis=0)).sum(1)  # of the step to frame i + 2
        frame = np.arange(2, len(clip))
        at_joint = (frame >= joints[0]) & ((frame - joints[0]) % joints[1] == 0)
        result["joints"] = change[at_joint].mean() / change[~at_joint].mean()
    return result
