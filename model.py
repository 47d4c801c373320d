"""The U-Net: a text-to-image model of Stable Diffusion's form that also draws clips.

A clip of noisy latents (b, t, c, h, w) goes down through levels of halved size and back up, where
each level is joined by what was set aside on the way down. A level is made of

    ResnetBlock        convolutions, told the timestep; here frames talk, by the temporal shift
    Transformer2D      each place looks at its own frame (attn1), then at the text (attn2)

With temporal="none" every frame is a picture by itself. temporal="shift" has the same parameters
under the same names: that is how an image model becomes a video model in Latent-Shift (An et al.
2023, section 3.2 and figure 3); temporal.py has its neighbours, too. All other layers are those of
latent diffusion (Rombach et al. 2022); names are those of diffusers' UNet2DConditionModel.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from layers import Downsample, ResnetBlock, Upsample, per_frame
from temporal import WAYS, after_layer, around_convolutions
from transformer import Text, Transformer2D, TransformerBlock, repeat_to

# What gradient checkpointing keeps beside a layer's input: outputs dear to compute, small to store.
KEPT = [
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net; where diffusers has a field for it, under diffusers' name.

    `attention_levels` says which levels, from the finest, have transformers. `attention_head_dim`
    is the NUMBER of heads, for all levels or for each: diffusers' old misnomer, kept because every
    config.json has it. The temporal choices are ours: `temporal`, how frames talk; of the shift
    `shift_before`, the convolutions of a block that see shifted channels ("conv1", "conv2" or
    "both"; the paper leaves it open), `shift_fold`, which part of them moves each way (3: a third),
    and `shift_causal`, from the past alone; `max_frames`, where there are parameters for each.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    resnet_time_scale_shift: str = "default"  # or "scale_shift": the time scales and moves norm2
    class_embed_type: str | None = None  # or "simple_projection": the last token joins the time
    sample_size: int = 64  # latents it was trained on; a note, not a limit
    temporal: str = "shift"
    shift_before: str = "both"
    shift_fold: int = 3
    shift_causal: bool = False
    max_frames: int = 16

    def __post_init__(self):
        choices = {
            "temporal": WAYS,
            "shift_before": ("conv1", "conv2", "both"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "simple_projection"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} needs one of {known}, got {getattr(self, name)!r}")
        levels = len(self.block_out_channels)
        if min(levels, self.layers_per_block, self.norm_num_groups, *self.num_heads) < 1:
            raise ValueError("block_out_channels needs a level; layers_per_block, norm_num_groups "
                             "and the numbers of heads need >= 1")
        if len(self.attention_levels) != levels or len(self.num_heads) != levels:
            raise ValueError(f"attention_levels and attention_head_dim need {levels} values, one a "
                             f"level, got {self.attention_levels}, {self.num_heads}")
        if not 2 <= self.shift_fold <= min(self.block_out_channels) or self.max_frames < 1:
            raise ValueError("shift_fold needs >= 2 and at most the channels of a level, max_frames"
                             f" >= 1, got {self.shift_fold}, {self.max_frames}")
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if channels % self.norm_num_groups or channels % heads or channels % 2:
                raise ValueError(
                    f"block_out_channels needs even multiples of norm_num_groups="
                    f"{self.norm_num_groups} and of the number of heads {heads}, got {channels}"
                )

    @property
    def num_heads(self):
        """The number of attention heads of each level."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)


PRESETS = {
    "tiny": UNetConfig(
        block_out_channels=(32, 64), layers_per_block=1, attention_levels=(False, True),
        attention_head_dim=4, cross_attention_dim=64, norm_num_groups=8, sample_size=8,
        resnet_time_scale_shift="scale_shift", class_embed_type="simple_projection",
    ),
    "small": UNetConfig(
        block_out_channels=(128, 256, 384), layers_per_block=2,
        attention_levels=(False, True, True), cross_attention_dim=256, sample_size=16,
        resnet_time_scale_shift="scale_shift", class_embed_type="simple_projection",
    ),
    "sd1": UNetConfig(),
    "sd2": UNetConfig(
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
        sample_size=96,
    ),
}


