"""A decoder that looks back in time: MagicVideo's VideoVAE, Zhou et al. 2022.

The autoencoder decodes a clip frame by frame, so its errors differ from frame to frame and the clip
flickers. Here the decoder of a trained autoencoder gets temporal layers, by default attention of
each position to its own frame and earlier ones, and is fine-tuned on clips. The encoder and the
latents stay as they are, so every U-Net that was trained on these latents gains without training.

    python -m papers.video_decoder train runs/demo          # writes runs/demo/video_decoder/
    python -m papers.video_decoder sample runs/demo "a red circle moving left"
    python -m papers.video_decoder evaluate runs/demo       # beside the run's own decoder

A sampler's latents are less exact than an encoder's, so the decoder is also trained on latents with
noise. The noise and the steps on images are our additions. --temporal none is the control, the
same training without temporal layers.
"""

import dataclasses
from dataclasses import dataclass

import torch

import vae
from checkpoints import weights
from checkpoints.configs import from_config
from evaluate import choose_prompts, draw, real_clips
from layers import per_frame
from papers.drawing import add_commands, run_command
from papers.fidelity import appearance, fidelity, reconstruct
from support.cli import Parser, given_flags, option, print_table, run_main
from support.devices import choose_device
from support.files import read_json
from temporal import (AttentionOverTime, DirectedAttention, TemporalAttention, TemporalConvolution,
                      temporal_state)
from train import random_clips, reconstruction_error
from trainer import Trainer
from training.cache import cache_frames
from training.options import LoopOptions, merge_options, read_record
from training.run import Run, open_data

FOLDER = "video_decoder"  # folder of the decoder inside a run
CLEAN_PART = 0.25  # fraction of the training clips whose latents get no noise
NOISE_LEVELS = (0, 0.1, 0.2)  # standard deviations of the noise that `evaluate` adds to latents
ATTENTIONS = {"directed": DirectedAttention, "attention": AttentionOverTime}
# Joint attention is left out, because it would multiply the operations by 65.
VARIANTS = (*ATTENTIONS, "conv", "shift", "none")
NUM_HEADS = 4  # attention heads over time; all widths of vae.PRESETS are multiples of it


@dataclass(frozen=True)
class VideoVAEConfig(vae.VAEConfig):
    """The shape of the autoencoder and the variant of its decoder."""

    temporal: str = "directed"
    max_frames: int = 16  # frames of the longest clip; only `attention` has parameters for each

    def __post_init__(self):
        if self.temporal not in VARIANTS:
            raise ValueError(f"temporal needs one of {VARIANTS}, got {self.temporal!r}")


class Decoder(vae.Decoder):
    """Latents (b, t, latent_channels, h, w) to clips (b, t, 3, f h, f w)."""

    def __init__(self, config):
        super().__init__(config)
        for level in self.up_blocks:
            channels = level.resnets[-1].conv2.out_channels
            for block in level.resnets:
                block.shifts = int(config.temporal == "shift")
                if config.temporal == "conv":
                    block.temporal1 = TemporalConvolution(channels)
                    block.temporal2 = TemporalConvolution(channels)
            if config.temporal in ATTENTIONS:
                attention = ATTENTIONS[config.temporal](channels, NUM_HEADS)
                # The mask of directed attention orders the frames, so it needs no positions.
                max_frames = None if config.temporal == "directed" else config.max_frames
                layer = TemporalAttention(channels, attention, max_frames)
                level.resnets.add_module("temporal", layer)  # a Sequential runs it last


class VideoVAE(vae.AutoencoderKL):
    """AutoencoderKL whose decoder takes whole clips; `encode` is unchanged."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Decoder(config)
        self.most_frames = config.max_frames if config.temporal == "attention" else None

    def decode(self, z):
        """Clips (b, t, 3, f h, f w), about in [-1, 1], of unscaled latents z (b, t, c, h, w)."""
        pixels = z[0, :, 0].numel() * self.config.downscale**2  # per clip
        return vae.in_parts(lambda part: self.decoder(per_frame(self.post_quant_conv, part)),
                            z, pixels)


def video_vae(autoencoder, temporal, max_frames):
    """A trained AutoencoderKL as a VideoVAE; only the shift changes clips before training."""
    values = dataclasses.asdict(autoencoder.config)
    new = VideoVAE(VideoVAEConfig(**values, temporal=temporal, max_frames=max_frames))
    new.load_state_dict(temporal_state(new) | autoencoder.state_dict())
    return new


def load_video_vae(folder):
    """The trained VideoVAE in a folder."""
    where, name = folder / "config.json", {"_class_name": "VideoVAE"}
    config = from_config(VideoVAEConfig, read_json(where), name, where)
    return weights.fill_from(folder, weights.build(VideoVAE, config, where))[0]


def load_model(path):
    """A run's Pipeline with its video decoder."""
    return weights.load_folder(path, vae=load_video_vae(path / FOLDER / "vae"))


