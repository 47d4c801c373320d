"""The U-Net: a text-to-image model of Stable Diffusion's form that also draws clips.

A clip of noisy latents (b, t, c, h, w) goes down through levels of halved size and back up. On the
way up, each layer also gets a skip connection from a layer of its size on the way down. A level has

    ResnetBlock        convolutions and the timestep; here frames meet, by the temporal shift
    Transformer2D      each position attends to its own frame (attn1), then to the text (attn2)

With temporal="none" every frame is an image by itself. temporal="shift" has the same parameters
under the same names, so an image model becomes a video model without new weights (Latent-Shift, An
et al. 2023, section 3.2 and figure 3). All other layers are from latent diffusion (Rombach et al.
2022); names are from diffusers' UNet2DConditionModel.
"""

from dataclasses import dataclass
from math import lcm

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import temporal
from layers import (Downsample, GroupNorm, ResnetBlock, Transformer2D, Upsample, per_frame,
                    sinusoids)


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net, in diffusers' names where diffusers has the field.

    The last three fields are ours: `temporal` names a variant of temporal.py, `shifts` counts the
    temporal shifts per ResnetBlock (1: the paper's; 2: also one after conv2), and `max_frames` is
    the number of frames that some other variants have parameters for.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # from the finest level down
    # The NUMBER of heads, for all levels or for each one. The name is an old misnomer of diffusers,
    # kept because every config.json has it.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    resnet_time_scale_shift: str = "default"  # or "scale_shift": the time embedding scales norm2
    class_embed_type: str | None = None  # or "simple_projection": the last token is added to time
    sample_size: int = 64  # latents it was trained on; a note, not a limit
    temporal: str = "shift"
    shifts: int = 1
    max_frames: int = 16

    def __post_init__(self):
        widths, heads, groups = self.block_out_channels, self.num_heads, self.norm_num_groups
        # GroupNorm and attention split the channels, sinusoids halve them.
        if len({len(widths), len(self.attention_levels), len(heads)}) > 1 or (
            min(groups, *heads, *widths, len(widths)) < 1
        ) or any(width % lcm(2, groups, n) for width, n in zip(widths, heads, strict=True)):
            raise ValueError("block_out_channels, attention_levels and heads need one value per "
                             "level, and even multiples of norm_num_groups and heads, got "
                             f"{widths}, {self.attention_levels}, {heads} and {groups} groups")
        if self.temporal not in temporal.VARIANTS or self.shifts not in (1, 2):
            raise ValueError(f"temporal needs one of {temporal.VARIANTS} and shifts 1 or 2, got "
                             f"{self.temporal!r} and {self.shifts}")

    @property
    def num_heads(self):
        """The number of attention heads of each level."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)

    @property
    def downscale(self):
        """Height and width of the latents must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


PRESETS = {
    "tiny": UNetConfig(
        block_out_channels=(32, 64), layers_per_block=1, attention_levels=(False, True),
        attention_head_dim=4, cross_attention_dim=64, norm_num_groups=8, sample_size=8,
        resnet_time_scale_shift="scale_shift", class_embed_type="simple_projection",
    ),
    "small": UNetConfig(
        block_out_channels=(128, 256, 384), attention_levels=(False, True, True),
        cross_attention_dim=256, sample_size=16,
        resnet_time_scale_shift="scale_shift", class_embed_type="simple_projection",
    ),
    "sd1": UNetConfig(),
    "sd2": UNetConfig(
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
        sample_size=96,
    ),
}


class TimeEmbedding(nn.Module):
    """Sinusoids (b, channels) to the embedding (b, d) that every ResnetBlock gets."""

    def __init__(self, channels, width):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))  # b c -> b 4c


class Level(nn.Module):
    """The layers of one resolution: ResnetBlocks, each followed by a Transformer2D or by none.

    `i` is the level's index in the config, `widths` are the channels that enter each ResnetBlock.
    After the layers, `downsample` halves the size and `upsample` doubles it.
    """

    def __init__(self, config, i, widths, num_transformers, downsample=False, upsample=False):
        super().__init__()
        channels, num_heads = config.block_out_channels[i], config.num_heads[i]
        kind, shifts = config.temporal, config.shifts if config.temporal == "shift" else 0
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, config.norm_num_groups, eps=1e-5,
                        time_channels=4 * config.block_out_channels[0],
                        scale_shift=config.resnet_time_scale_shift == "scale_shift", shifts=shifts)
            for width in widths)
        self.attentions = nn.ModuleList(
            Transformer2D(channels, num_heads, config.cross_attention_dim, config.norm_num_groups,
                          linear=config.use_linear_projection)
            for _ in range(num_transformers))
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

        # Layers of the variants other than the shift; temporal.py says where they are.
        for block in self.resnets:
            block.temporal1 = temporal.after_convolution(kind, channels, config.max_frames)
            block.temporal2 = temporal.after_convolution(kind, channels, config.max_frames)
        for transformer in self.attentions:
            transformer.transformer_blocks[0].temporal = temporal.beside_attention(
                kind, channels, num_heads)
        self.temporal = nn.ModuleList(
            temporal.after_layer(kind, channels, num_heads, config.max_frames)
            for _ in range(num_transformers or len(widths)))

    def layer(self, i, x, time, context):
        """The i-th ResnetBlock and layers after it, (b, t, c, h, w) to (b, t, channels, h, w)."""
        x = self.resnets[i](x, time)  # here frames meet
        if i < len(self.attentions):
            x = self.attentions[i](x, context)  # positions of a frame, then the text
        return self.temporal[i](x) if i < len(self.temporal) else x


