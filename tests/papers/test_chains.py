"""Which frames a window knows, and in which order frames come, by a stand-in that counts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from papers import chains
from papers.chains import Chain, begin, interpolate, long_latents
from pipeline import Sampling


@pytest.fixture
def drawn(monkeypatch):
    """A draw() that counts: a new frame is the one before plus 1, or lies between its neighbours.

    Lists the (known, number of frames, frame rate, seeds, how) of each call.
    """
    calls = []

    def count(model, context, latents, known, frame_rate, seeds, how):
        calls.append(([*known], latents.shape[1], frame_rate, [*seeds], how))
        at = [*known] or [0]
        frames = np.arange(latents.shape[1])
        found = np.interp(frames, at, latents[0, at, 0, 0, 0]) + (frames - at[-1]).clip(0)
        return clip_of(*found).float()

    monkeypatch.setattr(chains, "draw", count)
    return calls


MODEL = SimpleNamespace(
    sampling=Sampling(image_size=16, num_steps=4, guidance_scale=2.0, guidance_max_snr=0.5,
                      timestep_power=0.7),
    unet=SimpleNamespace(config=SimpleNamespace(out_channels=1)),
    vae=SimpleNamespace(config=SimpleNamespace(downscale=8)))
CONTEXT = torch.zeros(2, 3, 5)
CONTEXTS = CONTEXT, CONTEXT  # of the first window and of all others


def clip_of(*numbers):
    """Latents of two clips, whose frames are these numbers everywhere."""
    return torch.tensor(numbers).view(1, -1, 1, 1, 1).expand(2, len(numbers), 1, 2, 2)


def frames_of(stream, count):
    """The first frames of a stream of latents of two clips, as numbers of the first clip."""
    found = []
    while len(found) < count:
        found += next(stream)[0, :, 0, 0, 0].tolist()
    return found[:count]


def test_the_first_frame_is_drawn_as_the_run_samples_images_then_the_window_that_knows_it(drawn):
    model = SimpleNamespace(**vars(MODEL) | {"sampling": dataclasses.replace(
        MODEL.sampling, num_steps=6)})
    window = begin(model, CONTEXT, Chain(6, frame_rate=3.0), [7, 9])
    assert window[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    (*image, how), (*rest, same) = drawn
    assert image == [[], 1, 8.0, [7 * 2**20, 9 * 2**20]]  # at the run's rate
    assert rest == [[0], 6, 3.0, [7 * 2**20, 9 * 2**20]]
    assert (how.num_steps, how.text_scale, how.max_snr, how.power) == (6, 2.0, 0.5, 0.7)
    assert same == how


@pytest.mark.parametrize("key_frames", [0, 2, 8, 16])
def test_frames_of_a_long_clip_are_in_order_and_windows_have_their_own_seeds(drawn, key_frames):
    stream = long_latents(MODEL, CONTEXTS, Chain(key_frames=key_frames), [7, 9])
    step = 4 if key_frames else 1  # the first window counts key frames
    assert frames_of(stream, 90) == [i / step for i in range(90)]
    assert drawn.pop(0)[1] == 1  # the first frame, whose noise is that of its window
    assert drawn[0][1] == (key_frames or 8)
    assert {call[2] for call in drawn} == ({8.0, 2.0} if key_frames else {8.0})
    seeds = [seed for call in drawn for seed in call[3]]
    assert len(set(seeds)) == len(seeds)
    if key_frames == 16:  # the first 57 frames need no other key frames
        assert [call[:2] for call in drawn[:8]] == [([0], 16)] + 7 * [([0, 4, 8], 9)]


@pytest.mark.parametrize("start", [{"clip": clip_of(50.0, 51.0, 52.0, 53.0)},
                                   {"first": torch.full((2, 1, 2, 2), 50.0)}])
def test_a_clip_begins_with_the_frames_given(drawn, start):
    stream = long_latents(MODEL, CONTEXTS, Chain(6, 3), [1, 2], **start)
    assert frames_of(stream, 20) == list(range(50, 70))
    assert drawn[0][0] == ([0, 1, 2] if "clip" in start else [0])
    assert {(*call[0], call[1]) for call in drawn[1:]} == {(0, 1, 2, 6)}


@pytest.mark.parametrize("between, windows", [(1, {9, 5}), (3, {9}), (9, {11})])
def test_interpolation_keeps_the_frames_of_the_clip(drawn, between, windows):
    step = between + 1
    keys = clip_of(*(float(step * i) for i in range(7)))
    frames = torch.cat([*interpolate(MODEL, CONTEXT, Chain(), [1, 2], keys, between)], dim=1)
    torch.testing.assert_close(frames[0, :, 0, 0, 0], torch.arange(step * 6 + 1.0))
    assert {call[1] for call in drawn} == windows
