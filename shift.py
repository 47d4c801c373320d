"""The temporal shift: how Latent-Shift makes an image model see motion without a new parameter.

A 2-D U-Net looks at every frame alone. After a convolution in each of its ResNet blocks, we replace
two thirds of each frame's channels with the same channels of its neighbours:

    frame i     [ a third from frame i-1 | a third of its own | a third from frame i+1 ]

The next 2-D convolution mixes channels anyway. Now it mixes past, present and future, so it acts as
a convolution over three frames. The shift itself only moves memory. Channels shifted past either
end of the clip are dropped; zeros take their place.

Latent-Shift, An et al. 2023, section 3.2. Forerunners: Temporal Shift Module, Lin et al. 2019;
Temporal Shift GAN, Munoz et al. 2020.
"""

import torch


def temporal_shift(x, fold=None):
    """Shift `fold` channels of clips (b, t frames, c, ...) one frame forward, and `fold` backward.

    fold is c // 3 unless given. The result has x's shape, dtype and memory layout. A clip of one
    frame, an image, has no neighbours and is returned unchanged.

    Raises ValueError unless x has three axes or more and 0 < 2 * fold <= c.
    """
    if x.ndim < 3:
        raise ValueError(f"temporal_shift needs x of shape (b, t, c, ...), got {tuple(x.shape)}")
    fold = x.shape[2] // 3 if fold is None else fold  # a third of the channels
    if not 0 < 2 * fold <= x.shape[2]:
        raise ValueError(f"temporal_shift needs 0 < 2*fold <= c, got fold={fold}, c={x.shape[2]}")
    if x.shape[1] == 1:
        return x  # an image has no neighbours
    shift = move if torch.compiler.is_compiling() else Shift.apply
    return shift(x, slice(0, fold), slice(x.shape[2] - fold, x.shape[2]))


def move(x, to_next, to_previous):
    """Move the channels of slice `to_next` one frame forward in time, `to_previous` backward."""
    out = x.clone()  # torch.cat of three parts would lose the channels_last layout
    out[:, 1:, to_next] = x[:, :-1, to_next]  # frame i gets frame i-1's channels
    out[:, 0, to_next] = 0  # nothing comes before the first frame
    out[:, :-1, to_previous] = x[:, 1:, to_previous]  # frame i gets frame i+1's channels
    out[:, -1, to_previous] = 0  # and nothing after the last
    return out


class Shift(torch.autograd.Function):
    """The gradient of a shift is the opposite shift.

    Autograd finds the same gradient, but its extra copies make the tiny model train 5 % slower.
    torch.compile removes those copies, so it gets `move` itself.
    """

    generate_vmap_rule = True  # torch.vmap maps the functions below

    @staticmethod
    def forward(x, to_next, to_previous):
        return move(x, to_next, to_previous)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.slices = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        return Shift.apply(grad, *reversed(ctx.slices)), None, None  # each slice moves back

    @staticmethod
    def jvp(ctx, tangent, *_):
        return Shift.apply(tangent, *ctx.slices)  # a shift is linear
