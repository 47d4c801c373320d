"""Windows one after the other: how clips become longer than a model's training clips.

    begin     the first window, of the text alone or with a known first frame
    follow    prediction: the last frames of a window are the known ones of the next, without end
    fill      interpolation: the frames between key frames

LVDM's hierarchical generation (He et al. 2022, section 3.3) is fill() on the key frames of
follow(). All are generators, so a clip may be longer than memory.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from papers.known_frames import Guidance, draw

BETWEEN = 3  # frames between two key frames


@dataclass(frozen=True)
class Chain:
    """How windows follow each other: their frames, the known ones, and how each is drawn."""

    num_frames: int = 8
    num_known: int = 3
    frame_rate: float = 8.0
    how: Guidance = Guidance()


def seeds_of(seeds, window):
    """A seed for each clip's window, so that a chain can go on from any of them."""
    return [seed * 2**20 + window for seed in seeds]


def begin(model, context, chain, seeds, size, first=None):
    """The first window (b, t, c, h, w) of clips, of the text alone or with a known first frame."""
    shape = (len(seeds), chain.num_frames, model.unet.config.out_channels, size, size)
    latents = torch.zeros(shape, device=context.device)
    known = torch.zeros(chain.num_frames, dtype=torch.bool)
    if first is not None:
        latents[:, 0], known[0] = first, True
    # The text decides here what is seen, as in sample.py; later windows follow the known frames.
    like = model.sampling
    how = Guidance(like.num_steps, text=like.guidance_scale, max_snr=like.guidance_max_snr,
                   power=like.timestep_power)
    return draw(model, context, latents, known, chain.frame_rate, seeds_of(seeds, 0), how)


def follow(model, context, chain, seeds, last, window=1):
    """Yield the frames (b, n, c, h, w) that follow `last` (b, num_known, ...), without end."""
    new = chain.num_frames - chain.num_known
    known = torch.arange(chain.num_frames) < chain.num_known
    while True:
        latents = torch.cat([last, last.new_zeros(last.shape[0], new, *last.shape[2:])], dim=1)
        latents = draw(model, context, latents, known, chain.frame_rate, seeds_of(seeds, window),
                       chain.how)
        yield latents[:, chain.num_known :]
        last, window = latents[:, -chain.num_known :], window + 1


def fill(model, context, chain, seeds, keys, done=0):
    """Yield the frames between key frames, and these: 3 new ones, a key, 3 new ones, a key.

    keys yields key frames (b, n, c, h, w), whose first one is not yielded again; chain.frame_rate
    is that of all frames. The first `done` windows are left out.
    """
    span = 2 * (BETWEEN + 1)
    buffer = next(keys)
    known = torch.arange(span + 1) % (BETWEEN + 1) == 0
    for window in itertools.count():
        while buffer.shape[1] < 3:
            buffer = torch.cat([buffer, next(keys)], dim=1)
        if window >= done:
            latents = buffer.new_zeros(len(buffer), span + 1, *buffer.shape[2:])
            latents[:, known] = buffer[:, :3]
            # Seeds of their own: the windows of the key frames count from 0, too.
            seeds_here = seeds_of(seeds, 2**19 + window)
            yield draw(model, context, latents, known, chain.frame_rate, seeds_here,
                       chain.how)[:, 1:]
        buffer = buffer[:, 2:]


def long_latents(model, contexts, chain, seeds, size, hierarchical=False, first=None, clip=None,
                 done=None, count=0):
    """Yield the latents (b, n, c, h, w) of clips without end.

    contexts: of the text for the first window, and of that for all others. first: latents (b, c, h,
    w) of the first frame. clip: latents (b, t, c, h, w) that are continued, and not yielded. An
    earlier call with the same arguments has yielded `count` frames, which end with `done`.
    """
    context, later = contexts
    new = chain.num_frames - chain.num_known
    if not hierarchical:
        before = clip
        if clip is None:
            if not count:
                done = begin(model, context, chain, seeds, size, first)
                yield done
            before, count = done, max(0, count - chain.num_frames)
        elif count:
            before = torch.cat([clip, done], dim=1)
        yield from follow(model, later, chain, seeds, before[:, -chain.num_known :],
                          1 + count // new)
    sparse = dataclasses.replace(chain, frame_rate=chain.frame_rate / (BETWEEN + 1))
    if clip is None:
        keys = begin(model, context, sparse, seeds, size, first)
        if not count:
            yield keys[:, :1]
            count = 1
        start, count = keys, count - 1
    else:  # every 4th frame, counted from the last
        keys = clip[:, -1 - (BETWEEN + 1) * (chain.num_known - 1) :: BETWEEN + 1]
        start = keys[:, -1:]
    stream = follow(model, later, sparse, seeds, keys[:, -chain.num_known :])
    yield from fill(model, later, chain, seeds, itertools.chain([start], stream),
                    count // (2 * (BETWEEN + 1)))
