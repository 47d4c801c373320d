"""LVDM from nothing: the 3-D autoencoder, and text-to-video in its latents.

    python -m papers.video_autoencoder train runs/lvdm --data shapes       all three stages of
                                                        train.py; --stage vae: the autoencoder alone
    python -m papers.video_autoencoder train runs/lvdm --init runs/demo    its 2-D one, inflated
    python -m papers.video_autoencoder compare runs/demo runs/lvdm
    python -m papers.video_autoencoder sample runs/lvdm "a red circle moving left"
    python -m papers.video_autoencoder evaluate runs/lvdm

papers/autoencoder_3d.py has the network. The stages that follow are those of train.py, on latent
frames: what is an image there is a latent frame here, four frames long, so that the image stage
already sees motion. `--temporal attention` gives factorised space-time attention as in LVDM, but
with absolute positions; the default is the shift.

LVDM, He et al. 2022, sections 3.1 and 3.2.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import processes
import train
import vae
import weights
from cache import cache_frames, cache_latents
from cli import add_flags, check_ranges, choose_device, given_flags, option, run_main
from devices import freeze
from evaluate import agreement, choose_prompts, draw, print_table, rates
from files import read_json, require_room, write_json
from media.write import contact_sheet, require_writer, write_clip, write_samples
from memory import CLIP_BYTES, check_sampling, require_memory
from metrics import real_clips
from options import STAGES, TrainOptions
from papers.autoencoder_3d import (VideoAutoencoder, VideoVAEConfig, inflate, load_autoencoder,
                                   save_autoencoder)
from papers.fidelity import fidelity
from papers.runs import PaperRun
from pipeline import Pipeline
from run import open_data, read_record, stages_to_run
from sample import generate
from trainer import Trainer


@dataclass(frozen=True)
class VideoOptions(TrainOptions):
    """The options of train.py; a batch of the vae stage has clips, --init gives an autoencoder."""

    preset: str = option("tiny", "size of the networks", choices=("tiny", "small", "sd1", "sd2"))
    init: str | None = option(None, "a run whose autoencoder to start from: a 2-D one is inflated, "
                              "a 3-D one is kept as it is")
    latent_channels: int = option(4, "numbers of a latent at each place")
    time_factor: int = option(4, "frames that share a latent frame")
    vae_steps: int = option(300, "steps of the vae stage")
    vae_batch_size: int = option(4, "clips a step")
    vae_learning_rate: float = option(1e-3, "learning rate of the vae stage")
    kl_weight: float = option(1e-3, "weight of the pull of latents towards N(0, 1)")
    short_part: float = option(0.0, "part of the vae steps, the first, that see windows of one "
                               "latent frame")
    image_steps: int = option(650, "steps of the image stage")
    video_steps: int = option(1200, "steps of the video stage")
    video_batch_size: int = option(16, "clips a step")

    def __post_init__(self):
        super().__post_init__()
        if self.init is not None:  # it gives no more than the autoencoder
            self.check_shapes()
        if self.merges is not None:
            raise ValueError("--merges is of no use here: the tokenizer is always trained; leave "
                             "it out")
        if self.num_frames % self.time_factor:
            raise ValueError(f"--num-frames needs a multiple of --time-factor {self.time_factor}, "
                             f"got {self.num_frames}")

    @property
    def latent_frames(self):
        return self.num_frames // self.time_factor

    def vae(self):
        values = dataclasses.asdict(super().vae())
        values |= {"latent_channels": self.latent_channels, "mid_block_add_attention": False}
        return VideoVAEConfig(**values, time_factor=self.time_factor)

    def unet(self):
        c = self.latent_channels
        return dataclasses.replace(super().unet(), in_channels=c, out_channels=c)


class VideoRun(PaperRun):
    """The folder of such a run; its vae/ holds a VideoAutoencoder."""

    record, options_type = "video_autoencoder.json", VideoOptions


class ClipPipeline(Pipeline):
    """A Pipeline in the latents of a VideoAutoencoder. `num_frames` are frames that are seen."""

    def sample(self, prompts, seeds, sampling=None):
        sampling = sampling or self.sampling
        latent_frames = -(-sampling.num_frames // self.vae.config.time_factor)  # rounded up
        yield from super().sample(prompts, seeds,
                                  dataclasses.replace(sampling, num_frames=latent_frames))


# Training


def start_autoencoder(options):
    """The autoencoder that the vae stage trains."""
    if options.init is None:
        return VideoAutoencoder(options.vae())
    start = weights.load_vae(Path(options.init) / "vae")
    return checked(inflate(start, options.latent_channels, options.time_factor), options)


def train_vae(run, clips):
    """The vae stage of train.py, on clips."""
    options, autoencoder = run.options, start_autoencoder(run.options)
    frames_of = cache_frames(run, clips)  # of each clip t 3 h w
    autoencoder.to(run.device, memory_format=torch.channels_last)
    config, k = autoencoder.config, options.time_factor
    size = options.image_size // config.downscale
    trainer = Trainer(run, "vae", [(autoencoder.parameters(), 1.0)])
    forward = trainer.wrap(autoencoder)

    def as_frames(frames, noise):  # the loss of train.py is about frames
        reconstruction, gaussian = forward(frames.unflatten(0, (len(noise), -1)), noise)
        return reconstruction.flatten(0, 1), gaussian

    for step, generator in trainer.steps():
        # From nothing, first more and shorter clips: what a frame looks like comes before time.
        t = k if step < options.short_part * options.vae_steps else options.num_frames
        b = options.vae_batch_size * options.num_frames // t
        x, _ = train.random_clips(frames_of, clips.captions, b, t, generator)  # b t 3 h w
        noise = torch.randn(b, t // k, config.latent_channels, size, size, generator=generator)
        x, noise = run.to_device(x, noise)
        frames = x.flatten(0, 1).float() / 127.5 - 1  # 0..255 -> -1..1
        with run.precision():
            loss = train.reconstruction_loss(as_frames, frames, noise, options.motion_weight,
                                             options.kl_weight)
        trainer.backward(loss)
    latents = train.some_latents(autoencoder, frames_of)
    vae.standardise(autoencoder, latents.to(run.device))
    keep_autoencoder(run, autoencoder)


def keep_autoencoder(run, autoencoder):
    """Write a run's autoencoder: its vae stage is finished."""
    if processes.is_main():
        save_autoencoder(run.path / "vae", autoencoder)
    run.finish("vae")


