"""Other papers' layers instead of the shift, selected by one word of the U-Net's config.

    none        no layer; each frame is an image by itself
    shift       a third of the channels moves one frame forward, a third backward (Latent-Shift).
                This is one line of ResnetBlock.forward and has no layer here.
    attention   after each layer, each position attends to itself in all frames (Latent-VDM, the
                baseline of An et al. 2023; LVDM, He et al. 2022, which has relative positions)
    joint       the same, but each position attends to all positions of all frames at once
    directed    after convolutions, a scale and an offset per frame; beside spatial attention,
                attention to this frame and earlier ones (MagicVideo, Zhou et al. 2022)
    conv        after convolutions, one over time (Make-A-Video, Singer et al. 2022, section 3.2)

All layers of this file are initialised as the identity, so each variant starts as the image model.
Their parameters, and no others, have "temporal" in their names. A clip of one frame skips every
temporal layer, before training and after, so the image model stays whole. model.py puts the layers
at three positions of the U-Net, by the functions at the end.
"""

import torch
from torch import nn

from layers import Attention, LayerNorm, sinusoids

MAX_SEQUENCES = 2**15  # at a time; some attention kernels of GPUs take at most 65,535
VARIANTS = ("none", "shift", "attention", "joint", "directed", "conv")


def temporal_state(network):
    """The part of a network's state dict that an image model lacks; {} for the shift."""
    return {name: value for name, value in network.state_dict().items() if "temporal" in name}


def first_frames(table, num_frames):
    """The rows of a table (max_frames, ...) for a clip. Raises ValueError if it has too few."""
    if num_frames > len(table):
        raise ValueError(f"clips need at most max_frames={len(table)} frames, since the model has "
                         f"parameters for each, got {num_frames}")
    return table[:num_frames]  # t ...


class TemporalConvolution(nn.Conv2d):
    """A convolution over three frames at each position, initialised to copy the middle one.

    It is a 2-D convolution whose axes are time and position, so nothing has to be moved in memory.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1), padding=(1, 0))
        nn.init.dirac_(self.weight)  # 1 at the middle tap of each channel's own kernel
        nn.init.zeros_(self.bias)

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        y = super().forward(x.flatten(3).transpose(1, 2))  # b t c h w -> b c t (h w)
        return y.transpose(1, 2).unflatten(3, x.shape[3:])


class FrameAdaptor(nn.Module):
    """z_i = S_i * z_i + B_i, a scale and an offset for each frame and channel. MagicVideo."""

    def __init__(self, channels, max_frames):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(max_frames, channels))  # S
        self.offset = nn.Parameter(torch.zeros(max_frames, channels))  # B

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        scale, offset = (first_frames(y, x.shape[1]) for y in (self.scale, self.offset))
        return x * scale[..., None, None] + offset[..., None, None]  # t c -> t c 1 1


class AttentionOverTime(Attention):
    """Self-attention of each position over the frames of tokens (b, t, n, c); 0 before training."""

    def __init__(self, channels, num_heads):
        super().__init__(channels, num_heads)
        nn.init.zeros_(self.to_out[0].weight)
        nn.init.zeros_(self.to_out[0].bias)

    def forward(self, x, mask=None):
        b, t, n, _ = x.shape
        # Attention mixes the second axis, so move frames there and positions into the batch.
        x = x.transpose(1, 2).flatten(0, 1).split(MAX_SEQUENCES)  # b t n c -> (b n) t c, in parts
        x = torch.cat([Attention.forward(self, part, mask=mask) for part in x])
        return x.unflatten(0, (b, n)).transpose(1, 2)  # (b n) t c -> b t n c


class JointAttention(AttentionOverTime):
    """Self-attention of each position to all positions of all frames of tokens (b, t, n, c)."""

    def forward(self, x):
        return Attention.forward(self, x.flatten(1, 2)).view_as(x)  # b t n c -> b (t n) c and back


class DirectedAttention(AttentionOverTime):
    """A frame's attention to itself and earlier ones, added to spatial attention. MagicVideo."""

    def forward(self, x):
        t = x.shape[1]
        if t == 1:
            return torch.zeros_like(x)  # nothing is added to an image's spatial attention
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()  # row i: columns <= i
        return super().forward(x, past)


class TemporalAttention(nn.Module):
    """x + attention(norm(x) + positions), for clips x (b, t, c, h, w).

    The embeddings of frame positions are learned. They start as sinusoids, because attention sees
    frames as a set and could not tell their order if all were equal. Directed attention also works
    without positions (max_frames None), and then takes any number of frames.
    """

    def __init__(self, channels, attention, max_frames=None):
        super().__init__()
        self.norm = LayerNorm(channels)  # over the channels of each position
        self.attention = attention
        self.positions = None
        if max_frames is not None:
            self.positions = nn.Parameter(sinusoids(torch.arange(max_frames), channels))

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        tokens = self.norm(x.flatten(3).transpose(2, 3))  # b t c h w -> b t (h w) c
        if self.positions is not None:
            tokens = tokens + first_frames(self.positions, x.shape[1])[:, None]  # t c -> t 1 c
        y = self.attention(tokens)  # b t (h w) c
        return x + y.transpose(2, 3).unflatten(3, x.shape[3:])  # b t (h w) c -> b t c h w


def after_convolution(variant, channels, max_frames):
    """The layer after each convolution of a ResnetBlock; the identity in most variants."""
    if variant == "conv":  # Make-A-Video
        return TemporalConvolution(channels)
    if variant == "directed":  # MagicVideo
        return FrameAdaptor(channels, max_frames)
    return nn.Identity()


def beside_attention(variant, channels, num_heads):
    """The attention over time beside a transformer's spatial one, or None."""
    return DirectedAttention(channels, num_heads) if variant == "directed" else None


def after_layer(variant, channels, num_heads, max_frames):
    """The layer after each pair of ResnetBlock and Transformer2D.

    The papers have one per transformer. Here a level without transformers has one per ResnetBlock,
    because the tiny U-Net has no transformer at its finest level, where motion shows best.
    """
    kinds = {"attention": AttentionOverTime, "joint": JointAttention}
    if variant not in kinds:
        return nn.Identity()
    return TemporalAttention(channels, kinds[variant](channels, num_heads), max_frames)
