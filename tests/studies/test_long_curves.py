"""Curves of long clips whose truth is known, and of clips whose shape is lost."""

import pytest
import torch
from PIL import Image

from papers.bouncing import BouncingShapes
from studies import long_curves
from studies.long_curves import curves, draw_panels

DATA = BouncingShapes(4, 250, 32, 5)


@pytest.fixture
def panels(monkeypatch):
    """The curves of real clips, some of them without their shape from frame 100 on."""
    def measure(lost):
        clips = torch.stack([DATA[i][0].float() / 127.5 - 1 for i in range(4)])
        clips[lost, 100:] = -0.88
        monkeypatch.setattr(long_curves, "choose_prompts", lambda n: DATA.combinations)
        monkeypatch.setattr(long_curves, "long_clips", lambda *_, **__: (clips, 0.0))
        return curves(None, None, 4, 250, 0, True)
    return measure


def test_in_every_panel_real_clips_are_at_1(panels):
    for points in panels([]).values():
        assert [frame for frame, *_ in points] == [50, 100, 150, 200, 250]
        assert all(mean == pytest.approx(1, abs=0.15) for _, mean, _, _ in points)


def test_clips_that_lose_their_shape_leave_the_speed_of_the_others(panels, tmp_path):
    found = panels([1])
    assert found["right"][-1][1] == 0.75
    assert found["speed"][-1][1] == pytest.approx(1, abs=0.15)
    found = panels([0, 1, 2])
    assert torch.tensor(found["speed"][-1][1:]).isnan().all()  # one clip has no interval
    draw_panels(tmp_path / "curves.png", found)
    assert Image.open(tmp_path / "curves.png").size == (900, 640)
