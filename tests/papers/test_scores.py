"""Scores of the truth, and of mistakes made on purpose."""

import dataclasses

import numpy as np
import pytest
import torch

from papers import scores
from papers.bouncing import BouncingShapes
from papers.chains import Chain
from pipeline import Sampling
from shapes import MovingShapes


class Model:
    """A model whose latents are pixels; each test replaces the drawing."""

    sampling, vae = Sampling(image_size=32, frames_per_second=8.0), None

    @staticmethod
    def encode_text(texts):
        return torch.zeros(len(texts), 1, 1)

    @staticmethod
    def decode(latents):
        return latents


@pytest.fixture(autouse=True)
def latents_are_pixels(monkeypatch):
    monkeypatch.setattr(scores, "encode_clip", lambda vae, frames: frames / 127.5 - 1)


def real(prompts, num_frames, step=1.0, seed=1):
    """Real clips (b, t, 3, h, w) of combinations."""
    data = BouncingShapes(len(prompts), num_frames, 32, seed, prompts, step)
    return torch.stack([data[i][0] for i in range(len(prompts))]) / 127.5 - 1


def draw_truth(model, context, latents, known, *_):
    return latents


def stand_still(model, context, latents, known, *_):
    return latents[:, 2:3].expand_as(latents)


def lose_a_shape(model, context, latents, known, *_):
    latents[0, 4] = latents[0, 4, :, :1, :1]  # background everywhere
    return latents


@pytest.mark.parametrize("draw", [draw_truth, lose_a_shape])
def test_a_window_of_the_truth_has_almost_no_error(monkeypatch, draw):
    monkeypatch.setattr(scores, "draw", draw)
    along, across = scores.window_error(Model, range(3), 8, seed=5, num_clips=12)
    assert along < 0.1 and across < 0.1


def test_a_window_that_stands_still_is_wrong_along_the_motion_only(monkeypatch):
    monkeypatch.setattr(scores, "draw", stand_still)
    along, across = scores.window_error(Model, range(3), 8, seed=5, num_clips=12)
    # 1 to 5 steps too late, of about 0.3 * 32 / 7 pixels; less where the shape turns.
    assert 2 < along < 3 * 0.35 * 32 / 7 and across < 0.15


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("follows", [True, False])
def test_speeds_are_relative_to_the_frame_rate_asked_for(monkeypatch, factor, follows):
    def begin(model, context, chain, seeds):
        data = BouncingShapes(len(seeds), 8, seed=seeds[0])
        return real(data.combinations, 8, 8 / chain.frame_rate if follows else 1, seeds[0])

    monkeypatch.setattr(scores, "begin", begin)
    ratio = scores.speed_ratio(Model, factor, seed=3, num_clips=12)
    assert ratio == (pytest.approx(1, abs=0.02) if follows else pytest.approx(1 / factor, rel=0.1))


@pytest.mark.parametrize("wrong", [(), (0,), (3, 4, 5)])
@pytest.mark.parametrize("image", [True, False])
def test_first_windows_count_if_they_go_where_the_text_says(monkeypatch, image, wrong):
    prompts, given = scores.choose_prompts(10), []

    def begin(model, context, chain, seeds, first):
        given.append(first)
        clips = real(prompts, 8)
        for i in wrong:
            clips[i] = clips[i].flip(0)  # backwards
        return clips

    monkeypatch.setattr(scores, "begin", begin)
    assert scores.first_windows(Model, Chain(), 0, 10, image) == 100 - 10 * len(wrong)
    if image:  # the first frames of real clips of the same combinations
        frames = torch.stack([clip[0] for clip, _ in MovingShapes(10, 8, 32, 0, prompts)])
        torch.testing.assert_close(given[0], frames / 127.5 - 1)


@pytest.mark.parametrize("lost, right", [(56, 100), (3, 50), (13, 50), (50, 50)])
def test_key_frames_keep_colour_and_shape_to_their_end(monkeypatch, lost, right):
    asked = []

    def long_latents(model, contexts, chain, seeds):
        asked.append(chain)
        clips = real(scores.choose_prompts(len(seeds)), 80)
        clips[:6, lost // 8 * 8 :][:, :8] = 0  # half of the clips lose their shape for 8 frames
        yield from clips.split(16, dim=1)

    monkeypatch.setattr(scores, "long_latents", long_latents)
    chain = Chain(frame_rate=8.0)
    assert scores.key_frames_right(Model, chain, 0, 12) == right
    assert asked == [dataclasses.replace(chain, key_frames=16)]


def test_a_summary_takes_the_end_and_the_slowest_window():
    law = {"right": [0.5, 1.0], "size": [1.0, 0.9], "speed": [0.8, 1.0], "turns": [1, 1.2],
           "paint": 0.1, "mid_air": 0.25, "drift": 2.0, "joints": 1.1}
    other = {**law, "size": [1.0, 1.1], "speed": [1.0, 1.2], "turns": [1, 1.4], "right": [0.0, 0.0]}
    found = scores.summary([law, other])
    assert found["colour and shape right, %"] == 50
    assert found["size, change, %"] == pytest.approx(10)  # of both signs
    assert found["speed, slowest 50 frames"] == pytest.approx(0.9)
    assert found["speed, fastest 50 frames"] == pytest.approx(1.1)
    assert found["turns over true"] == pytest.approx(1.3)
    assert found["turns away from walls, %"] == 25
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("key_frames, joints", [(0, (6, 4)), (8, (9, 8))])
def test_an_evaluation_measures_the_windows_that_are_drawn(monkeypatch, key_frames, joints):
    windows, measured = [], []
    for name in ("first_windows", "key_frames_right", "speed_ratio"):
        monkeypatch.setattr(scores, name, lambda *_, **__: 90.0)
    monkeypatch.setattr(scores, "long_clips", lambda *_: (torch.zeros(4, 250), 0.5))
    monkeypatch.setattr(scores, "summary", lambda results: {})
    monkeypatch.setattr(scores, "laws", lambda clip, prompt, joints: measured.append(joints))
    monkeypatch.setattr(scores, "window_error", lambda model, known, num_frames, *_: (
        windows.append((list(known), num_frames)) or [0.4, 0.2]))
    found = scores.evaluate(Model, Chain(6, 2, key_frames=key_frames), 4, 250, 0)
    assert measured == 4 * [joints] and windows == [([0, 1], 6), ([0, 4, 8], 9)]
    assert [name for name in found if name.startswith("speed")] == [
        f"speed at {factor} times, over asked" for factor in ("0.5", "1", "2", "4")]
    assert found["CPU seconds per 1,000 frames"] == 2 and found["interpolation: error, px"] == 0.4
