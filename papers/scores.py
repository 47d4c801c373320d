"""How good a model for known frames is, on BouncingShapes, where the truth is known.

`evaluate` draws clips from text alone, makes them long, and measures whether they keep the laws of
their first frames; then single windows against real clips, key frames, and frame rates.
"""

import time

import numpy as np
import torch

from evaluate import agreement, choose_prompts
from metrics import real_clips
from papers.bouncing import BASE_FRAMES, BouncingShapes, laws, plain_caption, track
from papers.chains import BETWEEN, Chain, begin, long_latents
from papers.key_frames import interpolate
from papers.known_frames import Guidance, draw
from shapes import caption_of
from vae import encode_clip


def window_error(model, known, num_frames, seed, how=Guidance(), num_clips=64):
    """Mean error (along, across the motion), in pixels, of frames drawn beside real ones.

    Of frames without a shape there is none; here and in speed_ratio the mean is of the others.
    """
    rate, size = model.sampling.frames_per_second, model.sampling.image_size
    data = BouncingShapes(num_clips, 50 + num_frames, size, seed)
    starts = [7 * i % 50 for i in range(num_clips)]  # so that some windows have a bounce
    latents = torch.stack([encode_clip(model.vae, data[i][0][s : s + num_frames])
                           for i, s in enumerate(starts)])
    mask = torch.zeros(num_frames, dtype=torch.bool)
    mask[known] = True
    context = model.encode_text([plain_caption(caption) for caption in data.captions])
    drawn = draw(model, context, latents, mask, rate, range(seed, seed + num_clips), how)
    errors = []
    for i, clip in enumerate(model.decode(drawn)):
        truth = data.centres(i)[1][starts[i] : starts[i] + num_frames]
        axis = 0 if data.combinations[i][2] in ("left", "right") else 1
        seen = track(clip, data.combinations[i][1]).centres
        error = np.abs(seen - truth)[~mask.numpy()]  # unknown frames, 2
        errors.append(error[:, [axis, 1 - axis]])
    return [float(x) for x in np.nanmean(np.concatenate(errors), 0)]


def speed_ratio(model, factor, seed, num_clips=64):
    """Mean speed of clips drawn at 1 / factor of the frame rate, over that of real ones."""
    data = BouncingShapes(num_clips, BASE_FRAMES, model.sampling.image_size, seed, step=factor)
    chain = Chain(BASE_FRAMES, frame_rate=model.sampling.frames_per_second / factor)
    drawn = model.decode(begin(model, model.encode_text(data.captions), chain,
                               range(seed, seed + num_clips), latent_size(model)))
    steps = [np.linalg.norm(np.diff(track(clip, shape).centres, axis=0), axis=1)
             for clip, (_, shape, _) in zip(drawn, data.combinations, strict=True)]
    real = [np.linalg.norm(np.diff(data.centres(i)[1], axis=0), axis=1).mean()
            for i in range(num_clips)]
    return float(np.nanmean(steps) / np.mean(real))


def latent_size(model):
    """Height and width of a model's latents."""
    return model.sampling.image_size // model.vae.config.downscale


def first_windows(model, chain, seed, num_clips, image=False):
    """Percent of first windows that are right in all; beside a known image, in direction."""
    prompts, size = choose_prompts(num_clips), model.sampling.image_size
    texts = [caption_of(*prompt) for prompt in prompts]
    first = None
    if image:
        real = real_clips(num_clips, chain.num_frames, size, seed, prompts)
        first = torch.stack([encode_clip(model.vae, 127.5 * (clip[:1] + 1))[0] for clip in real])
    drawn = begin(model, model.encode_text(texts), chain, range(seed, seed + num_clips),
                  latent_size(model), first)
    right = agreement(model.decode(drawn), prompts)
    return 100 * float(right[:, 2].mean() if image else right.all(1).mean())


