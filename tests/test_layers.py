"""The layers by themselves: slow references and values by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from recorded.rule import fill, normal

from layers import Attention, Downsample, ResnetBlock, Upsample, per_frame, sinusoids
from shift import temporal_shift

EPS = 0.02  # large, so that it shows in every output


@pytest.mark.parametrize("axes", [(5,), (2, 3), (2, 3, 4)])
def test_a_layer_for_images_takes_each_image_by_itself(axes):
    x = normal(*axes, 3, 5, 6)
    out = per_frame(lambda images: images.cumsum(1)[:, :2, 1:], x)  # (n, 3, 5, 6) -> (n, 2, 4, 6)
    assert torch.equal(out, x.cumsum(-3)[..., :2, 1:, :])


def test_sinusoids_are_cosines_then_sines_of_falling_frequency():
    out = sinusoids(torch.tensor([0, 3, 40]), 10)
    angles = [[n * 10000 ** (-i / 5) for i in range(5)] for n in (0, 3, 40)]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(out, torch.tensor(expected), atol=1e-5, rtol=0)


# The residual block


def by_steps(block, x, time, scale_shift=False, shift_before=(), shift_fold=3, shift_causal=False):
    """The block's formula on x (b, t, c, h, w), each layer from its numbers."""
    b, t, c = x.shape[:3]

    def normed(y, norm):
        y = F.group_norm(y.flatten(0, 1), 3, norm.weight, norm.bias, EPS)
        return y.unflatten(0, (b, t))

    def convolved(y, name, conv):
        if name in shift_before and t > 1:
            y = temporal_shift(y, y.shape[2] // shift_fold, shift_causal)
        return F.conv2d(y.flatten(0, 1), conv.weight, conv.bias, padding=1).unflatten(0, (b, t))

    y = convolved(F.silu(normed(x, block.norm1)), "conv1", block.conv1)
    scale, offset = torch.zeros(2, b, 1, 9, 1, 1)
    if time is not None:
        projected = time @ block.time_emb_proj.weight.T + block.time_emb_proj.bias
        if scale_shift:
            scale, offset = projected.view(b, 2, 1, 9, 1, 1).unbind(1)
        else:
            y = y + projected.view(b, 1, 9, 1, 1)
    y = normed(y, block.norm2) * (1 + scale) + offset
    y = convolved(F.silu(y), "conv2", block.conv2)
    if c == 9:
        return x + y
    weight = block.conv_shortcut.weight[:, :, 0, 0]
    return torch.einsum("oc,btchw->btohw", weight, x) + block.conv_shortcut.bias.view(9, 1, 1) + y


def assert_equals_its_formula(x, options, time=None):
    channels = None if time is None else time.shape[1]
    block = fill(ResnetBlock(x.shape[2], 9, 3, EPS, channels, **options)).double()
    with torch.no_grad():
        torch.testing.assert_close(block(x, time), by_steps(block, x, time, **options))


BOTH = ("conv1", "conv2")


@pytest.mark.parametrize("options", [
    {}, {"shift_before": ("conv1",)}, {"shift_before": ("conv2",)}, {"shift_before": BOTH},
    {"shift_before": BOTH, "shift_fold": 4}, {"shift_before": BOTH, "shift_causal": True},
])
@pytest.mark.parametrize("channels", [6, 9])
def test_a_block_equals_its_formula(channels, options):
    assert_equals_its_formula(normal(2, 4, channels, 5, 6).double(), options)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_only_a_single_frame_is_not_shifted(num_frames):
    assert_equals_its_formula(normal(2, num_frames, 6, 5, 4).double(), {"shift_before": BOTH})


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}])
def test_the_time_is_added_or_scales_and_offsets(options):
    x, time = normal(2, 4, 6, 5, 3).double(), normal(2, 7, seed=2).double()
    assert_equals_its_formula(x, options, time)


@torch.no_grad()
def test_temporal_layers_stand_behind_their_convolutions():
    x, block, seen = normal(2, 4, 6, 5, 3), fill(ResnetBlock(6, 6, 3, EPS)), []
    for name in BOTH:
        getattr(block, name).register_forward_hook(lambda _, args, out: seen.append(out))
    block.temporal_after1 = lambda y: seen.append(y) or y
    block.temporal_after2 = lambda y: seen.append(y) or torch.zeros_like(y)
    assert torch.equal(block(x), x)  # the last one ends the branch
    conv1, after1, conv2, after2 = seen
    assert torch.equal(after1.flatten(0, 1), conv1) and torch.equal(after2.flatten(0, 1), conv2)


# Other sizes


def of_ones(layer):
    """The layer with a convolution that adds up 3 x 3 places."""
    torch.nn.init.ones_(layer.conv.weight), torch.nn.init.zeros_(layer.conv.bias)
    return layer


@pytest.mark.parametrize("asymmetric, expected", [
    ({}, [[4, 6], [6, 9]]),  # reads zeros above and on the left
    ({"asymmetric": True}, [[9, 6], [6, 4]]),  # below and on the right
])
def test_downsampling_by_hand(asymmetric, expected):
    out = of_ones(Downsample(1, **asymmetric))(torch.ones(2, 3, 1, 4, 4))
    assert torch.equal(out, torch.tensor(expected).float().expand(2, 3, 1, 2, 2))


def test_upsampling_by_hand():
    x = torch.tensor([[1.0, 2.0]]).expand(2, 3, 1, 1, 2)  # becomes 1 1 2 2, twice
    out = of_ones(Upsample(1))(x)
    assert torch.equal(out, torch.tensor([[4.0, 8, 10, 8]]).expand(2, 3, 1, 2, 4))


# Attention


def by_loops(attention, x, context, mask):
    """One query of one head of one clip at a time."""
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    out, size = torch.zeros_like(q), x.shape[2] // 3  # three heads
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for head in (slice(0, size), slice(size, 2 * size), slice(2 * size, 3 * size)):
                scores = k[b, :, head] @ q[b, n, head] / math.sqrt(size)
                scores[~mask[n]] = -math.inf
                out[b, n, head] = scores.softmax(0) @ v[b, :, head]
    return attention.to_out[0](out)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context_channels", [None, 8])
@torch.no_grad()
def test_attention_equals_a_loop_over_queries(context_channels, masked):
    attention = fill(Attention(12, 3, context_channels)).double()
    x = normal(2, 5, 12).double()
    context = normal(2, 4, 8, seed=2).double() if context_channels else None
    sources = 4 if context_channels else 5
    mask = torch.ones(5, sources, dtype=torch.bool).tril() if masked else None
    read = x if context is None else context
    looks = torch.ones(5, sources, dtype=torch.bool) if mask is None else mask
    expected = by_loops(attention, x, read, looks)
    torch.testing.assert_close(attention(x, context, mask), expected)


@pytest.mark.parametrize("options, expected", [({}, False), ({"bias": True}, True)])
def test_projections_have_a_bias_only_if_asked_for(options, expected):
    attention = Attention(4, 2, **options)
    assert [getattr(attention, name).bias is not None
            for name in ("to_q", "to_k", "to_v")] == [expected] * 3
    assert attention.to_out[0].bias is not None
