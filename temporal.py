"""How frames talk: the paper's shift and its neighbours, chosen by one word of the U-Net's config.

    none        not at all: each frame is a picture by itself
    shift       before convolutions, channels move a frame on or back (Latent-Shift, An et al. 2023)
    attention   behind each layer, a place looks at itself in all frames (Latent-VDM, which An et
                al. compare with; LVDM, He et al. 2022)
    directed    behind convolutions, a scale and an offset for each frame; beside the spatial
                attention, one over time that looks only back (MagicVideo, Zhou et al. 2022)
    conv        behind convolutions, one over time (Make-A-Video, Singer et al. 2022, section 3.2)

The shift has no parameters. All others begin as the image model: what they add is zero, or what
they multiply by one. Each of their parameters has "temporal" in its name, and no other has. A
picture has no time: it goes by all of them untouched, before training and after, so what draws it
is the image model's layers and no others.

The U-Net asks three questions: what stands around a convolution, beside a spatial attention, and
behind a layer? A module that does nothing is an answer, too.
"""

import math

import torch
from torch import nn

from layers import Attention
from shift import temporal_shift

WAYS = ("none", "shift", "attention", "directed", "conv")


def around_convolutions(config, channels):
    """Modules before and after conv1, before and after conv2 of a ResnetBlock: four.

    They take and return clips (b, t, c, h, w); `channels` are those that leave a convolution.
    """
    modules = []
    for place in ("conv1", "conv2"):
        before, after = nn.Identity(), nn.Identity()
        if config.temporal == "shift" and config.shift_before in (place, "both"):
            before = Shift(config.shift_fold, config.shift_causal)
        elif config.temporal == "conv":
            after = TemporalConvolution(channels)
        elif config.temporal == "directed":
            after = FrameAdaptor(channels, config.max_frames)
        modules += [before, after]
    return modules


def beside_attention(config, channels, num_heads):
    """A module of two: the tokens (b, t, n, c) that a spatial attention sees, and what it makes."""
    if config.temporal == "directed":
        return DirectedAttention(channels, num_heads)
    return SpatialOnly()


def after_layer(config, channels, num_heads):
    """A module behind a ResnetBlock, or behind the Transformer2D that follows it, of clips.

    The papers have one behind each spatial transformer. Here levels without transformers have one,
    too: the tiny U-Net has none at its finest level, where motion is to be seen best.
    """
    if config.temporal == "attention":
        return TemporalAttention(channels, num_heads, config.max_frames)
    return nn.Identity()


def new_names(unet):
    """The names in a U-Net's state dict that an image model has not."""
    return [name for name in unet.state_dict() if "temporal" in name]


def start_as_shift(unet):
    """Let the convolutions over time of a U-Net begin as the shift, not as the image model."""
    for module in unet.modules():
        if isinstance(module, TemporalConvolution):
            module.start_as_shift()


def first_frames(table, num_frames):
    """The rows of a table (max_frames, ...) for a clip. Raises ValueError if it has too few."""
    if num_frames > len(table):
        raise ValueError(f"clips need at most max_frames={len(table)} frames, since the model has "
                         f"parameters for each, got {num_frames}")
    return table[:num_frames]


class Shift(nn.Module):
    """The temporal shift of 1 / `fold` of the channels each way.

    With zeros in place of its neighbours a picture would lose two thirds of its channels.
    """

    def __init__(self, fold, causal):
        super().__init__()
        self.fold, self.causal = fold, causal

    def forward(self, x):
        return x if x.shape[1] == 1 else temporal_shift(x, x.shape[2] // self.fold, self.causal)


class TemporalConvolution(nn.Conv2d):
    """A convolution over three frames at each place, which at first hands on the middle one.

    Time and place are the two axes of a 2-D convolution, so that nothing has to be moved in memory.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1), padding=(1, 0))
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_as_shift(self):
        """Hand on the frame before in a third of the channels, the frame after in a third."""
        c = self.out_channels
        taps = torch.tensor([0] * (c // 3) + [2] * (c // 3) + [1] * (c - 2 * (c // 3)))
        self.weight.zero_()
        self.weight[torch.arange(c), torch.arange(c), taps, 0] = 1

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        y = super().forward(x.flatten(3).transpose(1, 2))  # b t c h w -> b c t (h w)
        return y.transpose(1, 2).unflatten(3, x.shape[3:])


class FrameAdaptor(nn.Module):
    """z_i = S_i * z_i + B_i, a scale and an offset for each frame and channel. MagicVideo."""

    def __init__(self, channels, max_frames):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(max_frames, channels))
        self.offset = nn.Parameter(torch.zeros(max_frames, channels))

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        scale, offset = (first_frames(y, x.shape[1]) for y in (self.scale, self.offset))
        return x * scale[..., None, None] + offset[..., None, None]


class OverTime(Attention):
    """Self-attention over the frames (b, t, n, c) of each place, silent until it is trained."""

    def __init__(self, channels, num_heads):
        super().__init__(channels, num_heads)
        nn.init.zeros_(self.to_out[0].weight)
        nn.init.zeros_(self.to_out[0].bias)

    def forward(self, x, mask=None):
        b, t, n, _ = x.shape
        x = super().forward(x.transpose(1, 2).flatten(0, 1), mask=mask)  # b t n c -> (b n) t c
        return x.unflatten(0, (b, n)).transpose(1, 2)


class TemporalAttention(nn.Module):
    """x + attention over time (norm(x) + positions), of clips (b, t, c, h, w).

    Positions are learnt, and begin as sinusoids: alike, they would leave attention blind to order.
    """

    def __init__(self, channels, num_heads, max_frames):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = OverTime(channels, num_heads)
        self.positions = nn.Parameter(sinusoids(max_frames, channels))

    def forward(self, x):
        if x.shape[1] == 1:
            return x
        tokens = self.norm(x.flatten(3).transpose(2, 3))  # b t c h w -> b t (h w) c
        tokens = tokens + first_frames(self.positions, x.shape[1])[:, None]
        y = self.attention(tokens)
        return x + y.transpose(2, 3).unflatten(3, x.shape[3:])


def sinusoids(max_frames, channels):
    """Frame indices as sines and cosines of falling frequency. Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(-math.log(10000) * torch.arange(0, channels, 2) / channels)
    angles = torch.arange(max_frames)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class SpatialOnly(nn.Module):
    """What the spatial attention makes, and nothing beside it."""

    def forward(self, x, attended):
        return attended


class DirectedAttention(OverTime):
    """Adds attention over time in which a frame sees itself and earlier ones. MagicVideo."""

    def forward(self, x, attended):
        if x.shape[1] == 1:
            return attended
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return attended + super().forward(x, past)
