"""Training for known frames: the tasks of LVDM and MagicVideo, learnt by one U-Net.

    decoder   the autoencoder's decoder learns the frames of the long clips, from latents with
              noise: a sampler's are not as exact as an encoder's. Encoder and latents stay.
    long      a step draws a task: which frames are known, how far frames are apart, how much noise
              the known ones get. The loss is that of train.py on the frames that are not known.

papers/long_video.py has the command.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import processes
import weights
from cache import cache_latents, cache_texts
from cli import option
from data import ClipFolder, random_window
from devices import freeze
from options import LoopOptions, TrainOptions
from papers.bouncing import BouncingShapes, plain_caption
from papers.chains import BETWEEN
from papers.known_frames import known_frames_loss, perturb, widen
from papers.runs import PaperRun
from run import read_record
from train import drop_captions, random_timesteps, reconstruction_error
from trainer import Trainer

DECODED = 16  # frames of a clip that the decoder learns from,
FRAMES = 8192  # and of all clips
MOTION_WEIGHT = TrainOptions().motion_weight  # of what moves, in the decoder's loss


@dataclass(frozen=True)
class LongOptions(LoopOptions):
    """The options of a training for known frames."""

    init: str = option("runs/demo", "the run with the video model to start from")
    data: str = option("shapes", "`shapes` for BouncingShapes, or a folder of captioned clips")
    num_clips: int = option(384, "clips of BouncingShapes")
    clip_frames: int = option(128, "frames of such a clip, two for each of the video model's")
    decoder_steps: int = option(250, "steps of the decoder; 0: it stays")
    decoder_batch_size: int = option(32, "frames a step")
    decoder_learning_rate: float = option(1e-3, "learning rate of the decoder")
    decoder_noise: float = option(0.3, "largest deviation of the noise on its latents")
    long_steps: int = option(6000, "steps of the U-Net")
    long_batch_size: int = option(8, "windows a step")
    long_learning_rate: float = option(2e-3, "learning rate of the U-Net")
    guidance_scale: float = option(1.25, "guidance by the text, in first windows and key frames")
    num_known: int = option(3, "known frames of a window that continues a clip")
    max_level: int = option(0, "largest noise level s of known frames, of 1000")
    clean_part: float = option(0.5, "part of the windows whose known frames have no noise")
    hold: bool = option(True, "show each frame its nearest known frames; off: LVDM's mask alone")
    loss_on_known: bool = option(False, "known frames count in the loss, as in LVDM's public code")
    plain_captions: bool = option(True, "later windows of shapes have captions without direction")
    caption_dropout: float = option(0.1, "part of the captions left out, for guidance")
    num_frames: int = option(8, "frames of a window")

    def __post_init__(self):
        super().__post_init__()
        if self.num_known >= self.num_frames:
            raise ValueError(f"--num-known needs to be < --num-frames {self.num_frames}, got "
                             f"{self.num_known}")
        if self.max_level >= 1000:
            raise ValueError(f"--max-level needs to be < 1000, got {self.max_level}")


class LongRun(PaperRun):
    """The folder of such a training, with a record of its own."""

    record, stages, options_type = "long_video.json", ("decoder", "long"), LongOptions


@dataclass(frozen=True)
class Task:
    """A choice of known frames. Strides are in frames of the data.

    Some windows start where their clip starts, since only there its caption says what happens.
    """

    share: float  # of the steps
    num_frames: int
    known: tuple[int, ...]
    strides: tuple[int, ...]
    at_start: bool = False
    batch_part: float = 1.0
    # Frames beside several known ones are all but determined, so one step from pure noise draws
    # them: training is about that step. What a text or one frame leaves open takes all timesteps.
    prefer_noise: float = 30.0


def tasks_of(options, base, longest):
    """{name: Task} of the windows that clips of at most `longest` frames have room for.

    base: the stride that belongs to the frame rate of the video model. Raises ValueError if there
    is no room for prediction at that rate.
    """
    t, rates = options.num_frames, [base // 2, base, 2 * base, 4 * base]
    rates = tuple(stride for stride in rates if stride)
    # Motion takes longest to learn, so nearly half of the steps are prediction. They cannot come
    # first: a U-Net that learns prediction alone forgets what a text means.
    at_base, of_text = (base,) * 5 + rates[-1:], (*rates[:1] * 2, *(base,) * 3, *rates[-2:])
    between = tuple(range(0, t + 1, BETWEEN + 1))
    tasks = {
        "prediction": Task(0.47, t, tuple(range(options.num_known)), at_base),
        "text": Task(0.22, t, (), of_text, at_start=True, prefer_noise=1.0),
        "first frame": Task(0.06, t, (0,), of_text, at_start=True, prefer_noise=1.0),
        "interpolation": Task(0.09, t + 1, between, rates[:2]),
        "every other": Task(0.03, t + 1, tuple(range(0, t + 1, 2)), rates[:2]),
        "key frames": Task(0.13, 2 * t, (), rates[-2:], at_start=True, batch_part=0.5,
                           prefer_noise=1.0),
    }
    needed = (t - 1) * base + 1
    if longest < needed:
        raise ValueError(f"--num-frames {t} needs a clip of >= {needed} frames, the longest has "
                         f"{longest}; lower it or add longer clips")
    tasks = {name: dataclasses.replace(task, strides=tuple(
        stride for stride in task.strides if (task.num_frames - 1) * stride < longest
    )) for name, task in tasks.items()}
    return {name: task for name, task in tasks.items() if task.strides}


def open_clips(options, sampling):
    """(clips uint8 (t, 3, h, w) with captions, the stride of the video model's frame rate)."""
    size = sampling.image_size
    if options.data == "shapes":  # two frames where the video model has one: for half its speed
        return BouncingShapes(options.num_clips, options.clip_frames, size, options.seed,
                              step=0.5), 2
    known = (Path(options.init) / "train.json").exists()
    old = read_record(options.init)[0] if known else TrainOptions()  # its pace is the model's
    return ClipFolder(options.data, options.num_frames, size, old.stride, old.frame_rate,
                      old.max_frames), 1


def random_windows(num_frames, at_start, stride, latents, lengths, count, generator):
    """Windows x0 (b, t, c, h, w) of so many frames, and which clips they are of.

    lengths are the numbers of frames of all clips.
    """
    span = (num_frames - 1) * stride + 1
    long_enough = [i for i, length in enumerate(lengths) if length >= span]
    chosen = torch.randint(len(long_enough), (count,), generator=generator).tolist()
    chosen = [long_enough[i] for i in chosen]
    starts = [0 if at_start else random_window(len(latents[i]), span, generator) for i in chosen]
    return torch.stack([latents[i][s : s + span : stride]
                        for i, s in zip(chosen, starts, strict=True)]), chosen


def train_decoder(run, autoencoder, clips, latents):
    """Stage one: some frames of clips from their latents (t, c, h/f, w/f) with noise."""
    options, b, some = run.options, run.options.decoder_batch_size, []
    for i in range(0, len(clips), -(-len(clips) * DECODED // FRAMES)):
        frames, z = clips[i][0], latents[i]
        every = -(-len(frames) // DECODED)
        some.append((frames[::every], z[::every]))
    frames, latents = map(torch.cat, zip(*some, strict=True))  # n 3 h w, n c h/f w/f
    autoencoder.to(run.device, memory_format=torch.channels_last)
    autoencoder.requires_grad_(False).decoder.requires_grad_(True)
    trainer = Trainer(run, "decoder", [(autoencoder.decoder.parameters(), 1.0)])
    decoder = trainer.wrap(autoencoder.decoder)
    for _, generator in trainer.steps():
        chosen = torch.randint(len(frames), (b,), generator=generator)
        deviation = options.decoder_noise * torch.rand(b, 1, 1, 1, generator=generator)
        noise = deviation * torch.randn(b, *latents.shape[1:], generator=generator)
        x, z, noise = run.to_device(frames[chosen], latents[chosen], noise)
        x, z = x.to(z) / 127.5 - 1, (z + noise) / autoencoder.config.scaling_factor
        with run.precision():
            decoded = decoder(autoencoder.post_quant_conv(z))
            loss = reconstruction_error(decoded, x, MOTION_WEIGHT)
        trainer.backward(loss)
    run.save(vae=autoencoder)
    run.finish("decoder")


def train_unet(run, unet, diffusion, tasks, windows_of, context_of, frame_rate):
    """Stage two: each step draws a task, and how much noise the known frames get.

    windows_of(task, stride, count, generator) are windows x0 (b, t, c, h, w) and their texts;
    frame_rate is that of the data.
    """
    options, shares = run.options, torch.tensor([task.share for task in tasks])
    trainer = Trainer(run, "long", [(unet.parameters(), 1.0)])
    net = trainer.wrap(unet)
    for _, generator in trainer.steps():
        task = tasks[torch.multinomial(shares, 1, generator=generator)]
        stride = task.strides[torch.randint(len(task.strides), (), generator=generator)]
        t, b = task.num_frames, max(1, round(options.long_batch_size * task.batch_part))
        x0, texts = windows_of(task, stride, b, generator)
        context = context_of(drop_captions(texts, options.caption_dropout, generator))  # b n d
        noise, noise_of_known = torch.randn(2, *x0.shape, generator=generator)
        timesteps = random_timesteps(b, diffusion.num_train_timesteps, generator,
                                     prefer_noise=task.prefer_noise)
        known = torch.zeros(t, dtype=torch.bool)
        known[list(task.known)] = True
        levels = torch.randint(options.max_level + 1, (b,), generator=generator)
        clean = torch.rand(b, generator=generator) < options.clean_part
        levels = levels.masked_fill(clean | ~known.any(), 0)
        conditions = torch.stack([levels.float(), torch.full((b,), frame_rate / stride)], 1)
        x0, noise, noise_of_known, timesteps, context, levels, conditions = run.to_device(
            x0, noise, noise_of_known, timesteps, context, levels, conditions)
        with run.precision():
            seen = perturb(diffusion, x0, levels, noise_of_known)
            loss = known_frames_loss(net, diffusion, x0, noise, timesteps, context, seen, known,
                                     conditions, options.hold, options.loss_on_known)
        trainer.backward(loss)


def train(run):
    """Train a model for known frames, from a video model."""
    options, model = run.options, weights.load_pipeline(run.options.init)
    if model.unet.config.num_conditions:
        raise ValueError(f"--init {options.init}: is a model for known frames already; name the "
                         "run of the video model")
    # The decoder learns in a copy, in float32; the frozen networks may be bfloat16.
    autoencoder = weights.load_vae(run.path / "vae") if run.finished else copy.deepcopy(model.vae)
    for network in (model.vae.to(memory_format=torch.channels_last), model.text_encoder):
        freeze(network, run.device, options.precision)
    sampling = dataclasses.replace(model.sampling, guidance_scale=options.guidance_scale)
    # What may be refused, texts and room for windows, comes before the first training.
    clips, base = open_clips(options, sampling)
    captions = later = clips.captions
    if options.data == "shapes" and options.plain_captions:
        later = [plain_caption(caption) for caption in captions]
    context_of = cache_texts(run, [*captions, *later], model)
    latents = cache_latents(run, clips, model.vae)
    lengths = [len(clip) for clip in latents]
    tasks = list(tasks_of(options, base, max(lengths)).values())

    def windows_of(task, stride, count, generator):
        x0, chosen = random_windows(task.num_frames, task.at_start, stride, latents, lengths,
                                    count, generator)
        return x0, [(captions if task.at_start else later)[i] for i in chosen]

    if options.decoder_steps and not run.finished:
        train_decoder(run, autoencoder, clips, latents)
    unet = widen(model.unet, options.hold, 2 * options.num_frames)
    unet.to(run.device, memory_format=torch.channels_last)
    train_unet(run, unet, model.diffusion, tasks, windows_of, context_of,
               base * sampling.frames_per_second)
    if processes.is_main():
        model = dataclasses.replace(model, unet=unet, vae=autoencoder, sampling=sampling)
        weights.save_pipeline(model, run.path)
    run.finish("long")
