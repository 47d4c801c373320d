"""Which frames a window knows, and in which order frames come, by a stand-in that counts."""

import pytest
import torch

from papers import chains
from papers.chains import Chain, begin, fill, follow, interpolate, long_latents


@pytest.fixture
def drawn(monkeypatch):
    """A draw() that counts: a new frame is the one before plus 1, or lies between its neighbours.

    Lists the (known, frame rate, seeds, how) of each call.
    """
    calls = []

    def count(model, context, latents, known, frame_rate, seeds, how):
        calls.append((known.tolist(), frame_rate, list(seeds), how))
        indices = [i for i, is_known in enumerate(known) if is_known]
        result = latents.clone()
        for i in range(len(known)):
            if not indices:
                result[:, i] = float(i)
            elif i > indices[-1]:
                result[:, i] = result[:, i - 1] + 1
            elif not known[i]:
                after = min(p for p in indices if p > i)
                before = max(p for p in indices if p < i)
                part = (i - before) / (after - before)
                result[:, i] = (1 - part) * latents[:, before] + part * latents[:, after]
        return result

    monkeypatch.setattr(chains, "draw", count)
    return calls


class Model:
    """The parts of a model that begin() reads."""

    class sampling:
        num_steps, guidance_scale, guidance_max_snr, timestep_power = 4, 2.0, 0.5, 0.7
        image_size = 16

    class unet:
        class config:
            out_channels = 1

    class vae:
        class config:
            downscale = 8


CONTEXT = torch.zeros(2, 3, 5)
CONTEXTS = CONTEXT, CONTEXT


def clip_of(*numbers):
    """Latents of two clips, whose frames are these numbers everywhere."""
    return torch.tensor(numbers).view(1, -1, 1, 1, 1).expand(2, len(numbers), 1, 2, 2)


def frames_of(stream, count):
    """The first frames of a stream of latents of two clips, as numbers of the first clip."""
    found = []
    while len(found) < count:
        found += next(stream)[0, :, 0, 0, 0].tolist()
    return found[:count]


def test_the_first_window_is_drawn_as_the_run_samples(drawn):
    window = begin(Model, CONTEXT, Chain(6, frame_rate=3.0), [7, 9])
    assert window.shape == (2, 6, 1, 2, 2)
    known, rate, seeds, how = drawn[0]
    assert (known, rate, seeds) == ([False] * 6, 3.0, [7 * 2**20, 9 * 2**20])
    assert (how.num_steps, how.text, how.max_snr, how.power) == (4, 2.0, 0.5, 0.7)


def test_the_first_frame_is_the_one_given(drawn):
    stream = long_latents(Model, CONTEXTS, Chain(), [1, 2], first=torch.full((2, 1, 2, 2), 50.0))
    assert frames_of(stream, 3) == [50, 51, 52]
    assert drawn[0][0] == [True] + [False] * 7


def test_a_window_knows_the_last_frames_of_the_one_before(drawn):
    stream = follow(Model, CONTEXT, Chain(6, 3), [7, 9], clip_of(8.0, 9.0, 10.0))
    assert frames_of(stream, 9) == [11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert [call[0] for call in drawn] == 3 * [[True] * 3 + [False] * 3]


def test_between_key_frames_three_are_drawn(drawn):
    keys = iter([clip_of(0.0, 4.0), clip_of(8.0, 12.0, 16.0)])
    stream = fill(Model, CONTEXT, Chain(), [1, 2], keys)
    assert frames_of(stream, 16) == list(range(1, 17))
    assert [i for i, known in enumerate(drawn[0][0]) if known] == [0, 4, 8]


@pytest.mark.parametrize("key_frames", [0, 8, 16])
def test_frames_of_a_long_clip_are_in_order(drawn, key_frames):
    stream = long_latents(Model, CONTEXTS, Chain(key_frames=key_frames), [1, 2])
    step = 4 if key_frames else 1  # the first window counts key frames
    assert frames_of(stream, 90) == [i / step for i in range(90)]
    assert len(drawn[0][0]) == (key_frames or 8)
    assert {call[1] for call in drawn} == ({8.0, 2.0} if key_frames else {8.0})


@pytest.mark.parametrize("key_frames", [0, 8])
def test_every_window_has_its_own_seeds(drawn, key_frames):
    frames_of(long_latents(Model, CONTEXTS, Chain(key_frames=key_frames), [7, 9]), 90)
    seeds = [seed for call in drawn for seed in call[2]]
    assert len(set(seeds)) == len(seeds)


def test_a_clip_is_continued_and_not_repeated(drawn):
    stream = long_latents(Model, CONTEXTS, Chain(), [1, 2], clip=clip_of(*map(float, range(20))))
    assert frames_of(stream, 12) == list(range(20, 32))


@pytest.mark.parametrize("count", [9, 10, 20])  # 9 are as few as three key frames take
def test_key_frames_after_a_clip_are_counted_from_its_last_frame(drawn, count):
    clip = clip_of(*map(float, range(count)))
    stream = long_latents(Model, CONTEXTS, Chain(key_frames=8), [1, 2], clip=clip)
    # The last frame and the frames 4 and 8 before it are known; the stand-in adds 1 per key frame.
    assert frames_of(stream, 8) == [count - 1 + i / 4 for i in range(1, 9)]


@pytest.mark.parametrize("between, window", [(1, 9), (2, 7), (3, 9), (8, 10)])
@pytest.mark.parametrize("num_keys", [6, 7])
def test_interpolation_keeps_the_frames_of_the_clip(drawn, num_keys, between, window):
    step = between + 1
    keys = clip_of(*(float(step * i) for i in range(num_keys)))
    parts = interpolate(Model, CONTEXT, Chain(), [1, 2], keys, between)
    frames = torch.cat([*parts], dim=1)[0, :, 0, 0, 0]
    torch.testing.assert_close(frames, torch.arange(step * (num_keys - 1) + 1.0))
    assert {len(call[0]) for call in drawn} == {window}


def test_two_frames_are_interpolated(drawn):
    parts = interpolate(Model, CONTEXT, Chain(), [1, 2], clip_of(0.0, 2.0), 1)
    assert torch.cat([*parts], dim=1)[0, :, 0, 0, 0].tolist() == [0, 1, 2]
