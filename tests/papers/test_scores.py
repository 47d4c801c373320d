"""Scores of the truth, and of mistakes made on purpose."""

import pytest
import torch

from evaluate import real_clips
from papers import scores
from papers.bouncing import BouncingShapes
from papers.chains import Chain
from papers.known_frames import Guidance
from pipeline import Sampling


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
    monkeypatch.setattr(scores, "NUM_CLIPS", 12)


def real(prompts, num_frames, step=1.0, seed=1):
    """Real clips (b, t, 3, h, w) of combinations."""
    data = BouncingShapes(len(prompts), num_frames, 32, seed, prompts, step)
    return torch.stack([data[i][0] for i in range(len(prompts))]) / 127.5 - 1


def lose_a_shape(latents):
    latents[0, 4] = latents[0, 4, :, :1, :1]  # background everywhere
    return latents


@pytest.mark.parametrize("draw, least, most", [
    (lambda latents: latents, 0, 0.1), (lose_a_shape, 0, 0.1),
    # A clip that stands still after its known frames is 1 to 5 steps of about 0.3 * 32/7 pixels
    # behind, and less where the shape turns.
    (lambda latents: latents[:, 2:3].expand_as(latents), 2, 3 * 0.35 * 32 / 7),
])
def test_the_error_of_a_window_is_along_the_motion(monkeypatch, draw, least, most):
    monkeypatch.setattr(scores, "draw", lambda model, context, latents, *_: draw(latents))
    along, across = scores.window_error(Model, range(3), 8, 5, Guidance())
    assert least <= along < most and across < 0.15


@pytest.mark.parametrize("factor, follows", [(0.5, True), (2, True), (2, False)])
def test_speeds_are_relative_to_the_frame_rate_asked_for(monkeypatch, factor, follows):
    def begin(model, context, chain, seeds):
        data = BouncingShapes(len(seeds), 8, seed=seeds[0])
        return real(data.combinations, 8, 8 / chain.frame_rate if follows else 1, seeds[0])

    monkeypatch.setattr(scores, "begin", begin)
    ratio = scores.speed_ratio(Model, factor, seed=3)
    assert ratio == (pytest.approx(1, abs=0.02) if follows else pytest.approx(1 / factor, rel=0.1))


@pytest.mark.parametrize("image", [True, False])
def test_first_windows_count_if_they_go_where_the_text_says(monkeypatch, image):
    def begin(model, context, chain, seeds, first):
        clips = real_clips(12, 8, 32, 0, scores.choose_prompts(12))
        assert not image or torch.allclose(first, clips[:, 0], atol=1e-6)
        clips[3:6] = clips[3:6].flip(1)  # backwards
        return clips

    monkeypatch.setattr(scores, "begin", begin)
    assert scores.first_windows(Model, Chain(), 0, image) == 75


@pytest.mark.parametrize("lost, right", [(range(57, 60), 100), ([56], 50), ([60], 50), ([4], 50)])
def test_each_key_frame_has_its_colour_and_shape(monkeypatch, lost, right):
    def long_latents(model, contexts, chain, seeds):
        assert chain.key_frames == 16
        clips = real(scores.choose_prompts(len(seeds)), 80)
        clips[:6, lost] = 0  # half of the clips lose their shape there
        yield from clips.split(16, dim=1)

    monkeypatch.setattr(scores, "long_latents", long_latents)
    assert scores.key_frames_right(Model, Chain(), 0) == right


def test_an_evaluation_measures_the_windows_that_are_drawn(monkeypatch):
    windows = []
    for name in ("first_windows", "key_frames_right", "speed_ratio"):
        monkeypatch.setattr(scores, name, lambda *_, **__: 90.0)
    monkeypatch.setattr(scores, "long_clips", lambda *_: (torch.arange(4.0), 0.5))
    monkeypatch.setattr(scores, "laws", lambda clip, prompt, joints: {
        "size": clip, "joints": joints[0] - joints[1], "speed": [0.8 + clip / 10, 1 + clip / 10]})
    monkeypatch.setattr(scores, "window_error", lambda model, known, num_frames, *_: (
        windows.append((list(known), num_frames)) or [0.4, 0.2]))
    found = scores.evaluate(Model, Chain(6, 2), 4, 250, 0)
    assert windows == [([0, 1], 6), ([0, 4, 8], 9)] and found["joints"] == 6 - 4
    assert found["CPU seconds per 1,000 frames"] == 2 and found["interpolation: error, px"] == 0.4
    assert found["size"] == 1.5 and found["speed, slowest 50 frames"] == pytest.approx(0.95)
