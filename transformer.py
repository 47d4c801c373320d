"""The U-Net's transformers: where places of a frame look at each other, and at the text.

    x + attn1(norm1(x))            each place at its own frame
    x + attn2(norm2(x), text)      all places of all frames at the clip's text
    x + ff(norm3(x))               each place by itself

Latent diffusion, Rombach et al. 2022, section 3.3 and appendix E.2.1; names are those of diffusers'
Transformer2DModel. The temporal shift is not here but in the ResnetBlocks around.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from layers import Attention, per_frame
from temporal import beside_attention

CHUNK_TOKENS = 2048  # that go through a FeedForward at once on a CPU: two frames of 32x32 latents


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another one. Shazeer 2020."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers at each place; net[1] is diffusers' dropout, which takes a place in its names."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x):
        if x.is_cuda or torch.is_grad_enabled():
            return self.net(x)
        # Its inner tensors are eight times as wide as x. A few frames' worth of them stays in a
        # CPU's cache; those of a clip would be new pages of memory for each operation.
        parts = x.flatten(0, -2).split(CHUNK_TOKENS)
        return torch.cat([self.net(part) for part in parts]).view_as(x)


class Text(NamedTuple):
    """Texts as the U-Net uses them, in all frames and all steps of sampling: see UNet.read."""

    keys_values: dict  # of each cross-attention
    last_token: torch.Tensor  # (b, d)


def repeat_to(batch, x):
    """x (b, ...) repeated to (batch, ...): for each clip what its texts have in common so far."""
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


class TransformerBlock(nn.Module):
    """Self-attention inside each frame, cross-attention to the clip's text, feed-forward."""

    def __init__(self, channels, num_heads, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, config.cross_attention_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.temporal = beside_attention(config, channels, num_heads)

    def forward(self, x, text):
        """x (b, t, h * w, c) and the Text of k * b texts to (k * b, t, h * w, c)."""
        b, t, _, _ = x.shape
        y = self.norm1(x)
        x = x + self.temporal(y, self.attn1(y.flatten(0, 1)).unflatten(0, (b, t)))
        keys, values = text.keys_values[self.attn2]
        x = repeat_to(len(keys), x)
        # To the text all places of all frames are one long row of queries: so the text becomes keys
        # and values once for each clip, not once for each frame.
        x = x + self.attn2(self.norm2(x).flatten(1, 2), (keys, values)).unflatten(1, (t, -1))
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Pictures to tokens, a transformer block, and back, around a residual connection."""

    def __init__(self, channels, num_heads, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.linear = config.use_linear_projection  # Stable Diffusion 2; 1 has 1x1 convolutions
        project = nn.Linear if self.linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, num_heads, config)])
        self.proj_out = project(channels, channels)

    def forward(self, x, text):
        height_width = x.shape[-2:]
        tokens = per_frame(self.norm, x)
        if not self.linear:
            tokens = per_frame(self.proj_in, tokens)
        tokens = tokens.flatten(3).transpose(2, 3)  # b t c h w -> b t (h w) c
        if self.linear:
            tokens = self.proj_in(tokens)
        tokens = self.transformer_blocks[0](tokens, text)
        if self.linear:
            tokens = self.proj_out(tokens)
        tokens = tokens.transpose(2, 3).unflatten(3, height_width)  # b t (h w) c -> b t c h w
        tokens = tokens if self.linear else per_frame(self.proj_out, tokens)
        return repeat_to(len(tokens), x) + tokens
