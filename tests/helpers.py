"""Shared by several test files: commands called in this process, small models, run folders."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded.rule import fill, normal

import model
import train
import trainer
import vae
from diffusion import Diffusion
from pipeline import Pipeline, Sampling
from support.files import read_json, write_json
from text import CLIPTextModel, TextConfig
from tokenizer import CLIPTokenizer
from training.options import SAMPLING
from training.run import Run

ROOT = Path(train.__file__).parent
RECORDED = json.loads((Path(__file__).parent / "recorded" / "diffusers.json").read_text())
TOLERANCE = 5e-7  # for outputs of about 0.03, which float32 rounds by less than 1e-7

# Four steps per stage at 16 x 16 pixels. The state is saved every other step, so that a kill can
# lose a step after the last saved one.
SMALL = {
    "data": "shapes", "num_clips": 8, "num_frames": 3, "image_size": 16,
    "vae_steps": 4, "image_steps": 4, "video_steps": 4,
    "vae_batch_size": 4, "image_batch_size": 4, "video_batch_size": 2,
    "image_every": 3, "warmup_steps": 2, "save_every": 2, "workers": 0, "device": "cpu",
}
SMALL_UNET = model.UNetConfig(
    block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
    attention_levels=(True, True, False), attention_head_dim=2,
)
UNETS = {
    "sd1": SMALL_UNET,
    "sd2": dataclasses.replace(SMALL_UNET, attention_head_dim=(1, 2, 4),
                               use_linear_projection=True),
    "small": dataclasses.replace(SMALL_UNET, resnet_time_scale_shift="scale_shift",
                                 class_embed_type="simple_projection"),
}


def build_unet(config=SMALL_UNET, **options):
    """A small U-Net with weights by the rule of the recordings."""
    return fill(model.UNet(dataclasses.replace(config, **options)))


def unet_inputs(b=2, t=3, h=8, w=12):
    """Latents, timesteps and a text of five tokens."""
    timesteps = torch.tensor([37, 2])[:b]  # small, so float32 has seven digits of their sines
    return normal(b, t, 4, h, w), timesteps, normal(b, 5, 20, seed=2)


def fresh_pipeline():
    """An untrained model whose every setting differs from its default."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(["a red circle", "a blue square"], 20, max_length=9)
    config = TextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=9, hidden_act="gelu", layer_norm_eps=1e-4,
    )
    unet = dataclasses.replace(model.PRESETS["tiny"], temporal="none", shifts=2)
    autoencoder = dataclasses.replace(vae.PRESETS["tiny"], scaling_factor=0.7)
    diffusion = Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                          timestep_spacing="trailing")
    sampling = Sampling(num_frames=5, image_size=40, frames_per_second=12.0, num_steps=7,
                        guidance_scale=3.0, guidance_max_snr=2.0, timestep_power=0.9,
                        sampler="ddpm", eta=0.5)
    return Pipeline(model.UNet(unet), vae.AutoencoderKL(autoencoder), CLIPTextModel(config),
                    tokenizer, diffusion, sampling)


def change(path, **values):
    """Change a JSON file; None removes a key."""
    new = read_json(path) | values
    write_json(path, {name: value for name, value in new.items() if value is not None})


def flags(**options):
    """{"num_clips": 8} as ["--num-clips", "8"]."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    return [word for pair in pairs for word in pair]


def call(main, *arguments):
    """main() as the command line `python script.py ARGUMENTS` calls it, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            return main()
        finally:
            torch.set_flush_denormal(False)  # the scripts set it for their whole process


def train_quickly(path, *arguments, previews=False):
    """Call train.py. Samples take two steps, and every other step has a line of metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLING, "tiny", dataclasses.replace(SAMPLING["tiny"], num_steps=2))
        patch.setattr(trainer, "LOG_EVERY", 2)
        if not previews:  # they would take most of the time
            patch.setattr(Run, "draw_previews", lambda *_: None)
            patch.setattr(Run, "preview_vae", lambda *_: None)
        return call(train.main, path, *arguments)


def train_small(path, *arguments, previews=False, **options):
    """Train a run of SMALL's options, or continue one."""
    options = SMALL | options
    if options["data"] != "shapes":
        del options["num_clips"]
    return train_quickly(path, *flags(**options), *arguments, previews=previews)


def metrics_of(path):
    """The entries of a run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights_of(path):
    """The bytes of everything that training has made, except its clock and its options."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = [file.relative_to(path).as_posix() for file in files]
    return {
        name: file.read_bytes() for name, file in zip(names, files, strict=True)
        if name not in ("metrics.jsonl", "train.json", ".lock") and "previews" not in name
    }


def make_clip(path, num_frames=5, gray=10, duration=100):
    """A GIF of 12 x 8 pixels whose frame i has the gray value gray + 20 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (12, 8), (gray + 20 * i,) * 3) for i in range(num_frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration)
