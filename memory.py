"""What training and sampling need of memory, and what stays on a GPU: decided before they start.

For P parameters that learn, in bytes:

    weights 4 P, AdamW's moments 8 P, average 4 P     from the first step to the last
    gradients 4 P                                     grow during the backward pass
    activations                                       grow during the forward pass, then shrink
    weights in bfloat16 2 P                           live with the activations

Three things can leave: the average, which is needed rarely, lives in CPU memory; activations are
computed twice instead of stored (gradient checkpointing); and with --offload the moments live in
CPU memory, too, and visit the GPU in every step. `plan` takes the fastest way that fits.

Activations are estimated from the output of each layer. The bytes for each number of it were
counted at bfloat16, for Stable Diffusion's shapes (docs/measurements.md).
"""

import dataclasses
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import processes
import text
import vae
import weights
from devices import free_bytes, uses_bf16
from layers import ResnetBlock
from model import UNet
from transformer import TransformerBlock

BYTES = {ResnetBlock: 27, TransformerBlock: 70, text.TextLayer: 47}
WITHOUT_TIME = 21  # of a ResnetBlock, in the autoencoder
INPUT = 6  # what checkpointing stores of a layer, for each number of its ResnetBlock's output
MARGIN = 1.1  # workspaces of kernels, and gaps between tensors
CLIP_BYTES = 50  # for each pixel of a clip that is drawn or read, with what it is computed from
# Where Linux says how much memory a process may have, such as that of a container.
LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@dataclass(frozen=True)
class Plan:
    """Where things are; the first field is of activations, the others of states."""

    checkpointing: bool = False
    average_on_cpu: bool = False
    moments_on_cpu: bool = False

    def __str__(self):
        return ", ".join([
            "activations computed twice" if self.checkpointing else "activations stored",
            f"average {'in CPU memory' if self.average_on_cpu else 'on the GPU'}",
            f"moments {'in CPU memory' if self.moments_on_cpu else 'on the GPU'}"])


@dataclass(frozen=True)
class Needs:
    """Numbers of a stage: parameters that learn; bytes of activations, in bfloat16."""

    parameters: int
    activations: int
    kept: int  # of them with checkpointing: inputs of layers computed twice, a text encoder's all
    largest: int  # activations of one such layer

    def peak(self, plan, bf16=True):
        """The most bytes of GPU memory at a time."""
        p, wide = self.parameters, 1 if bf16 else 2
        states = p * (4 + 8 * (not plan.moments_on_cpu) + 4 * (not plan.average_on_cpu))
        if plan.checkpointing:
            return states + max(4 * p, wide * self.kept) + wide * self.largest
        stored = 2 * p * bf16 + wide * self.activations  # when the backward pass begins
        return states + max(stored, 4 * p + wide * self.largest)


def needs_of(networks):
    """Needs of [(network, inputs), ...] on the meta device, where a forward pass costs nothing."""
    outputs = []

    def note(layer, inputs, output):
        timeless = isinstance(layer, ResnetBlock) and not hasattr(layer, "time_emb_proj")
        each = WITHOUT_TIME if timeless else BYTES[type(layer)]
        outputs.append((type(layer), output.numel(), each * output.numel()))

    for network, inputs in networks:
        for layer in network.modules():
            if type(layer) in BYTES:
                layer.register_forward_hook(note)
        with torch.no_grad():
            network(*inputs)
    parameters = sum(p.numel() for network, _ in networks for p in network.parameters())
    largest = sum(max((n for k, _, n in outputs if k is kind), default=0)
                  for kind in (ResnetBlock, TransformerBlock))
    kept = sum(INPUT * numel for kind, numel, _ in outputs if kind is ResnetBlock)
    kept += sum(n for kind, _, n in outputs if kind is text.TextLayer)
    return Needs(parameters, sum(n for *_, n in outputs), kept, int(1.2 * largest))