class UNet(nn.Module):
    """Predicts the noise (or v) in the latents of clips, given the timestep and a text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only each layer's input, compute the rest twice
        widths, num_layers = config.block_out_channels, config.layers_per_block
        last, time_width = len(widths) - 1, 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_width)
        self.class_embedding = None
        if config.class_embed_type is not None:
            self.class_embedding = nn.Linear(config.cross_attention_dim, time_width)
            # Gain 4 makes the text embedding as large as the time embedding, so that directions
            # are learned sooner.
            nn.init.orthogonal_(self.class_embedding.weight, gain=4)
        skips = [widths[0]]  # channels of the skip connections; a stack, as in forward()
        self.down_blocks = nn.ModuleList()
        for i in range(len(widths)):
            enters = [widths[max(i - 1, 0)]] + [widths[i]] * (num_layers - 1)
            transformers = len(enters) if config.attention_levels[i] else 0
            self.down_blocks.append(Level(config, i, enters, transformers, downsample=i < last))
            skips += [widths[i]] * (num_layers + (i < last))
        # Two ResnetBlocks at the lowest resolution, and a transformer between them.
        self.mid_block = Level(config, last, [widths[-1]] * 2, num_transformers=1)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            enters = [widths[min(i + 1, last)]] + [widths[i]] * num_layers
            enters = [width + skips.pop() for width in enters]  # concatenated channels
            transformers = len(enters) if config.attention_levels[i] else 0
            self.up_blocks.append(Level(config, i, enters, transformers, upsample=i > 0))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latents, timesteps, context):
        """The prediction (b, t, c, h, w) for noisy latents of that shape.

        timesteps is (b,), context the text's hidden states (b, n, d). h and w must be multiples of
        config.downscale; an image has t = 1. Raises ValueError for other shapes.
        """
        self.check(latents, timesteps, context)
        time = F.silu(self.embed(timesteps, context))  # b d, once for all ResnetBlocks
        # This only changes the width. Text and time come in the transformers and ResnetBlocks.
        x = per_frame(self.conv_in, latents)  # b t 4 h w -> b t c h w
        skips = [x]  # a stack: the last one pushed is the first one popped
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = self.run(level.layer, i, x, time, context)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)  # b t c h w -> b t c h/2 w/2
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self.run(self.mid_block.layer, i, x, time, context)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=2)  # b t c h w -> b t (c + c') h w
                x = self.run(level.layer, i, x, time, context)
            for upsample in level.upsamplers:
                x = upsample(x)  # b t c h w -> b t c 2h 2w
        return per_frame(self.conv_out, F.silu(per_frame(self.conv_norm_out, x)))  # b t 4 h w

    def embed(self, timesteps, context):
        """The time embedding (b, d), with the text's last token if so configured."""
        time = sinusoids(timesteps, self.config.block_out_channels[0])  # b -> b c
        time = self.time_embedding(time.to(context.dtype))
        if self.class_embedding is not None:
            # The last token has seen all others. Beside the cross-attention, this path brings the
            # text into every ResnetBlock; without it the tiny model hardly learns directions.
            time = time + self.class_embedding(context[:, -1])
        return time

    def run(self, layer, *inputs):
        """Call a layer; with gradient checkpointing, compute its activations again when needed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def check(self, latents, timesteps, context):
        b, config = len(latents), self.config
        c, f, d = config.in_channels, config.downscale, config.cross_attention_dim
        if latents.ndim != 5 or latents.shape[2] != c or any(n % f for n in latents.shape[3:]):
            raise ValueError(f"latents need the shape (b, t, {c}, h, w) with h and w multiples of "
                             f"{f}, got {tuple(latents.shape)}")
        if len(timesteps) != b or (context.ndim, len(context), context.shape[-1]) != (3, b, d):
            raise ValueError(f"timesteps and context need the shapes ({b},) and ({b}, n, {d}), got "
                             f"{tuple(timesteps.shape)} and {tuple(context.shape)}")
