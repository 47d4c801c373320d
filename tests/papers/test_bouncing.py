"""BouncingShapes keep the laws, and `laws` notices when a clip breaks them."""

import numpy as np
import pytest
import torch

from papers.bouncing import (EXTENTS, BouncingShapes, laws, plain_caption, reflect, track,
                             turns_of)
from shapes import HELD_OUT, SEEN, SHAPES, MovingShapes, coverage


def test_positions_are_folded_at_both_ends():
    assert reflect(np.array([1.0, 4.0, 5.0, 7.0, 9.0, -1.0]), 2.0, 5.0).tolist() == [
        3.0, 4.0, 5.0, 3.0, 3.0, 5.0]


@pytest.mark.parametrize("i", range(6))
def test_the_first_eight_frames_are_those_of_moving_shapes(i):
    long, short = BouncingShapes(6, 20, seed=3), MovingShapes(6, 8, seed=3)
    difference = long[i][0][:8].int() - short[i][0].int()
    assert difference.abs().max() <= 1 and long[i][1] == short[i][1]  # 1: rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_extents_are_where_a_shape_ends(shape):
    axis = np.linspace(-20, 20, 801)
    x, y = axis[None, :], axis[:, None]
    inside = coverage(shape, x, y, 10.0) > 0.5
    width, height = EXTENTS[shape]
    assert abs(axis[inside.any(0)]).max() == pytest.approx(10 * width, abs=0.06)
    assert axis[inside.any(1)].max() == pytest.approx(10 * height, abs=0.06)
    assert axis[inside.any(1)].min() == pytest.approx(-10 * height, abs=0.06)


def test_a_shape_never_leaves_the_frame_and_keeps_its_speed():
    data = BouncingShapes(12, 400, seed=1)
    for i in range(12):
        radius, centres = data.centres(i)
        extent = radius * np.array(EXTENTS[data.combinations[i][1]])
        assert (centres >= extent - 1e-9).all() and (centres <= 32 - extent + 1e-9).all()
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        assert np.median(steps) == pytest.approx(steps.max())  # less only where it turns


def test_the_step_divides_time():
    whole, half = BouncingShapes(3, 50), BouncingShapes(3, 99, step=0.5)
    assert np.allclose(half.centres(2)[1][::2], whole.centres(2)[1])


def test_a_caption_loses_its_direction():
    assert plain_caption("a red circle moving left") == "a red circle"


def test_a_track_finds_centres_areas_and_paint():
    data = BouncingShapes(12, 30, seed=2)
    for i in (0, 4, 8, 11):
        seen = track(data[i][0] / 127.5 - 1, data.combinations[i][1])
        radius, centres = data.centres(i)
        assert np.abs(seen.centres - centres).max() < 0.15
        area = SHAPES[data.combinations[i][1]] * radius**2
        assert seen.areas.mean() == pytest.approx(area, rel=0.05)


def test_turns_are_where_a_path_goes_back():
    path = np.array([5.0, 6, 7, 8, 9, 10, 11, 12, 13, 12.5, 13.2, 12, 10, 8, 6, 4, 3, 4.2, 5])
    assert turns_of(path) == [13.2, 3.0]


@pytest.mark.parametrize("i", range(4))
def test_real_clips_keep_all_laws(i):
    data = BouncingShapes(4, 400, seed=4, combinations=[*SEEN[:2], *HELD_OUT[:2]])
    result = laws(data[i][0] / 127.5 - 1, data.combinations[i], (8, 5))
    assert min(result["right"]) == 1 and result["paint"] < 0.01
    assert np.abs(np.array(result["size"]) - 1).max() < 0.005
    assert min(result["speed"]) > 0.94 and max(result["speed"]) < 1.06
    assert result["turns"][-1] == 1 and result["mid_air"] == 0 and result["drift"] < 0.1
    assert 0.8 < result["joints"] < 1.25


def broken(change, frames=400):
    """laws() of a real clip after change(frames (t, 3, h, w) uint8)."""
    data = BouncingShapes(1, frames, seed=4)
    return laws(change(data[0][0]) / 127.5 - 1, data.combinations[0], (8, 5))


def test_laws_notice_a_clip_that_stops():
    result = broken(lambda frames: frames[[*range(150), *[150] * 250]])
    assert min(result["speed"]) < 0.01 and result["turns"][-1] < 0.6


def test_laws_notice_turns_in_mid_air():
    # Back and forth through the middle of the frame.
    result = broken(lambda frames: torch.cat([frames[:8], *[frames[:8].flip(0), frames[:8]] * 20]))
    assert result["mid_air"] > 0.5 and result["turns"][-1] > 1.3


def test_laws_notice_another_colour():
    result = broken(lambda frames: torch.cat([frames[:200], frames[200:].flip(1)]))
    assert result["right"][-1] == 0 and result["right"][0] == 1 and result["paint"] > 0.3


def test_laws_notice_jumps_at_joints():
    # Every window of five frames begins three frames later than it should.
    order = [i for start in range(8, 392, 8) for i in range(start, start + 5)]
    result = broken(lambda frames: frames[[*range(8), *order]])
    assert result["joints"] > 2


def test_joints_are_counted_from_the_first_that_is_named():
    # Windows of eight frames after the first one, as between key frames: jumps at 9, 17, ...
    order = [i for start in range(1, 390, 11) for i in range(start, start + 8)]
    data = BouncingShapes(1, 400, seed=4)
    clip = data[0][0][[0, *order]] / 127.5 - 1
    right, wrong = (laws(clip, data.combinations[0], (first, 8))["joints"] for first in (9, 8))
    assert right > 2 and wrong < 1


def test_clips_of_another_step_are_other_clips():
    assert BouncingShapes(2, 8).version(1) != BouncingShapes(2, 8, step=0.5).version(1)
