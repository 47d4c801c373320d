"""What a training needs of a GPU's memory, and what of it stays there: decided before it starts.

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
from dataclasses import dataclass

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
    inputs: int  # of the layers that checkpointing computes twice
    largest: int  # activations of one such layer

    def peak(self, plan, bf16=True):
        """The most bytes of GPU memory at a time."""
        p, wide = self.parameters, 1 if bf16 else 2
        states = p * (4 + 8 * (not plan.moments_on_cpu) + 4 * (not plan.average_on_cpu))
        if plan.checkpointing:
            return states + max(4 * p, wide * self.inputs) + wide * self.largest
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
    inputs = sum(INPUT * numel for kind, numel, _ in outputs if kind is ResnetBlock)
    return Needs(parameters, sum(n for *_, n in outputs), inputs, int(1.2 * largest))


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
        config = weights.load_unet(adopted).config if adopted.exists() else options.unet()
        temporal = {"temporal": "none"} if stage == "image" else options.temporal_fields()
        config, small = dataclasses.replace(config, **temporal), size // options.vae().downscale
        b, t = options.video_batch_size, options.num_frames
        if stage == "image":
            b, t = options.image_batch_size, 1
        tokens = b, options.max_tokens
        inputs = (torch.empty(b, t, config.in_channels, small, small), torch.empty(b),
                  torch.empty(*tokens, config.cross_attention_dim))
        unet = UNet(config), inputs
        if stage == "video":
            return [unet]
        encoder = text.CLIPTextModel(text.PRESETS[options.preset])
        return [unet, (encoder, (torch.empty(tokens, dtype=torch.int64),))]


def plan(run, stage, needs=None, free=None):
    """The Plan of a stage; on a GPU, says what it needs. Raises ValueError if it cannot fit."""
    options = run.options
    if run.device.type != "cuda":
        return Plan(options.gradient_checkpointing is not False, False, options.offload)
    needs = needs or needs_of(learning(run, stage))
    free = free or free_bytes(run.device)
    bf16 = uses_bf16(run.device, options.precision)
    wish = options.gradient_checkpointing
    twice = (False, True) if wish is None and stage != "vae" else (bool(wish),)
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
