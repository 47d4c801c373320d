"""The temporal shift: how Latent-Shift makes an image model see motion without a new parameter.

A 2-D U-Net looks at every frame alone. Before its convolutions we exchange a part of the channels
between neighbouring frames:

    frame i     [ a third from frame i-1 | a third from frame i+1 | a third of its own ]

The 2-D convolution that follows mixes channels anyway, so now it mixes past, present and future: it
acts as a convolution over three frames, and the only cost is moving memory. What leaves the clip is
dropped, and zeros come in at its ends.

Latent-Shift, An et al. 2023, section 3.2; the idea is the Temporal Shift Module, Lin et al. 2019.
"""

import torch


def temporal_shift(x, fold=None, causal=False):
    """Shift a part of the channels one frame forward in time and an equal part one frame backward.

    x is (b, t, c, ...) of any dtype. In the result, of the same shape and memory layout, channels
    [0, fold) of frame i are frame i-1's, channels [fold, 2 fold) are frame i+1's, the others are
    frame i's own; zeros stand where there is no such frame. fold is c // 3 unless given. A causal
    shift leaves out the second part: those channels stay, and a frame sees only the past.

    Raises:
        ValueError: if x has fewer than three axes, or if not 0 < 2 * fold <= c.
    """
    if x.ndim < 3:
        raise ValueError(f"temporal_shift needs x of shape (b, t, c, ...), got {tuple(x.shape)}")
    fold = x.shape[2] // 3 if fold is None else fold
    if not isinstance(fold, int) or not 0 < 2 * fold <= x.shape[2]:
        raise ValueError(f"temporal_shift needs 0 < 2*fold <= c, got fold={fold}, c={x.shape[2]}")
    return _Shift.apply(x, fold, 1, causal)


# The whole idea in four lines; _Shift gives the same numbers and gradients, faster:
#     out = torch.zeros_like(x)
#     out[:, 1:, :fold] = x[:, :-1, :fold]                          # one frame forward in time
#     out[:, :-1, fold : 2 * fold] = x[:, 1:, fold : 2 * fold]      # one frame backward
#     out[:, :, 2 * fold :] = x[:, :, 2 * fold :]                   # the frame's own channels


class _Shift(torch.autograd.Function):
    """The shift only moves numbers, so its gradient is the opposite shift.

    Autograd could derive that from the copies, but it would keep a copy of the gradient for each of
    them. Written by hand, each direction reads and writes every number once.
    """

    @staticmethod
    def forward(x, fold, step, causal):
        """Move channels [0, fold) by `step` (1 or -1) frames, channels [fold, 2 fold) by -step."""
        out = torch.empty_like(x)  # keeps the strides, so channels_last stays channels_last
        first, second = slice(0, fold), slice(fold, fold if causal else 2 * fold)
        later, earlier = (first, second) if step == 1 else (second, first)
        out[:, :: max(1, x.shape[1] - 1), : second.stop] = 0  # the clip's ends; half is overwritten
        out[:, 1:, later] = x[:, :-1, later]
        out[:, :-1, earlier] = x[:, 1:, earlier]
        out[:, :, second.stop :] = x[:, :, second.stop :]
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.fold, ctx.step, ctx.causal = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Shift.apply(grad, ctx.fold, -ctx.step, ctx.causal), None, None, None
