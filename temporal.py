"""What others use instead of the shift, chosen by one word of the U-Net's config. Read after
model.py, which imports this file.

    none        nothing: each frame is an image by itself
    shift       in front of convolutions, a part of the channels moves one frame (Latent-Shift); it
                is two lines in ResnetBlock.forward and has no layer here
    attention   behind each layer, a place attends to itself in all frames (Latent-VDM, the baseline
                of An et al. 2023; LVDM, He et al. 2022, with relative positions)
    joint       the same, but a place attends to all places of all frames, in one attention
    directed    behind convolutions, a scale and an offset for each frame; beside the spatial
                attention, attention to this frame and earlier ones (MagicVideo, Zhou et al. 2022)
    conv        behind convolutions, one over time (Make-A-Video, Singer et al. 2022, section 3.2)

All layers of this file are initialised as the identity, so each variant starts as the image model.
Their parameters have "temporal" in their names, and no others have. An image has no time: a clip of
one frame skips every temporal layer, before training and after, so the image model stays whole.
"""

import torch
from torch import nn

from layers import Attention, LayerNorm, ResnetBlock, sinusoids
from transformer import TransformerBlock

VARIANTS = ("none", "shift", "attention", "joint", "directed", "conv")
DECODER_HEADS = 4  # of attention over time in an autoencoder's decoder


def add_temporal_layers(unet):
    """Put the layers of the config's variant into a new U-Net; nothing for "none" and "shift"."""
    config = unet.config
    for block in list(unet.modules()):  # a list, since the loop adds modules
        if isinstance(block, ResnetBlock):
            channels = block.conv2.out_channels
            if config.temporal == "conv":
                block.temporal_after1 = TemporalConvolution(channels)
                block.temporal_after2 = TemporalConvolution(channels)
            elif config.temporal == "directed":
                block.temporal_after1 = FrameAdaptor(channels, config.max_frames)
                block.temporal_after2 = FrameAdaptor(channels, config.max_frames)
        elif isinstance(block, TransformerBlock) and config.temporal == "directed":
            channels, num_heads = block.norm1.normalized_shape[0], block.attn1.num_heads
            block.temporal = DirectedAttention(channels, num_heads)
    if config.temporal in ("attention", "joint"):
        # The papers have one behind each spatial transformer. Here layers without a transformer get
        # one, too: the tiny U-Net has none at its finest level, where motion shows best.
        heads = config.num_heads
        levels = [*zip(unet.down_blocks, heads, strict=True), (unet.mid_block, heads[-1]),
                  *zip(unet.up_blocks, heads[::-1], strict=True)]
        for level, num_heads in levels:
            channels = level.resnets[0].conv2.out_channels
            for _ in range(1 if level is unet.mid_block else len(level.resnets)):
                attention = ATTENTIONS[config.temporal](channels, num_heads)
                level.temporal.append(TemporalAttention(channels, attention, config.max_frames))


def add_decoder_layers(decoder, config):
    """Put the layers of a VAEConfig's variant into an autoencoder's new decoder."""
    for level in decoder.up_blocks:
        channels = level.resnets[0].conv2.out_channels
        if config.temporal in ATTENTIONS:
            attention = ATTENTIONS[config.temporal](channels, DECODER_HEADS)
            max_frames = None if config.temporal == "directed" else config.max_frames
            level.temporal.append(TemporalAttention(channels, attention, max_frames))
        for block in level.resnets:
            if config.temporal == "shift":
                block.shift_before = ("conv1", "conv2")
            elif config.temporal == "conv":
                block.temporal_after1 = TemporalConvolution(channels)
                block.temporal_after2 = TemporalConvolution(channels)


def temporal_state(unet):
    """The part of a U-Net's state dict that an image model does not have; {} for the shift."""
    return {name: value for name, value in unet.state_dict().items() if "temporal" in name}


@torch.no_grad()
def start_as_shift(unet):
    """Initialise a U-Net's temporal convolutions as the shift, a third of the channels each way."""
    for layer in unet.modules():
        if isinstance(layer, TemporalConvolution):
            c, fold = layer.out_channels, layer.out_channels // 3
            # Tap 0 of the kernel looks at the frame before, tap 1 at the frame itself, 2 after it.
            taps = torch.tensor([0] * fold + [2] * fold + [1] * (c - 2 * fold))
            layer.weight.zero_()
            layer.weight[torch.arange(c), torch.arange(c), taps, 0] = 1


def first_frames(table, num_frames):
    """The rows of a table (max_frames, ...) for a clip. Raises ValueError if it has too few."""
    if num_frames > len(table):
        raise ValueError(f"clips need at most max_frames={len(table)} frames, since the model has "
                         f"parameters for each, got {num_frames}")
    return table[:num_frames]


class TemporalConvolution(nn.Conv2d):
    """A convolution over three frames at each place, initialised to copy the middle one.

    It is a 2-D convolution whose axes are time and place, so nothing has to be moved in memory.
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
        self.scale = nn.Parameter(torch.ones(max_frames, channels))
        self.offset = nn.Parameter(torch.zeros(max_frames, channels))

    def forward(self, x):
        if x.shape[1] == 1:  # an image: see the top of this file
            return x
        scale, offset = (first_frames(y, x.shape[1]) for y in (self.scale, self.offset))
        return x * scale[..., None, None] + offset[..., None, None]  # t c -> t c 1 1


class AttentionOverTime(Attention):
    """Self-attention of each place over the frames of tokens (b, t, n, c); 0 before training."""

    def __init__(self, channels, num_heads):
        super().__init__(channels, num_heads)
        nn.init.zeros_(self.to_out[0].weight)
        nn.init.zeros_(self.to_out[0].bias)

    def forward(self, x, mask=None):
        b, t, n, _ = x.shape
        # Attention mixes the second axis: with places in the batch, frames stand there.
        x = super().forward(x.transpose(1, 2).flatten(0, 1), mask=mask)  # b t n c -> (b n) t c
        return x.unflatten(0, (b, n)).transpose(1, 2)  # (b n) t c -> b t n c


class TemporalAttention(nn.Module):
    """x + attention (norm(x) + positions), of clips (b, t, c, h, w).

    Positions of frames are learned. They start as sinusoids: if all were equal, attention, which
    sees its frames as a set, could not tell their order. Directed attention can do without them
    (max_frames None), and then takes any number of frames.
    """

    def __init__(self, channels, attention, max_frames=None):
        super().__init__()
        self.norm = LayerNorm(channels)
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
        y = self.attention(tokens)
        return x + y.transpose(2, 3).unflatten(3, x.shape[3:])  # b t (h w) c -> b t c h w


class JointAttention(AttentionOverTime):
    """Self-attention of each place to all places of all frames of tokens (b, t, n, c)."""

    def forward(self, x):
        return Attention.forward(self, x.flatten(1, 2)).view_as(x)  # b (t n) c -> b t n c


class DirectedAttention(AttentionOverTime):
    """A frame's attention to itself and earlier ones, added to the spatial one's. MagicVideo."""

    def forward(self, x):
        t = x.shape[1]
        if t == 1:
            return torch.zeros_like(x)
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()  # row i: columns <= i
        return super().forward(x, past)


ATTENTIONS = {"attention": AttentionOverTime, "joint": JointAttention,
              "directed": DirectedAttention}