# Training


@dataclass(frozen=True)
class DecoderOptions(LoopOptions):
    """The options of a decoder's fine-tuning."""

    record, stages = "video_decoder.json", ("decoder",)

    temporal: str = option("directed", "how the decoder sees other frames (temporal.py)",
                           choices=VARIANTS)
    noise: float = option(0.4, "largest standard deviation of the noise on latents of variance 1")
    image_every: int = option(10, "decode images every N steps; 0: never")
    decoder_steps: int = option(300, "steps", low=1)
    decoder_batch_size: int = option(4, "clips per step", low=1)
    decoder_learning_rate: float = option(1e-3, "learning rate")


def train(args):
    """The command `train`: fine-tune the decoder of a run."""
    path, given = args.run / FOLDER, given_flags(args, DecoderOptions())
    old, _ = read_record(args.run)
    options, finished = merge_options(path, given, DecoderOptions)
    if finished:
        raise ValueError(f"{path}: is trained already; remove it to train another decoder")
    run = Run(path, options, finished, args.resume)
    torch.manual_seed(options.seed)  # for new weights
    model = video_vae(weights.load_vae(args.run / "vae"), options.temporal, old.num_frames)
    train_decoder(run, model, open_data(old), old.num_frames, old.motion_weight)


def train_decoder(run, model, clips, num_frames, motion_weight):
    """Fine-tune a VideoVAE's decoder on windows of num_frames frames of clips."""
    options, frames_of = run.options, cache_frames(run, clips)  # per clip t 3 h w
    model.requires_grad_(False).to(run.device, memory_format=run.layout)
    model.decoder.requires_grad_(True)
    trainer = Trainer(run, "decoder", [(model.decoder.parameters(), 1.0)])
    decode = trainer.wrap(model.decoder)
    for step, generator in trainer.steps():
        x, _ = random_clips(frames_of, clips.captions, options.decoder_batch_size, num_frames,
                            generator)
        (x,) = run.to_device(x)  # b t 3 h w
        z = per_frame(lambda images: vae.encode_clip(model, images), x)  # b t c h/f w/f
        noise = torch.randn(z.shape, generator=generator)
        deviation, clean = torch.rand(2, len(x), 1, 1, 1, 1, generator=generator)
        noise = noise * options.noise * deviation * (clean >= CLEAN_PART)
        z = (z + noise.to(z)) / model.config.scaling_factor
        x = x.to(z) / 127.5 - 1  # 0..255 -> -1..1
        if options.image_every and (step + 1) % options.image_every == 0:
            x, z = (y.flatten(0, 1)[:, None] for y in (x, z))  # b t c h w -> (b t) 1 c h w
        with run.precision():
            decoded = decode(per_frame(model.post_quant_conv, z))
            loss = reconstruction_error(decoded.flatten(0, 1), x.flatten(0, 1), motion_weight)
        trainer.backward(loss)
    run.save(vae=model)
    run.finish("decoder")


# Measuring


def evaluate(args):
    """The command `evaluate`: a run's own decoder and its video decoder on the same latents."""
    if read_record(args.run)[0].data != "shapes":
        raise ValueError(f"{args.run}: needs a run on MovingShapes (--data shapes)")
    models = {"2-D": weights.load_folder(args.run), "video": load_model(args.run)}
    prompts, sampling, rows = choose_prompts(args.num_prompts), models["2-D"].sampling, {}
    real = real_clips(len(prompts), sampling.num_frames, sampling.image_size, args.seed, prompts)
    for name, model in models.items():
        model.to(choose_device(args.device), args.precision)
        for level in NOISE_LEVELS:
            coded = reconstruct(model.vae, real, level)
            rows[f"{name}, noise {level}"] = fidelity(real, coded) | appearance(coded, prompts)
        drawn = draw(model, prompts, sampling.num_frames, args.seed, args.batch_size)
        rows[f"{name}, drawn"] = appearance(drawn, prompts)
    print_table("decoder, latents", rows)


def main():
    parser = Parser(description="A decoder with temporal layers.")
    add_commands(parser, DecoderOptions())
    run_command(parser, train, evaluate, load_model)


if __name__ == "__main__":
    run_main(main)
