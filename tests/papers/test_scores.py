"""Scores of the truth, and of mistakes made on purpose."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import fresh_pipeline

from papers import scores
from papers.bouncing import BouncingShapes
from papers.chains import Chain
from papers.known_frames import widen
from vae import encode_clip


class Identity(torch.nn.Module):
    """An autoencoder whose latents are the frames."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"scaling_factor": 1.0, "downscale": 1})
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def encode(self, x):
        return type("Gaussian", (), {"mean": x})


@pytest.fixture
def model(monkeypatch):
    """A model whose latents are pixels; `draw` is replaced by each test."""
    pipeline = fresh_pipeline()
    sampling = dataclasses.replace(pipeline.sampling, image_size=32, frames_per_second=8.0)
    pipeline = dataclasses.replace(pipeline, vae=Identity(), sampling=sampling)
    pipeline.unet = widen(pipeline.unet)
    monkeypatch.setattr(type(pipeline), "decode", lambda self, latents: latents)
    return pipeline


def test_a_window_of_the_truth_has_almost_no_error(model, monkeypatch):
    monkeypatch.setattr(scores, "draw", lambda model, context, latents, *_: latents)
    along, across = scores.window_error(model, range(3), 8, seed=5, num_clips=12)
    assert along < 0.1 and across < 0.1


def test_a_window_that_stands_still_is_wrong_along_the_motion_only(model, monkeypatch):
    def freeze(model, context, latents, known, *_):
        return latents[:, 2:3].expand_as(latents)

    monkeypatch.setattr(scores, "draw", freeze)
    along, across = scores.window_error(model, range(3), 8, seed=5, num_clips=12)
    # 1 to 5 steps too late, of about 0.3 * 32 / 7 pixels; less where the shape turns.
    assert 2 < along < 3 * 0.35 * 32 / 7 and across < 0.15


def test_a_lost_shape_leaves_the_error_of_the_other_frames(model, monkeypatch):
    def lose(model, context, latents, *_):
        latents[0, 4] = latents[0, 4, :, :1, :1]  # background everywhere
        return latents

    monkeypatch.setattr(scores, "draw", lose)
    along, across = scores.window_error(model, range(3), 8, seed=5, num_clips=12)
    assert along < 0.1 and across < 0.1


@pytest.mark.parametrize("factor", [0.5, 2])
def test_real_clips_at_another_rate_have_the_speed_asked_for(model, monkeypatch, factor):
    def real(model, context, chain, seeds, size, first=None):
        data = BouncingShapes(len(seeds), 8, 32, seeds[0], step=8 / chain.frame_rate)
        return torch.stack([encode_clip(model.vae, data[i][0]) for i in range(len(seeds))])

    monkeypatch.setattr(scores, "begin", real)
    assert scores.speed_ratio(model, factor, seed=3, num_clips=12) == pytest.approx(1, abs=0.02)
    monkeypatch.setattr(scores, "begin", lambda model, context, chain, *rest: real(
        model, context, dataclasses.replace(chain, frame_rate=8.0), *rest))
    ignored = scores.speed_ratio(model, factor, seed=3, num_clips=12)  # deaf to the rate
    assert ignored == pytest.approx(1 / factor, rel=0.1)


def test_real_first_windows_and_key_frames_are_right(model, monkeypatch):
    def real(model, context, chain, seeds, size, first=None):
        prompts = scores.choose_prompts(len(seeds))
        data = BouncingShapes(len(seeds), chain.num_frames, 32, 1, prompts, 8 / chain.frame_rate)
        return torch.stack([encode_clip(model.vae, data[i][0]) for i in range(len(seeds))])

    monkeypatch.setattr(scores, "begin", real)
    assert scores.first_windows(model, Chain(), 0, 12) == 100
    assert scores.first_windows(model, Chain(), 0, 12, image=True) == 100
    monkeypatch.setattr(scores, "interpolate", lambda model, context, keys, between, rate, seeds:
                        real(model, context, Chain(61), seeds, 32))
    assert scores.key_frames_right(model, 0, 12) == 100


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
