"""Training for known frames: one U-Net learns the tasks of LVDM and MagicVideo.

    decoder   The autoencoder's decoder learns the frames of the long clips, from latents with noise
              because a sampler's latents are not as exact as an encoder's. The encoder stays.
    long      Each step draws a task: which frames are known, how far apart the frames are, and how
              much noise the known ones get. The loss covers the other frames.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import weights
from papers.bouncing import BouncingShapes, plain_caption
from papers.chains import BETWEEN, WINDOW
from papers.known_frames import known_frames_loss, perturb, widen
from support.cli import option
from support.devices import freeze
from train import (CAPTION_DROPOUT, drop_captions, random_timesteps, random_window,
                   reconstruction_error)
from trainer import Trainer
from training.cache import cache_frames, cache_latents, cache_texts
from training.data import ClipFolder
from training.options import LoopOptions, TrainOptions, read_record

# Largest standard deviation of the noise on the decoder's latents, whose own deviation is 1
DECODER_NOISE = 0.3
MOTION_WEIGHT = TrainOptions().motion_weight  # additional weight of moving pixels, as in train.py
CLEAN_PART = 0.5  # fraction of the windows whose known frames get no noise
# Preference for noisy timesteps, by Task.by_text. Several known frames almost determine the others,
# so a sampler draws these in one step from pure noise, and training prefers that step. A text or
# one frame leaves more open and needs all timesteps.
PREFER_NOISE = {True: 1.0, False: 30.0}
LARGE = 10**8  # parameters above which a U-Net on a CPU computes activations twice, to save memory


@dataclass(frozen=True)
class LongOptions(LoopOptions):
    """The options of a training for known frames."""

    record, stages = "long_video.json", ("decoder", "long")

    init: str = option("runs/demo", "run of train.py with the video model to start from")
    data: str = option("shapes", "`shapes` for BouncingShapes, or a folder of captioned clips")
    num_clips: int = option(384, "clips of BouncingShapes", low=1, high=10**6)
    clip_frames: int = option(128, "frames of a clip of BouncingShapes, at twice the frame rate")
    decoder_steps: int = option(250, "steps of the decoder stage; 0: keep the decoder")
    decoder_batch_size: int = option(32, "frames per step", low=1)
    decoder_learning_rate: float = option(1e-3, "learning rate of the decoder stage")
    long_steps: int = option(12000, "steps of the long stage", low=1)
    long_batch_size: int = option(8, "windows per step", low=1)
    long_learning_rate: float = option(2e-3, "learning rate of the long stage")
    num_frames: int = option(8, "frames of a window", low=2)
    num_known: int = option(3, "known frames of a window that continues a clip", low=1)
    max_level: int = option(0, "largest noise level of known frames, a timestep", high=999)
    hold: bool = option(True, "show each frame its nearest known frames; off: LVDM's mask alone")
    guidance_scale: float = option(1.5, "weight of the text in first windows and key frames")

    def __post_init__(self):
        longest = self.clip_frames // 2 if self.data == "shapes" else self.num_frames
        if not self.num_known < self.num_frames <= longest:
            raise ValueError("needs --num-known < --num-frames <= --clip-frames / 2, got "
                             f"{self.num_known}, {self.num_frames} and {self.clip_frames}")

    def unused(self):
        clips = ["num_clips", "clip_frames"] * (self.data != "shapes")
        steps = ["decoder_batch_size", "decoder_learning_rate"] * (not self.decoder_steps)
        return (dict.fromkeys(clips, "all clips of a folder are used")
                | dict.fromkeys(steps, "--decoder-steps 0 keeps the decoder"))


@dataclass(frozen=True)
class Task:
    """A choice of known frames. Strides are in frames of the data."""

    share: float  # fraction of the steps
    num_frames: int
    known: tuple[int, ...]
    strides: tuple[int, ...]
    # The text decides what the window shows. It starts where its clip starts, because only there
    # the caption names the direction.
    by_text: bool = False


def tasks_of(options, base, longest):
    """{name: Task} of the windows that fit into clips of at most `longest` frames.

    base is the stride that belongs to the video model's frame rate.
    """
    def fitting(strides, num_frames):
        return [stride for stride in strides if 0 < (num_frames - 1) * stride < longest]

    t, half, double, fast = options.num_frames, base // 2, 2 * base, 4 * base  # half may be 0
    # Prediction is not trained first, because a U-Net that learns it alone forgets what a text
    # means. Key frames need many steps, because things move far between them. A sampler draws the
    # first frame as an image; whole windows from the text alone serve LVDM's guidance.
    rates = fitting([half, base, double, fast], t)
    between = fitting([half, base], t + 1)
    tasks = {
        "prediction": Task(0.38, t, range(options.num_known), fitting([base] * 5 + [fast], t)),
        "text": Task(0.03, t, (), rates, by_text=True),
        "first image": Task(0.05, 1, (), [base], by_text=True),  # at the rate that begin() names
        "first frame": Task(0.14, t, (0,), rates, by_text=True),
        "interpolation": Task(0.09, t + 1, range(0, t + 1, BETWEEN + 1), between),
        "every other": Task(0.02, t + 1, range(0, t + 1, 2), between),
        "key frames": Task(0.29, 2 * t, (0,), fitting([double, fast], 2 * t), by_text=True),
    }
    return {name: task for name, task in tasks.items() if task.strides}


def open_clips(options, image_size):
    """(clips uint8 (t, 3, h, w) with captions, the stride of the video model's frame rate)."""
    if options.data == "shapes":  # half a step per frame, so that stride 1 is half the speed
        return BouncingShapes(options.num_clips, options.clip_frames, image_size, options.seed,
                              step=0.5), 2
    is_run = (Path(options.init) / TrainOptions.record).exists()
    old = read_record(options.init)[0] if is_run else TrainOptions()  # clips as the run read them
    return ClipFolder(options.data, options.num_frames, image_size, old.stride, old.frame_rate,
                      old.max_frames), 1


def random_windows(task, stride, latents, count, generator):
    """Windows x0 (b, t, c, h, w) of a task, and the indices of their clips."""
    span = (task.num_frames - 1) * stride + 1
    long_enough = [i for i, clip in enumerate(latents) if len(clip) >= span]
    numbers = torch.randint(len(long_enough), (count,), generator=generator).tolist()
    windows, chosen = [], [long_enough[i] for i in numbers]
    for i in chosen:
        start = 0 if task.by_text else random_window(len(latents[i]), span, generator)
        windows.append(latents[i][start : start + span : stride])
    return torch.stack(windows), chosen


def train_decoder(run, autoencoder, frames, latents):
    """Stage one: all frames uint8 (n, 3, h, w), from their latents (n, c, h/f, w/f) with noise."""
    b = run.options.decoder_batch_size
    autoencoder.to(run.device, memory_format=run.layout)
    autoencoder.requires_grad_(False).decoder.requires_grad_(True)
    trainer = Trainer(run, "decoder", [(autoencoder.decoder.parameters(), 1.0)])
    decoder = trainer.wrap(autoencoder.decoder)
    for _, generator in trainer.steps():
        chosen = torch.randint(len(frames), (b,), generator=generator)
        deviation = DECODER_NOISE * torch.rand(b, 1, 1, 1, generator=generator)
        noise = deviation * torch.randn(b, *latents.shape[1:], generator=generator)
        x, z, noise = run.to_device(frames[chosen], latents[chosen], noise)
        x, z = x.to(z) / 127.5 - 1, (z + noise) / autoencoder.config.scaling_factor
        with run.precision():
            decoded = decoder(autoencoder.post_quant_conv(z))
            loss = reconstruction_error(decoded, x, MOTION_WEIGHT)
        trainer.backward(loss)


def train_unet(run, unet, diffusion, tasks, latents, captions, context_of, frame_rate):
    """Stage two: each step draws a task, a stride, and the noise of the known frames.

    latents has one (t, c, h/f, w/f) per clip, captions are {Task.by_text: a text per clip}, and
    frame_rate is the rate of the data.
    """
    options, shares = run.options, torch.tensor([task.share for task in tasks])
    trainer = Trainer(run, "long", [(unet.parameters(), 1.0)])
    net = trainer.wrap(unet)
    for _, generator in trainer.steps():
        task = tasks[torch.multinomial(shares, 1, generator=generator)]
        stride = task.strides[torch.randint(len(task.strides), (), generator=generator)]
        b = max(1, options.long_batch_size * options.num_frames // task.num_frames)
        x0, chosen = random_windows(task, stride, latents, b, generator)  # b t c h w
        texts = [captions[task.by_text][i] for i in chosen]
        context = context_of(drop_captions(texts, CAPTION_DROPOUT, generator))  # b n d
        noise, noise_of_known = torch.randn(2, *x0.shape, generator=generator)
        timesteps = random_timesteps(b, diffusion.num_train_timesteps, generator,
                                     PREFER_NOISE[task.by_text])
        levels = torch.randint(options.max_level + 1, (b,), generator=generator)
        clean = torch.rand(b, generator=generator) < (CLEAN_PART if task.known else 1)
        levels = levels.masked_fill(clean, 0)
        numbers = torch.stack([timesteps, levels, torch.full((b,), frame_rate / stride)], 1)  # b 3
        x0, noise, noise_of_known, numbers, context, levels = run.to_device(
            x0, noise, noise_of_known, numbers, context, levels)
        with run.precision():
            seen = perturb(diffusion, x0, levels, noise_of_known)
            loss = known_frames_loss(net, diffusion, x0, noise, numbers, context, seen,
                                     task.known, options.hold)
        trainer.backward(loss)


def train(run):
    """Train a model for known frames, from a video model."""
    options, model = run.options, weights.load_pipeline(run.options.init)
    # The decoder learns in a copy, in float32, because the frozen networks may be bfloat16.
    autoencoder = weights.load_vae(run.path / "vae") if run.finished else copy.deepcopy(model.vae)
    for network in (model.vae.to(memory_format=torch.channels_last), model.text_encoder):
        freeze(network, run.device, options.precision)
    sampling = dataclasses.replace(model.sampling, guidance_scale=options.guidance_scale)
    clips, base = open_clips(options, sampling.image_size)
    captions = {True: clips.captions, False: clips.captions}
    if options.data == "shapes":
        captions[False] = [plain_caption(caption) for caption in clips.captions]
    context_of = cache_texts(run, [*captions[True], *captions[False]], model)
    cache = cache_latents(run, clips, model.vae)
    latents = list(cache)
    tasks = list(tasks_of(options, base, max(map(len, latents))).values())
    if not run.finished:
        if options.decoder_steps:
            train_decoder(run, autoencoder, cache_frames(run, clips).rows, cache.rows)
        run.save(vae=autoencoder)
        run.finish("decoder")
    torch.manual_seed(options.seed)  # for new weights
    unet = widen(model.unet, options.hold, max(2 * options.num_frames, WINDOW + 1))
    unet.to(run.device, memory_format=run.layout)
    large = sum(parameter.numel() for parameter in unet.parameters()) > LARGE
    unet.gradient_checkpointing = large and run.device.type != "cuda"
    train_unet(run, unet, model.diffusion, tasks, latents, captions, context_of,
               base * sampling.frames_per_second)
    run.save(unet=unet, vae=autoencoder, text=(model.text_encoder, model.tokenizer),
             schedule=(model.diffusion, sampling))
    run.finish("long")