def learning(run, stage):
    """[(network, inputs), ...] of what learns in a stage of a run, on the meta device."""
    options, size = run.options, run.options.image_size
    with torch.device("meta"):
        if stage == "vae":
            config, n = options.vae(), options.vae_batch_size
            small = size // config.downscale
            noise = torch.empty(n, config.latent_channels, small, small)
            return [(vae.AutoencoderKL(config), (torch.empty(n, 3, size, size), noise))]
        adopted = run.path / "image_unet"  # of --init, or of a finished stage
        config, autoencoder = options.unet(), options.vae()
        if (adopted / "config.json").is_file():  # perhaps of a save that was killed: no weights yet
            config = weights.load_config(adopted, UNet)
            autoencoder = weights.load_config(run.path / "vae", vae.AutoencoderKL)
        temporal = {"temporal": "none"} if stage == "image" else options.temporal_fields()
        config, small = dataclasses.replace(config, **temporal), size // autoencoder.downscale
        b, t = options.video_batch_size, options.latent_frames
        if stage == "image":
            b, t = options.image_batch_size, 1
        tokens = b, options.max_tokens
        inputs = (torch.empty(b, t, config.in_channels, small, small), torch.empty(b),
                  torch.empty(*tokens, config.cross_attention_dim))
        unet = UNet(config), inputs
        if stage == "video":
            return [unet]
        encoder = text.CLIPTextModel(dataclasses.replace(
            text.PRESETS[options.preset], max_position_embeddings=options.max_tokens))
        return [unet, (encoder, (torch.empty(tokens, dtype=torch.int64),))]


def machine_bytes():
    """Bytes of memory that this process may have at most, as far as the system says it."""
    found = [Path(path).read_text() for path in LIMITS if Path(path).is_file()]
    limits = [int(text) for text in found if text.strip().isdecimal()]  # or "max"
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=2**63)


def require_memory(needed, flags):
    """Raise ValueError, naming the flags to lower, if the machine has not so many bytes."""
    there = machine_bytes()
    if needed > there:
        raise ValueError(f"needs about {needed / 1e9:,.1f} GB of memory, the machine has "
                         f"{there / 1e9:,.1f}; lower {flags}")


def least_bytes(options, stage):
    """Bytes that a step on a CPU surely takes: 8 maps of a block of the first level, and a clip."""
    config, size, frames = options.vae(), options.image_size, options.vae_batch_size
    if stage != "vae":
        config, size, frames = options.unet(), size // config.downscale, options.image_batch_size
    if stage == "video":
        frames = options.video_batch_size * options.latent_frames
    clip = CLIP_BYTES * options.num_frames * options.image_size**2
    return 4 * 8 * frames * config.block_out_channels[0] * size**2 + clip


def check_sampling(pipeline, sampling, batch_size, kept, zoom=1):
    """Refuse, as require_memory does, to draw what cannot fit; counted is what surely is needed.

    Of so many clips at a time, with `kept` clips in memory at the end.
    """
    size, latent = sampling.image_size, sampling.image_size // pipeline.vae.config.downscale
    # With guidance 2 clips, of each about 4 maps of the U-Net's first level; then the pixels.
    maps = 8 * pipeline.unet.config.block_out_channels[0] * latent**2
    frames = batch_size * (maps + 3 * size**2) + kept * 3 * (size * zoom) ** 2
    decoded = 3 * pipeline.vae.config.block_out_channels[0] * size**2  # of a frame
    require_memory(4 * (sampling.num_frames * frames + decoded),
                   "--batch-size, --num-frames, --image-size, --zoom or the number of clips")


def plan(run, stage, needs=None, free=None):
    """The Plan of a stage; on a GPU, says what it needs. Raises ValueError if it cannot fit."""
    options = run.options
    if run.device.type != "cuda":
        require_memory(least_bytes(options, stage),
                       f"--{stage}-batch-size, --num-frames or --image-size")
        return Plan(options.gradient_checkpointing is not False, False, options.offload)
    needs = needs or needs_of(learning(run, stage))
    free = free or free_bytes(run.device)
    bf16 = uses_bf16(run.device, options.precision)
    # The autoencoder stores all, whatever is asked for.
    wish = options.gradient_checkpointing if stage != "vae" else False
    twice = (False, True) if wish is None else (wish,)
    for way in itertools.product(twice, (False, True)):
        chosen = Plan(*way, options.offload)
        needed = MARGIN * needs.peak(chosen, bf16)
        what = (f"the {stage} stage needs about {needed / 1e9:.1f} GB of GPU memory ({chosen}), "
                f"{free / 1e9:.1f} are free")
        if needed <= free:
            if processes.is_main():
                print(what)
            return chosen
    remedies = ["--offload"] * (not options.offload)
    remedies += ["--gradient-checkpointing"] * (wish is False and stage != "vae")
    raise ValueError(f"{what}; use {' or '.join([*remedies, f'a smaller --{stage}-batch-size'])}, "
                     "--num-frames or --image-size")