def train_run(args):
    """The command `train`."""
    run = VideoRun.open(args.run, given_flags(args, VideoOptions()), args.resume)
    options, stages = run.options, stages_to_run(args.run, args.stage, run.finished)
    if not stages:
        print(f"{args.run}: all stages are finished")
        return
    clips = open_data(options)
    for stage in stages:
        torch.manual_seed(options.seed)  # of new weights
        if stage == "vae" and options.init and is_3d(Path(options.init) / "vae"):
            keep_autoencoder(run, checked(load_autoencoder(Path(options.init) / "vae"), options))
            continue
        if stage == "vae":
            train_vae(run, clips)
            continue
        if stage == "image":
            autoencoder = load_autoencoder(run.path / "vae")
            freeze(autoencoder, run.device, options.precision)
            latents = cache_latents(run, clips, autoencoder)
            train.train_image(run, autoencoder, latents, clips.captions)
        else:
            image_model = load_model(run.path, "image_unet", "none")
            for network in (image_model.vae, image_model.text_encoder):  # its U-Net learns
                freeze(network, run.device, options.precision)
            latents = cache_latents(run, clips, image_model.vae)
            train.train_video(run, image_model, latents, clips.captions)


def is_3d(folder):
    """Whether the autoencoder in a folder is a 3-D one."""
    return "time_factor" in read_json(folder / "config.json")


def checked(autoencoder, options):
    """The autoencoder of --init. Raises ValueError if it is not what the options describe."""
    config, wanted = autoencoder.config, options.vae()
    for name in ("latent_channels", "time_factor", "downscale"):
        if getattr(config, name) != getattr(wanted, name):
            raise ValueError(f"--init {options.init}: its autoencoder has {name} "
                             f"{getattr(config, name)}, the options say {getattr(wanted, name)}")
    return autoencoder


# What comes out


def load_model(path, unet="unet", temporal=None):
    """The ClipPipeline of a run."""
    autoencoder = load_autoencoder(path / "vae")
    return ClipPipeline(**vars(weights.load_folder(path, temporal, unet=unet, vae=autoencoder)))


def compare(args):
    """The command `compare`: autoencoders on MovingShapes that none was trained on."""
    check_ranges(args, num_frames=(2, 10**6))  # or else nothing moves
    require_memory(CLIP_BYTES * args.num_clips * args.num_frames * args.image_size**2,
                   "--num-clips, --num-frames or --image-size")
    if args.sheet:
        require_writer(args.sheet)
        require_room(args.sheet)
    prompts = choose_prompts(args.num_clips)
    real = real_clips(args.num_clips, args.num_frames, args.image_size, args.seed, prompts)
    rows, sheet = {}, [real[0]]
    for path in args.runs:
        folder = path if (path / "config.json").exists() else path / "vae"  # it, or a run's
        load = load_autoencoder if is_3d(folder) else weights.load_vae
        coded, rows[str(path)] = fidelity(load(folder).eval(), real, prompts)
        sheet += [coded[0], (2 * (coded[0] - real[0])).clamp(-1, 1)]  # differences, enlarged
    print_table("held-out clips", rows)
    if args.sheet:
        write_clip(args.sheet, contact_sheet(sheet))