def sinusoid(timesteps, channels):
    """Timesteps (b,) as cosines and sines of falling frequency: (b, channels) float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat(
        [angles.cos(), angles.sin()], dim=1
    )  # cosine first, as Stable Diffusion has it


class TimeEmbedding(nn.Module):
    """Sinusoids (b, channels) to the embedding (b, d) that every ResnetBlock is told."""

    def __init__(self, channels, width):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """The layers of one resolution: pairs of a ResnetBlock and, perhaps, a Transformer2D.

    `widths` are the channels that enter each ResnetBlock; `attention` says whether the level looks
    at the text. One that shrinks has `downsamplers`, one that grows has `upsamplers`.
    """

    def __init__(self, widths, channels, num_heads, config, attention, step=None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                width, channels, config.norm_num_groups, eps=1e-5,
                time_channels=4 * config.block_out_channels[0],
                scale_shift=config.resnet_time_scale_shift == "scale_shift",
                temporal=around_convolutions(config, channels),
            )
            for width in widths
        )
        self.temporal = nn.ModuleList(after_layer(config, channels, num_heads) for _ in widths)
        if attention:
            self.attentions = nn.ModuleList(
                Transformer2D(channels, num_heads, config) for _ in widths
            )
        if step == "down":
            self.downsamplers = nn.ModuleList([Downsample(channels)])
        elif step == "up":
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def layer(self, i, x, time, text):
        """The i-th ResnetBlock, the Transformer2D after it if there is one, and what follows."""
        x = self.resnets[i](x, time[: len(x)])
        x = self.attentions[i](x, text) if hasattr(self, "attentions") else x
        return self.temporal[i](x)


class MidBlock(nn.Module):
    """At the lowest resolution: block, transformer, block."""

    def __init__(self, channels, num_heads, config):
        super().__init__()
        pair = Level([channels, channels], channels, num_heads, config, attention=False)
        self.resnets = pair.resnets
        self.attentions = nn.ModuleList([Transformer2D(channels, num_heads, config)])
        self.temporal = pair.temporal[:1]

    def forward(self, x, time, text):
        x = self.attentions[0](self.resnets[0](x, time[: len(x)]), text)
        return self.resnets[1](self.temporal[0](x), time)


class UNet(nn.Module):
    """Predicts the noise (or v) in the latents of clips, given the timestep and a text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep little of each layer, compute the rest again
        widths, heads = config.block_out_channels, config.num_heads
        levels, last = list(range(len(widths))), len(widths) - 1
        time_width = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_width)
        if config.class_embed_type is not None:
            self.class_embedding = nn.Linear(config.cross_attention_dim, time_width)
        skips = [widths[0]]  # channels of what is set aside, in order
        self.down_blocks = nn.ModuleList()
        for i in levels:
            enters = [widths[max(i - 1, 0)]] + [widths[i]] * (config.layers_per_block - 1)
            attention, step = config.attention_levels[i], "down" if i < last else None
            self.down_blocks.append(Level(enters, widths[i], heads[i], config, attention, step))
            skips += [widths[i]] * (config.layers_per_block + (i < last))
        self.mid_block = MidBlock(widths[-1], heads[-1], config)
        self.up_blocks = nn.ModuleList()
        for i in reversed(levels):
            enters = [widths[min(i + 1, last)]] + [widths[i]] * config.layers_per_block
            enters = [width + skips.pop() for width in enters]
            attention, step = config.attention_levels[i], "up" if i > 0 else None
            self.up_blocks.append(Level(enters, widths[i], heads[i], config, attention, step))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def read(self, context):
        """The Text of hidden states (b, n, d): keys and values for every cross-attention.

        forward does it if it gets hidden states; a sampler does it once for all its steps.
        """
        width = self.config.cross_attention_dim
        if context.ndim != 3 or context.shape[2] != width:
            raise ValueError(f"context needs the shape (b, n, {width}), got {(*context.shape,)}")
        blocks = [block for block in self.modules() if isinstance(block, TransformerBlock)]
        return Text({block.attn2: block.attn2.read(context) for block in blocks}, context[:, -1])

    def forward(self, latents, timesteps, context):
        """The prediction (b, t, c, h, w) for noisy latents of that shape.

        timesteps is (b,), context the text's hidden states (b, n, d) or what `read` made of them. h
        and w need to be multiples of 2 ** (levels - 1); t is any number, and a picture is a clip of
        one frame.

        With k * b texts, the first of every clip before the second of any, the prediction is (k *
        b, t, c, h, w): guidance asks twice, and what comes before the first text is done once.
        """
        text = context if isinstance(context, Text) else self.read(context)
        batch = len(text.last_token)
        self._check(latents, timesteps, batch)
        time = sinusoid(timesteps, self.config.block_out_channels[0]).to(latents.dtype)
        time = repeat_to(batch, self.time_embedding(time))
        if hasattr(self, "class_embedding"):
            time = time + self.class_embedding(text.last_token)  # it has seen all others
            latents = repeat_to(batch, latents)
        x = per_frame(self.conv_in, latents)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = self._run(level.layer, i, x, time, text)
                skips.append(x)
            for downsample in getattr(level, "downsamplers", []):
                x = downsample(x)
                skips.append(x)
        x = self._run(self.mid_block, x, time, text)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, repeat_to(batch, skips.pop())], dim=2)
                x = self._run(level.layer, i, x, time, text)
            for upsample in getattr(level, "upsamplers", []):
                x = upsample(x)
        return per_frame(self.conv_out, F.silu(per_frame(self.conv_norm_out, x)))

    def _run(self, layer, *inputs):
        """Call a layer; with gradient checkpointing, forget what it computes until it is needed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, KEPT)
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=keep)
        return layer(*inputs)

    def _check(self, latents, timesteps, num_texts):
        shape, factor = tuple(latents.shape), 2 ** (len(self.config.block_out_channels) - 1)
        if len(shape) != 5 or shape[2] != self.config.in_channels:
            raise ValueError(f"latents need the shape (b, t, {self.config.in_channels}, h, w), "
                             f"got {shape}")
        if shape[3] % factor or shape[4] % factor:
            raise ValueError(f"latents need h and w to be multiples of {factor}, got {shape}")
        if tuple(timesteps.shape) != shape[:1]:
            raise ValueError(
                f"timesteps need the shape ({shape[0]},), got {tuple(timesteps.shape)}"
            )
        if num_texts == 0 or num_texts % shape[0]:
            raise ValueError(f"context needs a multiple of {shape[0]} texts, got {num_texts}")
