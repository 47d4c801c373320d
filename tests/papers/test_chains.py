"""Which frames a window knows, and in which order frames come, by a stand-in that counts."""

import itertools

import pytest
import torch
from recorded.rule import normal

from papers import chains
from papers.chains import Chain, fill, follow, long_latents


@pytest.fixture
def drawn(monkeypatch):
    """A draw() that counts on: a new frame is 1 more than the frame before, or what lies between.

    Lists the (known, frame rate, seeds) of each call.
    """
    calls = []

    def count(model, context, latents, known, frame_rate, seeds, how):
        calls.append((known.tolist(), frame_rate, list(seeds)))
        places = [i for i, is_known in enumerate(known) if is_known] or [0]
        result = latents.clone()
        for i in range(len(known)):
            if known[i] or not known.any():
                result[:, i] = latents[:, i] if known[i] else float(i)
            elif i > places[-1]:
                result[:, i] = result[:, i - 1] + 1
            else:
                after = min(p for p in places if p > i)
                before = max(p for p in places if p < i)
                part = (i - before) / (after - before)
                result[:, i] = (1 - part) * latents[:, before] + part * latents[:, after]
        return result

    monkeypatch.setattr(chains, "draw", count)
    return calls


class Model:
    """What begin() asks of a model."""

    class sampling:
        num_steps, guidance_scale, guidance_max_snr, timestep_power = 4, 2.0, None, 1.0

    class unet:
        class config:
            out_channels = 1


CONTEXT = torch.zeros(2, 3, 5)


def frames_of(stream, count):
    """The first frames of a stream of latents of two clips, as numbers of the first clip."""
    found = []
    while len(found) < count:
        found += next(stream)[0, :, 0, 0, 0].tolist()
    return found[:count]


def test_a_window_knows_the_last_frames_of_the_one_before(drawn):
    last = torch.tensor([8.0, 9.0, 10.0]).view(1, 3, 1, 1, 1).expand(2, 3, 1, 2, 2)
    stream = follow(Model, CONTEXT, Chain(6, 3, 8.0), [7, 9], last)
    assert frames_of(stream, 9) == [11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert drawn[0] == ([True] * 3 + [False] * 3, 8.0, [7 * 2**20 + 1, 9 * 2**20 + 1])
    assert drawn[2][2] == [7 * 2**20 + 3, 9 * 2**20 + 3]  # other noise in each window


def test_between_key_frames_three_are_drawn(drawn):
    keys = iter([torch.tensor([[0.0, 4.0], [0.0, 4.0]]).view(2, 2, 1, 1, 1),
                 torch.tensor([[8.0, 12, 16], [8.0, 12, 16]]).view(2, 3, 1, 1, 1)])
    stream = fill(Model, CONTEXT, Chain(8, 3, 8.0), [1, 2], keys)
    assert frames_of(stream, 16) == [float(i) for i in range(1, 17)]
    assert [i for i, known in enumerate(drawn[0][0]) if known] == [0, 4, 8]


@pytest.mark.parametrize("hierarchical", [False, True])
def test_frames_of_a_long_clip_are_in_order(drawn, hierarchical):
    stream = long_latents(Model, (CONTEXT, CONTEXT), Chain(), [1, 2], 2, hierarchical)
    step = 4 if hierarchical else 1  # the first window counts key frames
    assert frames_of(stream, 60) == [i / step for i in range(60)]
    assert {rate for _, rate, _ in drawn} == ({8.0, 2.0} if hierarchical else {8.0})


def test_a_clip_is_continued_and_not_repeated(drawn):
    clip = torch.arange(20.0).view(1, 20, 1, 1, 1).expand(2, 20, 1, 2, 2)
    stream = long_latents(Model, (CONTEXT, CONTEXT), Chain(), [1, 2], 2, clip=clip)
    assert frames_of(stream, 12) == list(range(20, 32))


@pytest.mark.parametrize("count", [9, 10, 20])  # 9: as few as three key frames take
def test_key_frames_after_a_clip_are_counted_from_its_last_frame(drawn, count):
    clip = torch.arange(float(count)).view(1, count, 1, 1, 1).expand(2, count, 1, 2, 2)
    stream = long_latents(Model, (CONTEXT, CONTEXT), Chain(), [1, 2], 2, True, clip=clip)
    # Known are the last frame and those 4 and 8 before it; the stand-in counts on by 1 from key
    # frame to key frame.
    assert frames_of(stream, 8) == [count - 1 + i / 4 for i in range(1, 9)]


def test_the_first_frame_is_the_one_given(drawn):
    stream = long_latents(Model, (CONTEXT, CONTEXT), Chain(), [1, 2], 2,
                          first=torch.full((2, 1, 2, 2), 50.0))
    assert frames_of(stream, 3) == [50, 51, 52]
    assert drawn[0][0] == [True] + [False] * 7


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_stream_goes_on_after_any_window(drawn, hierarchical, with_clip, windows):
    clip = normal(2, 12, 1, 2, 2) if with_clip else None
    arguments = Model, (CONTEXT, CONTEXT), Chain(), [1, 2], 2, hierarchical, None, clip
    whole = [*itertools.islice(long_latents(*arguments), windows + 2)]
    calls, done = [*drawn], torch.cat(whole[:windows], dim=1)
    drawn.clear()
    rest = [*itertools.islice(long_latents(*arguments, done[:, -8:], done.shape[1]), 2)]
    assert torch.cat(whole[windows:], dim=1).equal(torch.cat(rest, dim=1))
    assert drawn[-1] == calls[-1]  # the same seeds
