"""Windows one after another, for clips that are longer than a model's training clips.

    begin          the first window, from the text alone or with a known first frame
    follow         prediction: the last frames of a window are the first of the next, without end
    fill           interpolation: the frames between key frames
    long_latents   a clip without end: follow(), or fill() on the key frames of follow()

The second form of long_latents is LVDM's hierarchical generation (He et al. 2022, section 3.3).
With many key frames in the first window it is MagicVideo's (Zhou et al. 2022), which draws all key
frames at once, at a low frame rate. All are generators, so a clip may be longer than memory.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from papers.known_frames import Guidance, draw

BETWEEN = 3  # frames between two key frames
WINDOW = 8  # steps from the first frame to the last of an interpolation window, as in training


@dataclass(frozen=True)
class Chain:
    """How windows follow each other."""

    num_frames: int = 8
    num_known: int = 3
    frame_rate: float = 8.0
    how: Guidance = Guidance()
    key_frames: int = 0  # number of key frames in the first window; 0: draw frame after frame


def seeds_of(seeds, window):
    """A seed for each clip's window, so that every window has its own noise."""
    return [seed * 2**20 + window for seed in seeds]


def begin(model, context, chain, seeds, first=None):
    """The first window (b, t, c, h, w) of clips, with the first frame (b, c, h, w) if given.

    Otherwise the first frame is drawn as an image, and then held before all others, so they need
    not agree on colour, shape and position out of noise. Emu Video, Girdhar et al. 2023.
    """
    sampling = model.sampling
    if first is None and chain.num_frames > 1:
        alone = dataclasses.replace(chain, num_frames=1, frame_rate=sampling.frames_per_second)
        first = begin(model, context, alone, seeds)[:, 0]
    size = sampling.image_size // model.vae.config.downscale
    shape = len(seeds), chain.num_frames, model.unet.config.out_channels, size, size
    latents, known = torch.zeros(shape, device=context.device), ()
    if first is not None:
        latents[:, 0], known = first, (0,)
    # The text decides what this window shows, as in sample.py. Later ones follow the known frames.
    how = Guidance(sampling.num_steps, text_scale=sampling.guidance_scale,
                   max_snr=sampling.guidance_max_snr, power=sampling.timestep_power)
    return draw(model, context, latents, known, chain.frame_rate, seeds_of(seeds, 0), how)


def follow(model, context, chain, seeds, latents):
    """Yield the frames (b, n, c, h, w) that follow the last ones of `latents`, without end."""
    for window in itertools.count(1):
        last = latents[:, -chain.num_known :]
        b, known, *shape = last.shape
        new = last.new_zeros(b, chain.num_frames - known, *shape)
        latents = draw(model, context, torch.cat([last, new], dim=1), range(known),
                       chain.frame_rate, seeds_of(seeds, window), chain.how)
        yield latents[:, known:]


def fill(model, context, chain, seeds, windows, between=BETWEEN):
    """Yield the frames of windows of key frames (b, n, c, h, w), with `between` new ones per gap.

    Each window begins with the last key frame of the window before, which is not yielded again.
    chain.frame_rate is the rate of all frames.
    """
    step = between + 1
    for window, keys in enumerate(windows, 2**19):  # not the seeds of key frames
        b, n, *shape = keys.shape
        latents = keys.new_zeros(b, (n - 1) * step + 1, *shape)
        latents[:, ::step] = keys
        known = range(0, latents.shape[1], step)
        yield draw(model, context, latents, known, chain.frame_rate, seeds_of(seeds, window),
                   chain.how)[:, 1:]


def interpolate(model, context, chain, seeds, keys, between):
    """Yield the frames of keys (b, t, c, h, w), and `between` new ones between any two of them."""
    gaps = max(1, WINDOW // (between + 1))  # so that a window has about 9 frames, as in training
    windows = (keys[:, i : i + gaps + 1] for i in range(0, keys.shape[1] - 1, gaps))
    yield keys[:, :1]
    yield from fill(model, context, chain, seeds, windows, between)


def in_threes(keys, more):
    """Yield windows of 3 key frames, first of `keys` (b, n, c, h, w), then of the stream `more`."""
    while True:
        while keys.shape[1] < 3:
            keys = torch.cat([keys, next(more)], dim=1)
        yield keys[:, :3]
        keys = keys[:, 2:]


def long_latents(model, contexts, chain, seeds, first=None, clip=None):
    """Yield the latents (b, n, c, h, w) of clips without end.

    contexts are the encoded texts of the first window and of all others. The clips begin
    with the frame `first` (b, c, h, w) or with `clip` (b, t, c, h, w), if given.
    """
    context, later = contexts
    if not chain.key_frames:
        clip = begin(model, context, chain, seeds, first) if clip is None else clip
        yield clip
        yield from follow(model, later, chain, seeds, clip)  # never ends
    sparse = dataclasses.replace(chain, frame_rate=chain.frame_rate / (BETWEEN + 1))
    window = dataclasses.replace(sparse, num_frames=chain.key_frames)
    keys = begin(model, context, window, seeds, first)
    yield keys[:, :1]
    more = follow(model, later, sparse, seeds, keys)
    yield from fill(model, later, chain, seeds, in_threes(keys, more))
