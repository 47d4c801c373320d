"""The layers that the autoencoder and the U-Net share, and the place where frames meet.

To a 2-D layer a clip (b, t, c, h, w) is a batch of b * t images; frames stand before channels, so
that view is free. Frames meet only in ResnetBlock.forward: by the temporal shift in its residual
branch (Latent-Shift, An et al. 2023, figure 3), here in front of both convolutions, or by what
temporal.py has instead.

Names and layout are those of diffusers, so Stable Diffusion's checkpoints load without a table.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from shift import temporal_shift


def per_frame(layer, x):
    """Apply a layer for images (n, c, h, w) to x (..., c, h, w)."""
    return layer(x.flatten(0, -4)).unflatten(0, x.shape[:-3])  # (b t) c h w -> b t c h w


def as_computed(x):
    """A norm's output, which autocast makes float32, in the dtype of the layers after it."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))  # once; shift and SiLU move half the bytes


class GroupNorm(nn.GroupNorm):
    def forward(self, x):
        return as_computed(super().forward(x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return as_computed(super().forward(x))


def sinusoids(positions, channels):
    """Numbers (n,) as cosines and sines of falling frequency: (n, channels) float32.

    Fast waves tell neighbours apart, slow ones give the rough place. Vaswani et al. 2017, section
    3.5; the cosines come first, as Stable Diffusion was trained.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies  # n half
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResnetBlock(nn.Module):
    """x + conv2(shift(silu(norm2(conv1(shift(silu(norm1(x)))) + time)))).

    Takes x (..., c, h, w) and the time embedding (b, d) after its SiLU, returns (..., out_channels,
    h, w). With `scale_shift` the time scales and offsets norm2's output instead of being added to
    its input. `shift_before` names the convolutions in front of which 1 / `shift_fold` of the
    channels move each way in time; it is empty in an image model.
    """

    def __init__(self, in_channels, out_channels, groups, eps, time_channels=None,
                 scale_shift=False, shift_before=(), shift_fold=3, shift_causal=False):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.scale_shift = scale_shift
        self.shift_before = shift_before
        self.shift_fold, self.shift_causal = shift_fold, shift_causal
        self.temporal_after1 = self.temporal_after2 = None  # layers of other variants: temporal.py
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time=None):
        # A single frame has no neighbours: zeros in their place would cost it 2/3 of its channels.
        shift_before = self.shift_before if x.shape[1] > 1 else ()
        branch = F.silu(per_frame(self.norm1, x))
        if "conv1" in shift_before:  # Latent-Shift: the step from an image model to a video model
            branch = temporal_shift(branch, branch.shape[2] // self.shift_fold, self.shift_causal)
        branch = per_frame(self.conv1, branch)
        if self.temporal_after1 is not None:
            branch = self.temporal_after1(branch)
        scale = None
        if time is not None:
            time = self.time_emb_proj(time)[:, None, :, None, None]  # b d -> b 1 c 1 1
            if self.scale_shift:
                scale, time = time.chunk(2, dim=2)
            else:
                branch = branch + time
        branch = per_frame(self.norm2, branch)
        if scale is not None:
            branch = torch.addcmul(branch + time, branch, scale)  # branch * (1 + scale) + time
        branch = F.silu(branch)
        if "conv2" in shift_before:
            branch = temporal_shift(branch, branch.shape[2] // self.shift_fold, self.shift_causal)
        branch = per_frame(self.conv2, branch)
        if self.temporal_after2 is not None:
            branch = self.temporal_after2(branch)
        # x itself is not shifted: a frame keeps all that it knows of itself.
        if self.conv_shortcut is not None:
            x = per_frame(self.conv_shortcut, x)
        return x + branch


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        if self.asymmetric:  # Stable Diffusion's autoencoder pads right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbours, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)


class Attention(nn.Module):
    """Multi-head attention of x (b, n, d) to itself, or to a context (b, m, e). Returns (b, n, d).

    `bias` is for the projections of queries, keys and values: the U-Net has none, the autoencoder
    has. `mask` is boolean, True where a query may look, and broadcasts to (b, heads, n, m).
    """

    def __init__(self, channels, num_heads, context_channels=None, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # [1] is diffusers' dropout

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b n d -> b heads n d/heads
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # b heads n d/heads -> b n d
