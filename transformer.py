"""The U-Net's transformers, in which the places of a frame attend to each other and to the text.

    x + attn1(norm1(x))             each place to all places of its own frame
    x + attn2(norm2(x), context)    all places of all frames to the clip's text
    x + ff(norm3(x))                each place by itself

Latent diffusion, Rombach et al. 2022, section 3.3 and appendix E.2.1; names are those of diffusers'
Transformer2DModel. The temporal shift is not here but in the ResnetBlocks around it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from layers import Attention, GroupNorm, LayerNorm, per_frame

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
    """Two layers at each place, four times as wide inside."""

    def __init__(self, channels):
        super().__init__()
        # Keys and not a list, for the checkpoint's names: number 1 is diffusers' dropout.
        self.net = nn.ModuleDict({
            "0": GEGLU(channels, 4 * channels),
            "2": nn.Linear(4 * channels, channels),
        })

    def forward(self, x):
        if x.is_cuda or torch.is_grad_enabled():
            return self.net["2"](self.net["0"](x))
        # The inner tensors are eight times as wide as x. Those of a few frames stay in a CPU's
        # cache; those of a whole clip would take new pages of memory at each operation.
        parts = x.flatten(0, -2).split(CHUNK_TOKENS)
        return torch.cat([self.net["2"](self.net["0"](part)) for part in parts]).view_as(x)


class TransformerBlock(nn.Module):
    """Self-attention inside each frame, cross-attention to the clip's text, feed-forward."""

    def __init__(self, channels, num_heads, context_channels):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, context_channels)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.temporal = None  # attention over time beside attn1, in one variant of temporal.py

    def forward(self, x, context):
        """x (b, t, h * w, c) and hidden states (b, n, d) to (b, t, h * w, c)."""
        b, t, _, _ = x.shape
        y = self.norm1(x)
        attended = self.attn1(y.flatten(0, 1)).unflatten(0, (b, t))  # each frame by itself
        if self.temporal is not None:
            attended = attended + self.temporal(y)
        x = x + attended
        # The text is one for all frames, so all places of all frames are one row of queries: keys
        # and values of the text are computed once a clip, not once a frame.
        y = self.norm2(x).flatten(1, 2)  # b t (h w) c -> b (t h w) c
        x = x + self.attn2(y, context).unflatten(1, (t, -1))
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Images to tokens, a transformer block, and back, around a residual connection."""

    def __init__(self, channels, num_heads, context_channels, groups, linear):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)  # as in the checkpoints
        self.linear = linear  # Stable Diffusion 2; 1 has 1x1 convolutions
        project = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
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
