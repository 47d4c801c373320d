"""The 2-D layers that the autoencoder and the U-Net share.

They see frames, not time: a clip (b, t, c, h, w) is a batch of b * t pictures to them, and because
frames stand before channels that view is free. The one exception are the places around the
convolutions of a ResnetBlock, where temporal.py puts what lets frames talk: for Latent-Shift the
temporal shift.

Names and layout are those of diffusers, so that a Stable Diffusion checkpoint loads without a
table.
"""

import torch
import torch.nn.functional as F
from torch import nn


def per_frame(layer, x):
    """Apply a layer for pictures (n, c, h, w) to x (..., c, h, w)."""
    return layer(x.flatten(0, -4)).unflatten(0, x.shape[:-3])


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); frames may talk around convolutions.

    Takes x (..., c, h, w) and the time embedding (b, d), returns (..., out_channels, h, w).
    With `scale_shift` the time scales and moves norm2's output instead of being added to its input.
    `temporal` are four modules of clips (b, t, c, h, w): what stands before and after conv1, before
    and after conv2 (temporal.py). Without them each frame is a picture by itself.
    """

    def __init__(self, in_channels, out_channels, groups, eps, time_channels=None,
                 scale_shift=False, temporal=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.scale_shift = scale_shift
        before1, after1, before2, after2 = temporal or [nn.Identity() for _ in range(4)]
        self.temporal_before1, self.temporal_after1 = before1, after1
        self.temporal_before2, self.temporal_after2 = before2, after2
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time=None):
        branch = self.temporal_before1(F.silu(per_frame(self.norm1, x)))
        branch = self.temporal_after1(per_frame(self.conv1, branch))
        scale = None
        if time is not None:
            time = self.time_emb_proj(F.silu(time))[:, None, :, None, None]  # b 1 c 1 1
            if self.scale_shift:
                scale, time = time.chunk(2, dim=2)
            else:
                branch = branch + time
        branch = per_frame(self.norm2, branch)
        if scale is not None:
            branch = torch.addcmul(branch + time, branch, scale)  # branch * (1 + scale) + time
        branch = self.temporal_before2(F.silu(branch))
        branch = self.temporal_after2(per_frame(self.conv2, branch))
        if hasattr(self, "conv_shortcut"):
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
    """Multi-head attention of x (b, n, d) to itself, or to what `read` made of a context (b, m, e).

    `bias` is for the projections of queries, keys and values: the U-Net has none, the autoencoder
    has. `mask` is added to the logits (b, heads, n, m), or is False where none may look.
    """

    def __init__(self, channels, num_heads, context_channels=None, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # [1] is diffusers' dropout

    def read(self, context):
        """Keys and values, (b, heads, m, d) each, of a context."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(self, x, keys_values=None, mask=None):
        keys, values = self.read(x) if keys_values is None else keys_values
        x = F.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values, mask)
        return self.to_out[0](x.transpose(1, 2).flatten(2))

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b n (heads d) -> b heads n d
