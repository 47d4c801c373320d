"""Text-to-video in the latents of LVDM's 3-D autoencoder.

    python -m papers.video_autoencoder train runs/lvdm --data shapes       # all stages from nothing
    python -m papers.video_autoencoder train runs/lvdm --init runs/demo    # from its autoencoder
    python -m papers.video_autoencoder sample runs/lvdm "a red circle moving left"
    python -m papers.video_autoencoder evaluate runs/lvdm --beside runs/demo

papers/autoencoder_3d.py has the autoencoder. The image and video stages are train.py's, on latent
frames. Each latent frame stands for four frames, so the image stage already sees motion. The
default is the shift; `--temporal attention` is LVDM's attention, but with absolute positions.

LVDM, He et al. 2022, sections 3.1 and 3.2.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import train
import vae
from checkpoints import weights
from evaluate import choose_prompts, draw, evaluate_agreement, real_clips
from papers.autoencoder_3d import (VideoAutoencoder, VideoAutoencoderConfig, inflate,
                                   load_autoencoder)
from papers.drawing import add_commands, run_command
from papers.fidelity import appearance, fidelity, reconstruct
from pipeline import Pipeline
from support.cli import Parser, given_flags, option, print_table, run_main
from support.devices import choose_device, freeze
from trainer import Trainer
from training.cache import cache_frames, cache_latents, cache_texts
from training.options import (STAGES, TrainOptions, check_image_size, merge_options, read_record,
                              stages_to_run)
from training.run import Run, open_data


@dataclass(frozen=True)
class VideoOptions(TrainOptions):
    """The options of train.py. --init names a 2-D autoencoder; the vae stage learns clips."""

    record = "video_autoencoder.json"

    preset: str = option("tiny", "size of the networks", choices=("tiny", "small", "sd1", "sd2"))
    init: str | None = option(None, "start from the 2-D autoencoder of a run")
    merges: str | None = option(None, "unused, because the tokenizer is always trained")
    latent_channels: int = option(4, "channels of the latents", low=1)
    time_factor: int = option(4, "frames that share a latent frame", low=1)
    vae_steps: int = option(300, "steps of the vae stage", low=1)
    vae_batch_size: int = option(4, "clips per step", low=1)
    vae_learning_rate: float = option(1e-3, "learning rate of the vae stage")
    kl_weight: float = option(1e-3, "weight of the KL term, which pulls latents towards N(0, 1)")
    image_steps: int = option(650, "steps of the image stage", low=1)
    video_steps: int = option(1200, "steps of the video stage", low=1)
    video_batch_size: int = option(16, "clips per step", low=1)

    def __post_init__(self):
        self.diffusion()
        check_image_size(self.image_size, self.vae(), self.unet())
        if self.num_frames % self.time_factor:
            raise ValueError(f"--num-frames needs a multiple of --time-factor {self.time_factor}, "
                             f"got {self.num_frames}")

    @classmethod
    def recipe(cls, given):
        return cls()

    def unused(self):  # as without --init, because the vae stage trains its autoencoder
        return TrainOptions.unused(dataclasses.replace(self, init=None))

    @property
    def latent_frames(self):
        return self.num_frames // self.time_factor

    def vae(self):
        values = dataclasses.asdict(super().vae())
        values |= {"latent_channels": self.latent_channels, "mid_block_add_attention": False}
        return VideoAutoencoderConfig(**values, time_factor=self.time_factor)

    def unet(self):
        c = self.latent_channels
        return dataclasses.replace(super().unet(), in_channels=c, out_channels=c)


class ClipPipeline(Pipeline):
    """A Pipeline in the latents of a VideoAutoencoder, which draws whole latent frames."""

    def sample(self, prompts, seeds, sampling=None):
        sampling = sampling or self.sampling
        latent_frames = -(-sampling.num_frames // self.vae.config.time_factor)
        sampling = dataclasses.replace(sampling, num_frames=latent_frames)
        return super().sample(prompts, seeds, sampling)


def load_model(path, unet=None):
    """The ClipPipeline of a run, with its own U-Net or another one."""
    autoencoder = load_autoencoder(path / "vae")
    return ClipPipeline(**vars(weights.load_folder(path, unet=unet, vae=autoencoder)))


# Training


def start_autoencoder(options):
    """The autoencoder before the vae stage, inflated if --init names a 2-D one."""
    if options.init is None:
        return VideoAutoencoder(options.vae())
    image_model = weights.load_vae(Path(options.init) / "vae")
    check_image_size(options.image_size, image_model.config, options.unet())
    return inflate(image_model, options.latent_channels, options.time_factor)


def train_vae(run, autoencoder, clips):
    """The vae stage of train.py, on clips."""
    options, config = run.options, autoencoder.config
    b, size = options.vae_batch_size, options.image_size // config.downscale
    shape = b, options.latent_frames, config.latent_channels, size, size
    frames_of = cache_frames(run, clips)  # per clip t 3 h w
    autoencoder.to(run.device, memory_format=run.layout)
    trainer = Trainer(run, "vae", [(autoencoder.parameters(), 1.0)])
    forward = trainer.wrap(autoencoder)
    for _, generator in trainer.steps():
        x, _ = train.random_clips(frames_of, clips.captions, b, options.num_frames, generator)
        x, noise = run.to_device(x, torch.randn(shape, generator=generator))
        x = x.float() / 127.5 - 1  # 0..255 -> -1..1
        with run.precision():
            y, gaussian = forward(x, noise)  # b t 3 h w
            loss = train.reconstruction_error(y.flatten(0, 1), x.flatten(0, 1),
                                              options.motion_weight)
            loss = loss + options.kl_weight * gaussian.kl().mean() / noise[0].numel()
        trainer.backward(loss)
    every = max(1, frames_of.num_rows // train.FRAMES)
    latents = [vae.encode_clip(autoencoder, frames_of[i]) for i in range(0, len(frames_of), every)]
    vae.standardise(autoencoder, torch.cat(latents))
    run.save(vae=autoencoder)
    run.finish("vae")


def train_stages(args):
    """The command `train`: the stages that are missing, as in train.py."""
    options, finished = merge_options(args.run, given_flags(args, VideoOptions()), VideoOptions)
    stages = stages_to_run(args.run, args.stage, finished)
    if not stages:
        print(f"{args.run}: all stages are finished")
        return
    clips = open_data(options)
    run = Run(args.run, options, finished, args.resume)
    run.start(clips, stages)
    for stage in stages:
        torch.manual_seed(options.seed)  # for new weights
        if stage == "vae":
            train_vae(run, start_autoencoder(options), clips)
        elif stage == "image":
            autoencoder = freeze(load_autoencoder(run.path / "vae"), run.device, options.precision)
            latents = cache_latents(run, clips, autoencoder)
            train.train_image(run, autoencoder, latents, clips.captions)
        else:
            model = load_model(run.path, weights.load_unet(run.path / "image_unet", "none"))
            for network in (model.vae, model.text_encoder):
                freeze(network, run.device, options.precision)
            latents = cache_latents(run, clips, model.vae)
            context_of = cache_texts(run, clips.captions, model)
            model.unet = train.video_unet(model.unet, options)
            train.train_video(run, model, latents, clips.captions, context_of)


# Measuring


def evaluate(args):
    """The command `evaluate`: measure reconstructions, and how drawn clips agree with texts."""
    options, finished = read_record(args.run, VideoOptions)
    if options.data != "shapes":
        raise ValueError(f"{args.run}: needs a run on MovingShapes (--data shapes)")
    prompts, rows = choose_prompts(args.num_prompts), {}
    real = real_clips(len(prompts), options.num_frames, options.image_size, args.seed, prompts)
    autoencoders = {args.run: load_autoencoder(args.run / "vae")}
    if args.beside is not None:
        autoencoders[args.beside] = weights.load_vae(args.beside / "vae")
    for path, autoencoder in autoencoders.items():
        coded = reconstruct(freeze(autoencoder, choose_device(args.device), args.precision), real)
        count = {"latents per clip": vae.encode_clip(autoencoder, real[0]).numel()}
        rows[str(path)] = count | fidelity(real, coded) | appearance(coded, prompts)
    print_table("real clips, autoencoded", rows)
    if "video" in finished:
        model = load_model(args.run).to(choose_device(args.device), args.precision)
        drawn = draw(model, prompts, options.num_frames, args.seed, args.batch_size)
        print_table("agreement with the text, %", evaluate_agreement({"clips": drawn}, {}, prompts))


def main():
    parser = Parser(description="LVDM's 3-D autoencoder, and text-to-video in its latents.")
    train_command, _, evaluate_command = add_commands(parser, VideoOptions())
    train_command.add_argument("--stage", choices=STAGES, help="train this stage only")
    evaluate_command.add_argument("--beside", type=Path, metavar="RUN",
                                  help="also measure the 2-D autoencoder of this run")
    run_command(parser, train_stages, evaluate, load_model)


if __name__ == "__main__":
    run_main(main)