def key_frames_right(model, seed, num_clips=64, num_key_frames=16):
    """Percent of clips of key frames with 3 between that are right in colour, shape, direction."""
    prompts, rate = choose_prompts(num_clips), model.sampling.frames_per_second
    context = model.encode_text([caption_of(*prompt) for prompt in prompts])
    size, seeds = latent_size(model), range(seed, seed + num_clips)
    sparse = Chain(num_key_frames, frame_rate=rate / (BETWEEN + 1))
    keys = begin(model, context, sparse, seeds, size)
    clips = model.decode(interpolate(model, context, keys, BETWEEN, rate, seeds))
    right = agreement(clips[:, :BASE_FRAMES], prompts)
    for begin_at in range(BASE_FRAMES, clips.shape[1] - BASE_FRAMES, BASE_FRAMES):
        part = clips[:, begin_at : begin_at + BASE_FRAMES]
        right[:, :2] &= agreement(part, prompts)[:, :2]  # the direction changes with a bounce
    return 100 * float(right.all(1).mean())


def long_clips(model, chain, prompts, seed, num_frames, hierarchical=False, plain=True):
    """Long clips (b, num_frames, 3, h, w) of combinations, and the CPU seconds for each."""
    texts = [caption_of(*prompt) for prompt in prompts]
    contexts = (model.encode_text(texts),
                model.encode_text([plain_caption(text) if plain else text for text in texts]))
    seeds, started, parts, count = range(seed, seed + len(prompts)), time.process_time(), [], 0
    for latents in long_latents(model, contexts, chain, seeds, latent_size(model), hierarchical):
        parts.append(model.decode(latents))
        count += latents.shape[1]
        if count >= num_frames:
            break
    seconds = (time.process_time() - started) / len(prompts)
    return torch.cat(parts, dim=1)[:, :num_frames], seconds


def summary(results):
    """The laws() of several clips as one: means over clips, at their end unless it says else."""
    # A clip without its shape is wrong in "right" and has size 0; speed, paint and drift are those
    # of the others.
    mean = {name: np.nanmean([result[name] for result in results], axis=0) for name in results[0]}
    size = np.nanmean([abs(result["size"][-1] - 1) for result in results])
    found = {
        "colour and shape right, %": 100 * mean["right"][-1], "size, change, %": 100 * size,
        "paint, change": mean["paint"], "speed, slowest 50 frames": mean["speed"].min(),
        "speed, fastest 50 frames": mean["speed"].max(), "turns over true": mean["turns"][-1],
        "turns away from walls, %": 100 * mean["mid_air"], "drift across, px": mean["drift"],
        "steps at joints over inside": mean.get("joints", np.nan),
    }
    return {name: float(value) for name, value in found.items()}


def evaluate(model, chain, num_clips, num_frames, seed, hierarchical=False, plain=True):
    """{what: number} of everything above."""
    prompts = choose_prompts(num_clips)
    clips, seconds = long_clips(model, chain, prompts, seed, num_frames, hierarchical, plain)
    joints = (chain.num_frames, chain.num_frames - chain.num_known)
    if hierarchical:
        joints = 1 + 2 * (BETWEEN + 1), 2 * (BETWEEN + 1)
    found = [laws(clip, prompt, joints) for clip, prompt in zip(clips, prompts, strict=True)]
    result = summary(found)
    result["CPU seconds a 1,000 frames"] = seconds * 1000 / num_frames
    along, across = window_error(model, range(chain.num_known), chain.num_frames, seed, chain.how)
    result |= {"prediction: error along, px": along, "prediction: error across, px": across}
    step = BETWEEN + 1
    along, across = window_error(model, range(0, 2 * step + 1, step), 2 * step + 1, seed,
                                 chain.how)
    result["interpolation: error, px"] = max(along, across)
    result["text-to-video, all right, %"] = first_windows(model, chain, seed, 64)
    result["image-to-video, direction right, %"] = first_windows(model, chain, seed, 64, image=True)
    result["key frames, all right, %"] = key_frames_right(model, seed)
    for factor in (0.5, 1, 2, 4):
        result[f"speed at {factor:g} times, over asked"] = speed_ratio(model, factor, seed)
    return result