def sample(args):
    """The command `sample`."""
    require_writer(args.output)
    require_room(args.output)
    model = load_model(args.run).to(choose_device(args.device))
    frames = args.num_frames or model.sampling.num_frames
    sampling = dataclasses.replace(model.sampling, num_frames=frames)
    check_sampling(model, sampling, min(args.batch_size, len(args.prompts)), len(args.prompts))
    clips = generate(model, args.prompts, sampling, args.seed, args.batch_size)
    clips = (clip[:frames] for clip in clips)  # the last latent frame may hold more
    for path in write_samples(clips, args.prompts, args.output, args.output.suffix,
                              sampling.frames_per_second):
        print(path)


def evaluate(args):
    """The command `evaluate`: does the model draw what the text says?"""
    if read_record(args.run, VideoRun)[0].data != "shapes":
        raise ValueError(f"{args.run}: only of MovingShapes (--data shapes) is the truth known")
    require_room(args.run / "evaluation.json")
    model = load_model(args.run).to(choose_device(args.device))
    prompts = choose_prompts(args.num_prompts)
    started = time.process_time()
    clips = draw(model, prompts, model.sampling.num_frames, args.seed, args.batch_size)
    seconds = (time.process_time() - started) / len(clips)
    right, half = agreement(clips, prompts), len(prompts) // 2
    rows = {"seen": rates(right[half:]), "held out": rates(right[:half]), "all": rates(right)}
    print_table("agreement with the text, %", rows)
    print(f"CPU seconds a clip: {seconds:.2f}")
    write_json(args.run / "evaluation.json", {
        "num_prompts": args.num_prompts, "seed": args.seed,
        "sampling": dataclasses.asdict(model.sampling), "agreement": rows, "seconds": seconds})


def parse_arguments():
    parser = argparse.ArgumentParser(description="LVDM's 3-D autoencoder, and text-to-video in it.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train the three stages, or what is missing")
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    command.add_argument("--stage", choices=STAGES, help="train this stage only")
    command.add_argument("--resume", action="store_true", help="continue an unfinished stage")
    add_flags(command, VideoOptions())
    command = commands.add_parser("compare", help="measure autoencoders, 2-D and 3-D")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                         help="a run, or an autoencoder's folder such as its video_decoder/")
    command.add_argument("--num-clips", type=int, default=128, help="(default: 128)")
    command.add_argument("--num-frames", type=int, default=8, help="of a clip (default: 8)")
    command.add_argument("--image-size", type=int, default=32, help="(default: 32)")
    command.add_argument("--seed", type=int, default=1000, help="of the clips (default: 1000)")
    command.add_argument("--sheet", type=Path, help="a .png: true frames, and of each run its own "
                         "and twice the difference")
    command = commands.add_parser("sample", help="draw clips")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    command.add_argument("--num-frames", type=int, help="(default: the run's)")
    command.add_argument("--seed", type=int, default=0, help="of the first prompt (default: 0)")
    command.add_argument("--output", type=Path, default=Path("samples.gif"),
                         help="(default: samples.gif)")
    add_drawing_flags(command)
    command = commands.add_parser("evaluate", help="measure how clips agree with their text")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--num-prompts", type=int, default=128, help="(default: 128)")
    command.add_argument("--seed", type=int, default=1000, help="of the first (default: 1000)")
    add_drawing_flags(command)
    args = parser.parse_args()
    if args.command != "train":
        check_ranges(args, num_clips=(2, 10**5), num_frames=(1, 10**6), num_prompts=(2, 10**5),
                     image_size=(16, 4096), batch_size=(1, 10**6), seed=(0, 2**62))
    return args


def add_drawing_flags(command):
    command.add_argument("--batch-size", type=int, default=16, help="clips at once (default: 16)")
    command.add_argument("--device", default="auto")


def main():
    args = parse_arguments()
    torch.set_flush_denormal(True)
    commands = {"train": train_run, "compare": compare, "sample": sample, "evaluate": evaluate}
    commands[args.command](args)


if __name__ == "__main__":
    run_main(main)
