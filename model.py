"""The U-Net: a text-to-image model of Stable Diffusion's form that also draws clips.

A clip of noisy latents (b, t, c, h, w) goes down through levels of halved size and back up. On the
way up, each layer also gets what the way down set aside at its size. A level is made of

    ResnetBlock        convolutions and the timestep; here frames meet, by the temporal shift
    Transformer2D      each place attends to its own frame (attn1), then to the text (attn2)

With temporal="none" every frame is an image by itself. temporal="shift" has the same parameters
under the same names: that is how an image model becomes a video model in Latent-Shift (An et al.
2023, section 3.2 and figure 3). All other layers are those of latent diffusion (Rombach et al.
2022); names are those of diffusers' UNet2DConditionModel.
"""

from dataclasses import dataclass
from functools import partial
from math import lcm

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (checkpoint, create_selective_checkpoint_contexts,
                                    noop_context_fn)

from layers import Downsample, GroupNorm, ResnetBlock, Upsample, per_frame, sinusoids
from temporal import VARIANTS, add_temporal_layers
from transformer import Transformer2D

# What gradient checkpointing keeps beside a layer's input: outputs that are expensive to compute
# and cheap to store.
KEPT = [
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net; where diffusers has a field for it, under diffusers' name.

    The last six fields are ours: `temporal` names a variant of temporal.py, `shift_before` the
    convolutions of a block that see shifted channels ("conv1", "conv2" or "both"; the paper does
    not say which), `shift_fold` says that one in so many channels moves each way, `shift_causal`
    that none moves back in time; `max_frames` counts the frames that have parameters of their own;
    `num_conditions` numbers of a clip, such as its frame rate, are embedded like the timestep.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # from the finest level down
    # The NUMBER of heads, of all levels or of each: an old misnomer of diffusers, kept because
    # every config.json has it.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    resnet_time_scale_shift: str = "default"  # or "scale_shift": the time scales norm2's output
    class_embed_type: str | None = None  # or "simple_projection": the last token joins the time
    sample_size: int = 64  # latents it was trained on; a note, not a limit
    temporal: str = "shift"
    shift_before: str = "both"
    shift_fold: int = 3
    shift_causal: bool = False
    max_frames: int = 16
    num_conditions: int = 0

    def __post_init__(self):
        def check(name, right, need):
            if not right:
                raise ValueError(f"{name} needs {need}, got {getattr(self, name)!r}")

        choices = {
            "temporal": VARIANTS,
            "shift_before": ("conv1", "conv2", "both"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "simple_projection"),
        }
        for name, known in choices.items():
            check(name, getattr(self, name) in known, f"one of {known}")
        for name in ("layers_per_block", "norm_num_groups", "max_frames"):
            check(name, getattr(self, name) >= 1, ">= 1")
        widths, heads, groups = self.block_out_channels, self.num_heads, self.norm_num_groups
        check("block_out_channels", min(widths, default=0) >= 1, "one level or more, >= 1 channels")
        check("attention_levels", len(self.attention_levels) == len(widths),
              f"{len(widths)} values, one a level")
        check("attention_head_dim", len(heads) == len(widths) and min(heads) >= 1,
              f"one number >= 1, or {len(widths)}, one a level")
        # GroupNorm and attention split the channels, sinusoids halve them.
        divided = all(c % lcm(2, groups, n) == 0 for c, n in zip(widths, heads, strict=True))
        check("block_out_channels", divided,
              f"even multiples of norm_num_groups={groups} and of the numbers of heads {heads}")
        check("shift_fold", 2 <= self.shift_fold <= min(widths), f"2 to {min(widths)} (channels)")

    @property
    def num_heads(self):
        """The number of attention heads of each level."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)

    @property
    def downscale(self):
        """Height and width of the latents need to be multiples of this."""
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
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """The layers of one resolution: ResnetBlocks, each followed by a Transformer2D or by none.

    `i` is its place in the config, `widths` are the channels that enter each ResnetBlock. Behind
    its layers, `downsample` halves the size and `upsample` doubles it.
    """

    def __init__(self, config, i, widths, num_transformers, downsample=False, upsample=False):
        super().__init__()
        channels, groups = config.block_out_channels[i], config.norm_num_groups
        shift_before = [name for name in ("conv1", "conv2")
                        if config.temporal == "shift" and config.shift_before in (name, "both")]
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, groups, eps=1e-5,
                        time_channels=4 * config.block_out_channels[0],
                        scale_shift=config.resnet_time_scale_shift == "scale_shift",
                        shift_before=shift_before, shift_fold=config.shift_fold,
                        shift_causal=config.shift_causal)
            for width in widths)
        self.attentions = nn.ModuleList(
            Transformer2D(channels, config.num_heads[i], config.cross_attention_dim, groups,
                          linear=config.use_linear_projection)
            for _ in range(num_transformers))
        self.temporal = nn.ModuleList()  # behind its layers, in one variant of temporal.py
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def layer(self, i, x, time, context):
        """The i-th ResnetBlock and what follows it, (b, t, c, h, w) to (b, t, channels, h, w)."""
        x = self.resnets[i](x, time)
        if i < len(self.attentions):
            x = self.attentions[i](x, context)
        return self.temporal[i](x) if i < len(self.temporal) else x


class UNet(nn.Module):
    """Predicts the noise (or v) in the latents of clips, given the timestep and a text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep little of each layer, compute the rest again
        widths, num_layers = config.block_out_channels, config.layers_per_block
        last, time_width = len(widths) - 1, 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_width)
        self.class_embedding = None
        if config.class_embed_type is not None:
            self.class_embedding = nn.Linear(config.cross_attention_dim, time_width)
            # As loud as the timestep from the start, so that directions are learned sooner.
            nn.init.orthogonal_(self.class_embedding.weight, gain=4)
        self.condition_embeddings = nn.ModuleList(
            TimeEmbedding(widths[0], time_width) for _ in range(config.num_conditions)
        )
        for embedding in self.condition_embeddings:  # 0 at first: the model without conditions
            nn.init.zeros_(embedding.linear_2.weight)
            nn.init.zeros_(embedding.linear_2.bias)
        skips = [widths[0]]  # channels of what the way down sets aside; a stack, as in forward()
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
        add_temporal_layers(self)

    def forward(self, latents, timesteps, context, conditions=None):
        """The prediction (b, t, c, h, w) for noisy latents of that shape.

        timesteps is (b,), context the text's hidden states (b, n, d), conditions the numbers (b,
        config.num_conditions). h and w need to be multiples of config.downscale; t is any number,
        and an image is a clip of one frame.
        """
        self._check(latents, timesteps, context, conditions)
        time = sinusoids(timesteps, self.config.block_out_channels[0])  # b -> b c
        time = self.time_embedding(time.to(latents.dtype))
        if self.class_embedding is not None:
            # The last token has seen all others. Beside the cross-attention, this path brings the
            # text into every ResnetBlock; the tiny model hardly learns directions without it.
            time = time + self.class_embedding(context[:, -1])
        for i, embedding in enumerate(self.condition_embeddings):
            numbers = sinusoids(conditions[:, i], self.config.block_out_channels[0])  # b -> b c
            time = time + embedding(numbers.to(latents.dtype))
        time = F.silu(time)  # once, for all ResnetBlocks
        # Only a change of width. Text and time come later, in the transformers and ResnetBlocks.
        x = per_frame(self.conv_in, latents)  # b t 4 h w -> b t c h w
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = self._run(level.layer, i, x, time, context)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)  # b t c h w -> b t c h/2 w/2
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self._run(self.mid_block.layer, i, x, time, context)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=2)  # b t c h w -> b t (c + c') h w
                x = self._run(level.layer, i, x, time, context)
            for upsample in level.upsamplers:
                x = upsample(x)  # b t c h w -> b t c 2h 2w
        return per_frame(self.conv_out, F.silu(per_frame(self.conv_norm_out, x)))  # b t 4 h w

    def _run(self, layer, *inputs):
        """Call a layer; with gradient checkpointing, forget what it computes until it is needed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, KEPT)
            # Choosing what is kept takes every operation through Python. A GPU would wait for it.
            if inputs[1].is_cuda and not torch.compiler.is_compiling():
                keep = noop_context_fn
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=keep)
        return layer(*inputs)

    def _check(self, latents, timesteps, context, conditions):
        b, config = len(latents), self.config
        c, f, d = config.in_channels, config.downscale, config.cross_attention_dim
        if latents.ndim != 5 or latents.shape[2] != c or any(n % f for n in latents.shape[3:]):
            raise ValueError(f"latents need the shape (b, t, {c}, h, w) with h and w multiples of "
                             f"{f}, got {tuple(latents.shape)}")
        if config.num_conditions and (
            conditions is None or conditions.shape != (b, config.num_conditions)
        ):
            raise ValueError(f"conditions need the shape ({b}, {config.num_conditions}); a model "
                             "for known frames is drawn with by `python -m papers.long_video`")
        if timesteps.shape != (b,) or (context.ndim, len(context), context.shape[-1]) != (3, b, d):
            raise ValueError(f"timesteps and context need the shapes ({b},) and ({b}, n, {d}), got "
                             f"{tuple(timesteps.shape)} and {tuple(context.shape)}")
