"""The layers that the autoencoder and the U-Net share, and the block in which frames meet.

To a 2-D layer a clip (b, t, c, h, w) is a batch of b * t images. Frames come before channels, so
that view is free. Frames meet in ResnetBlock.forward, by the temporal shift in its residual branch
(Latent-Shift, An et al. 2023, figure 3), or in the layers of temporal.py instead.

Names and layout are diffusers', so Stable Diffusion's checkpoints load without a table.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from shift import temporal_shift
from support.linear import Linear  # nn.Linear, faster on some CPUs


def per_frame(layer, x):
    """Apply a layer for images (n, c, h, w) to x (..., c, h, w)."""
    return layer(x.flatten(0, -4)).unflatten(0, x.shape[:-3])  # b t c h w -> (b t) c h w and back


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(shift(conv1(silu(norm1(x)))) + time))).

    Takes x (..., c, h, w) and the time embedding (b, d) after its SiLU; returns (..., out_channels,
    h, w). `shifts` counts the temporal shifts: 0 in an image model, 1 after conv1 as we read the
    paper (docs/papers.md), 2 also one after conv2. With `scale_shift`, the time embedding scales
    and offsets norm2's output instead of being added to its input.
    """

    def __init__(self, in_channels, out_channels, groups, eps, time_channels=None,
                 scale_shift=False, shifts=0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.scale_shift, self.shifts = scale_shift, shifts
        # An Identity has no parameters. For variants other than the shift, model.py replaces it.
        self.temporal1, self.temporal2 = nn.Identity(), nn.Identity()
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time=None):
        branch = per_frame(self.conv1, F.silu(per_frame(self.norm1, x)))
        if self.shifts:
            branch = temporal_shift(branch)  # Latent-Shift
        branch = self.temporal1(branch)  # b t c h w -> b t c h w

        scale = None
        if time is not None:
            time = self.time_emb_proj(time)[:, None, :, None, None]  # b d -> b 1 c 1 1
            if self.scale_shift:
                scale, time = time.chunk(2, dim=2)  # b 1 2c 1 1 -> b 1 c 1 1, twice
            else:
                branch = branch + time
        branch = per_frame(self.norm2, branch)
        if scale is not None:
            branch = torch.addcmul(branch + time, branch, scale)  # branch * (1 + scale) + time

        branch = self.temporal2(per_frame(self.conv2, F.silu(branch)))
        if self.shifts == 2:
            branch = temporal_shift(branch)
        # The skip connection is not shifted, so a frame keeps everything it knows about itself.
        return per_frame(self.conv_shortcut, x) + branch


class GroupNorm(nn.GroupNorm):
    def forward(self, x):
        return as_computed(super().forward(x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return as_computed(super().forward(x))


def as_computed(x):
    """Cast a norm's float32 output back to the autocast dtype, which halves the bytes that the
    SiLU after it moves."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class Downsample(nn.Module):
    """Halve height and width with a convolution of stride 2."""

    def __init__(self, channels, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        if self.asymmetric:  # Stable Diffusion's autoencoder pads right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return per_frame(self.conv, x)  # b t c h w -> b t c h/2 w/2


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then convolve."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        frames = x.flatten(0, -4)  # b t c h w -> (b t) c h w
        # A GPU interpolates to fewer than 2**31 numbers, 127 frames of 256x256 in SD's decoder.
        parts = frames.split(max(1, (2**31 - 1) // (4 * frames[0].numel())))
        y = [self.conv(F.interpolate(part, scale_factor=2.0)) for part in parts]
        return torch.cat(y).unflatten(0, x.shape[:-3])


def sinusoids(positions, channels):
    """Encode numbers (n,) as cosines and sines of falling frequency, (n, channels) float32.

    Fast waves distinguish neighbours, slow ones give the rough position. Vaswani et al. 2017,
    section 3.5. The cosines come first, because Stable Diffusion was trained that way.
    """
    half = channels // 2  # the number of cosines, and of sines
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies  # n half
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Multi-head attention of x (b, n, d) to itself, or to a context (b, m, e). Returns (b, n, d).

    `bias` is for the projections to queries, keys and values; the autoencoder has it, the U-Net
    does not. `mask` is boolean, True where a query may look, and broadcasts to (b, heads, n, m).
    """

    def __init__(self, channels, num_heads, context_channels=None, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context_channels or channels, channels, bias=bias)
        self.to_v = Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])  # [1] is diffusers' dropout

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context  # self-attention
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b n d -> b heads n d/heads
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # b heads n d/heads -> b n d


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another one. Shazeer 2020."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = Linear(channels, 2 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)  # ... 2w -> ... w
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers applied to each token by itself, four times as wide inside."""

    def __init__(self, channels):
        super().__init__()
        # A dict, because the checkpoint's names skip number 1, which is diffusers' dropout.
        self.net = nn.ModuleDict({"0": GEGLU(channels, 4 * channels),
                                  "2": Linear(4 * channels, channels)})

    def forward(self, x):
        return self.net["2"](self.net["0"](x))  # ... c -> ... 4c -> ... c


class TransformerBlock(nn.Module):
    """Self-attention inside each frame, cross-attention to the clip's text, feed-forward.

        x + attn1(norm1(x))             each position to all positions of its own frame
        x + attn2(norm2(x), context)    all positions of all frames to the clip's text
        x + ff(norm3(x))                each position by itself

    Latent diffusion, Rombach et al. 2022, section 3.3 and appendix E.2.1.
    """

    def __init__(self, channels, num_heads, context_channels):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, context_channels)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)  # each position by itself
        self.temporal = None  # attention over time beside attn1, in one variant of temporal.py

    def forward(self, x, context):
        """x (b, t, h * w, c) and hidden states (b, n, d) to (b, t, h * w, c)."""
        y = self.norm1(x)
        attended = self.attn1(y.flatten(0, 1)).view_as(x)  # b t (h w) c -> (b t) (h w) c and back
        if self.temporal is not None:
            attended = attended + self.temporal(y)
        x = x + attended
        # All frames share one text, so the positions of all frames are one sequence of queries.
        # The text's keys and values are then computed once per clip, not once per frame.
        y = self.norm2(x).flatten(1, 2)  # b t (h w) c -> b (t h w) c
        x = x + self.attn2(y, context).view_as(x)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Images to tokens, a transformer block, and back to images, with a skip connection."""

    def __init__(self, channels, num_heads, context_channels, groups, linear):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)  # as in the checkpoints
        self.linear = linear  # Stable Diffusion 2; version 1 has 1x1 convolutions
        project = Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = project(channels, channels)
        block = TransformerBlock(channels, num_heads, context_channels)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = project(channels, channels)

    def forward(self, x, context):
        """x (b, t, c, h, w) and hidden states (b, n, d) to (b, t, c, h, w)."""
        tokens = per_frame(self.norm, x)
        if not self.linear:
            tokens = per_frame(self.proj_in, tokens)
        tokens = tokens.flatten(3).transpose(2, 3)  # b t c h w -> b t (h w) c
        if self.linear:
            tokens = self.proj_in(tokens)
        tokens = self.transformer_blocks[0](tokens, context)
        if self.linear:
            tokens = self.proj_out(tokens)
        tokens = tokens.transpose(2, 3).unflatten(3, x.shape[3:])  # b t (h w) c -> b t c h w
        return x + (tokens if self.linear else per_frame(self.proj_out, tokens))
