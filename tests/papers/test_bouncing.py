"""BouncingShapes keep the laws, and `laws` notices when a clip breaks them."""

import numpy as np
import pytest
import torch

from papers.bouncing import EXTENTS, BouncingShapes, laws
from shapes import HELD_OUT, SEEN, SHAPES, MovingShapes, coverage


def test_the_first_eight_frames_are_those_of_moving_shapes():
    for long, short in zip(BouncingShapes(6, 20, seed=3), MovingShapes(6, 8, seed=3), strict=True):
        difference = long[0][:8].int() - short[0].int()
        assert difference.abs().max() <= 1 and long[1] == short[1]  # 1: rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_extents_are_where_a_shape_ends(shape):
    axis = np.linspace(-20, 20, 801)
    inside = coverage(shape, axis[None, :], axis[:, None], 10.0) > 0.5
    width, height = EXTENTS[shape]
    assert abs(axis[inside.any(0)]).max() == pytest.approx(10 * width, abs=0.06)
    assert abs(axis[inside.any(1)][[0, -1]]) == pytest.approx(10 * height, abs=0.06)


def test_a_shape_never_leaves_the_frame_and_keeps_its_speed():
    data = BouncingShapes(12, 400, seed=1)
    for i in range(12):
        radius, centres = data.centres(i)
        extent = radius * np.array(EXTENTS[data.combinations[i][1]])
        assert (centres >= extent - 1e-9).all() and (centres <= 32 - extent + 1e-9).all()
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        assert np.median(steps) == pytest.approx(steps.max())  # less only where it turns


def laws_of(change, combination=SEEN[0]):
    """laws() of a real clip after change(frames (t, 3, h, w) uint8)."""
    clip, _ = BouncingShapes(1, 400, seed=4, combinations=[combination])[0]
    return laws(change(clip) / 127.5 - 1, combination, (8, 5))


@pytest.mark.parametrize("combination", [*SEEN[:2], *HELD_OUT[:2]])
def test_real_clips_keep_all_laws(combination):
    *rest, speed = laws_of(lambda clip: clip, combination).values()
    assert rest == pytest.approx([100, 0, 0, 1, 0, 0, 1], abs=0.25)
    assert len(speed) == 8 and speed.min() > 0.94 and speed.max() < 1.06


@pytest.mark.parametrize("change, noticed", [
    # The clip stops.
    (lambda x: x[[*range(150), *[150] * 250]],
     lambda found: found["speed"].min() < 0.01 and found["turns over true"] < 0.6),
    # The shape goes back and forth through the middle of the frame.
    (lambda x: torch.cat([x[:8], *[x[:8].flip(0), x[:8]] * 20]),
     lambda found: found["turns away from walls, %"] > 50 and found["turns over true"] > 1.3),
    # The colour changes.
    (lambda x: torch.cat([x[:200], x[200:].flip(1)]),
     lambda found: found["colour and shape right at the end, %"] == 0
     and found["paint at the end, change"] > 0.3),
    # The shape becomes thinner.
    (lambda x: torch.cat([x[:300], x[300:].flip(2).minimum(x[300:])]),
     lambda found: found["size at the end, change, %"] > 10),
    # Every window of five frames begins three frames later than it should.
    (lambda x: x[[*range(8), *(i for s in range(8, 392, 8) for i in range(s, s + 5))]],
     lambda found: found["steps at joints over inside"] > 2),
])
def test_laws_notice_mistakes(change, noticed):
    assert noticed(laws_of(change))
