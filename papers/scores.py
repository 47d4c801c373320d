"""Scores of a model for known frames, on BouncingShapes, where the truth is known."""

import dataclasses
import time

import numpy as np
import torch

from evaluate import agreement, choose_prompts, real_clips
from papers.bouncing import BASE_FRAMES, BouncingShapes, laws, plain_caption, track
from papers.chains import BETWEEN, WINDOW, Chain, begin, long_latents
from papers.known_frames import Guidance, draw
from shapes import caption_of
from vae import encode_clip

NUM_CLIPS = 64  # clips per measure, except the long clips


def window_error(model, known, num_frames, seed, how):
    """Mean error (along, across the motion), in pixels, of unknown frames beside real known ones.

    Frames without a shape are left out, here and in speed_ratio().
    """
    sampling = model.sampling
    data = BouncingShapes(NUM_CLIPS, 50 + num_frames, sampling.image_size, seed)
    starts = [7 * i % 50 for i in range(NUM_CLIPS)]  # so that some windows have a bounce
    latents = torch.stack([encode_clip(model.vae, data[i][0][s : s + num_frames])
                           for i, s in enumerate(starts)])
    context = model.encode_text([plain_caption(caption) for caption in data.captions])
    drawn = draw(model, context, latents, known, sampling.frames_per_second,
                 range(seed, seed + NUM_CLIPS), how)
    errors = []
    for i, clip in enumerate(model.decode(drawn)):
        _, shape, direction = data.combinations[i]
        truth = data.centres(i)[1][starts[i] : starts[i] + num_frames]
        error = np.delete(np.abs(track(clip, shape).centres - truth), known, axis=0)
        errors.append(error if direction in ("left", "right") else error[:, ::-1])
    return [float(x) for x in np.nanmean(np.concatenate(errors), 0)]


def speed_ratio(model, factor, seed):
    """Mean speed of clips drawn at 1 / factor of the frame rate, relative to real ones."""
    data = BouncingShapes(NUM_CLIPS, BASE_FRAMES, model.sampling.image_size, seed, step=factor)
    chain = Chain(BASE_FRAMES, frame_rate=model.sampling.frames_per_second / factor)
    seeds = range(seed, seed + NUM_CLIPS)
    drawn = model.decode(begin(model, model.encode_text(data.captions), chain, seeds))
    paths = [track(clip, shape).centres
             for clip, (_, shape, _) in zip(drawn, data.combinations, strict=True)]
    real = [data.centres(i)[1] for i in range(NUM_CLIPS)]
    steps, real_steps = (np.linalg.norm(np.diff(x, axis=1), axis=2) for x in (paths, real))
    return float(np.nanmean(steps) / np.mean(real_steps))


def first_windows(model, chain, seed, image):
    """Percentage of first windows that are right in everything.

    With `image` they continue a real first frame, and only their direction counts.
    """
    prompts, first = choose_prompts(NUM_CLIPS), None
    if image:
        real = real_clips(NUM_CLIPS, chain.num_frames, model.sampling.image_size, seed, prompts)
        first = encode_clip(model.vae, 127.5 * (real[:, 0] + 1))
    context = model.encode_text([caption_of(*prompt) for prompt in prompts])
    drawn = begin(model, context, chain, range(seed, seed + NUM_CLIPS), first)
    right = agreement(model.decode(drawn), prompts)
    return 100 * float(right[:, 2].mean() if image else right.all(1).mean())


def key_frames_right(model, chain, seed, num_key_frames=16):
    """Percentage of clips of key frames, with 3 between, that are right in everything.

    The first 8 frames count for the direction, every single key frame for colour and shape.
    """
    prompts, t = choose_prompts(NUM_CLIPS), BASE_FRAMES
    sparse = dataclasses.replace(chain, key_frames=num_key_frames, how=Guidance())
    clips, _ = long_clips(model, sparse, prompts, seed, (num_key_frames - 1) * (BETWEEN + 1) + 1)
    right = agreement(clips[:, :t], prompts)
    for i in range(0, clips.shape[1], BETWEEN + 1):  # the direction changes with a bounce
        right[:, :2] &= agreement(clips[:, i : i + 1], prompts)[:, :2]
    return 100 * float(right.all(1).mean())


def long_clips(model, chain, prompts, seed, num_frames):
    """Long clips (b, num_frames, 3, h, w) of combinations, and the CPU seconds for each."""
    texts = [caption_of(*prompt) for prompt in prompts]
    contexts = [model.encode_text(each) for each in (texts, [*map(plain_caption, texts)])]
    seeds, started, parts, count = range(seed, seed + len(prompts)), time.process_time(), [], 0
    for latents in long_latents(model, contexts, chain, seeds):
        parts.append(model.decode(latents))
        count += latents.shape[1]
        if count >= num_frames:
            break
    seconds = (time.process_time() - started) / len(prompts)
    return torch.cat(parts, dim=1)[:, :num_frames], seconds


def summary(results):
    """The mean of the laws() of several clips, with the slowest and the fastest mean speed."""
    mean = {name: np.nanmean([result[name] for result in results], axis=0) for name in results[0]}
    speed = mean.pop("speed")
    mean |= {"speed, slowest 50 frames": speed.min(), "speed, fastest 50 frames": speed.max()}
    return {name: float(value) for name, value in mean.items()}


def evaluate(model, chain, num_clips, num_frames, seed):
    """{measure: number} of long clips, and of single windows, key frames and frame rates."""
    prompts = choose_prompts(num_clips)
    clips, seconds = long_clips(model, chain, prompts, seed, num_frames)
    joints = chain.num_frames, chain.num_frames - chain.num_known
    result = summary([laws(clip, prompt, joints)
                      for clip, prompt in zip(clips, prompts, strict=True)])
    result["CPU seconds per 1,000 frames"] = seconds * 1000 / num_frames
    along, across = window_error(model, range(chain.num_known), chain.num_frames, seed, chain.how)
    result |= {"prediction: error along, px": along, "prediction: error across, px": across}
    errors = window_error(model, range(0, WINDOW + 1, BETWEEN + 1), WINDOW + 1, seed, chain.how)
    result["interpolation: error, px"] = max(errors)
    result["text-to-video, all right, %"] = first_windows(model, chain, seed, image=False)
    result["image-to-video, direction right, %"] = first_windows(model, chain, seed, image=True)
    result["key frames, all right, %"] = key_frames_right(model, chain, seed)
    for factor in (0.5, 1, 2, 4):
        result[f"speed at {factor:g} times, over asked"] = speed_ratio(model, factor, seed)
    return result
