"""The layers by themselves: slow references, values by hand, and where the shift stands."""

import math

import pytest
import torch
import torch.nn.functional as F
from recorded.rule import fill, normal
from torch import nn

from layers import (Attention, Downsample, FeedForward, GroupNorm, LayerNorm, ResnetBlock,
                    Transformer2D, TransformerBlock, Upsample, per_frame, sinusoids)
from shift import temporal_shift

EPS = 0.02  # large, so that it shows in every output


@pytest.mark.parametrize("axes", [(5,), (2, 3), (2, 3, 4)])
def test_per_frame_gives_a_layer_each_image_by_itself(axes):
    x = normal(*axes, 3, 5, 6)
    out = per_frame(lambda images: images.cumsum(1)[:, :2, 1:], x)  # (n, 3, 5, 6) -> (n, 2, 4, 6)
    assert torch.equal(out, x.cumsum(-3)[..., :2, 1:, :])


def test_sinusoids_are_cosines_then_sines_of_falling_frequency():
    out = sinusoids(torch.tensor([0, 3, 40]), 10)
    angles = [[n * 10000 ** (-i / 5) for i in range(5)] for n in (0, 3, 40)]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(out, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", [GroupNorm(2, 6), LayerNorm(6)])
def test_norms_return_the_dtype_of_autocast_and_otherwise_their_own(norm):
    x = normal(2, 6, 6)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert norm.to("meta")(x.to("meta")).dtype == torch.float32  # autocast lacks meta


# The residual block


class Add(nn.Module):
    """Replaces a norm: adds a number so large that SiLU after it is the identity in float32."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


def block_that_leaves_digits(**options):
    """A block whose norms and convolutions add 100, 1000, 10000 and 100000, and change nothing."""
    block = ResnetBlock(3, 3, 1, EPS, **options)
    block.norm1, block.norm2 = Add(100), Add(10_000)
    for conv, number in ((block.conv1, 1000.0), (block.conv2, 100_000.0)):
        nn.init.dirac_(conv.weight), nn.init.constant_(conv.bias, number)
    return block


FRAMES = [[1, 2, 3],
          [4, 5, 6],
          [7, 8, 9]]


@pytest.mark.parametrize("options, expected", [
    # x + (x + 111100)
    ({}, [[111102, 111104, 111106],
          [111108, 111110, 111112],
          [111114, 111116, 111118]]),
    # The zeros of the shift enter after conv1 and before norm2, so they become 110000.
    ({"shifts": 1}, [[1 + 110000, 2 + 111102, 3 + 111106],
                     [4 + 111101, 5 + 111105, 6 + 111109],
                     [7 + 111104, 8 + 111108, 9 + 110000]]),
    # The second shift ends the branch, so x is added to its zeros.
    ({"shifts": 2}, [[1 + 0, 2 + 111102, 3 + 111109],
                     [4 + 110000, 5 + 111105, 6 + 110000],
                     [7 + 111101, 8 + 111108, 9 + 0]]),
])
@torch.no_grad()
def test_one_shift_stands_after_conv1_and_a_second_one_at_the_end_of_the_branch(options, expected):
    x = torch.tensor([FRAMES])[..., None, None].float()  # b t c -> b t c h w
    out = block_that_leaves_digits(**options)(x)
    assert out[..., 0, 0].tolist() == [expected]


def by_steps(block, x, time, shifts=0, scale_shift=False):
    """The block's formula on x (b, t, c, h, w), each layer from its numbers."""
    b, t, c = x.shape[:3]

    def normed(y, norm):
        y = F.group_norm(y.flatten(0, 1), 3, norm.weight, norm.bias, EPS)
        return y.unflatten(0, (b, t))

    def convolved(y, conv):
        return F.conv2d(y.flatten(0, 1), conv.weight, conv.bias, padding=1).unflatten(0, (b, t))

    y = convolved(F.silu(normed(x, block.norm1)), block.conv1)
    y = temporal_shift(y) if shifts >= 1 else y
    scale, offset = torch.zeros(2, b, 1, 9, 1, 1)
    if time is not None:
        projected = time @ block.time_emb_proj.weight.T + block.time_emb_proj.bias
        if scale_shift:
            scale, offset = projected.view(b, 2, 1, 9, 1, 1).unbind(1)
        else:
            y = y + projected.view(b, 1, 9, 1, 1)
    y = normed(y, block.norm2) * (1 + scale) + offset
    y = convolved(F.silu(y), block.conv2)
    y = temporal_shift(y) if shifts == 2 else y
    if c == 9:
        return x + y
    weight = block.conv_shortcut.weight[:, :, 0, 0]
    return torch.einsum("oc,btchw->btohw", weight, x) + block.conv_shortcut.bias.view(9, 1, 1) + y


@pytest.mark.parametrize("options", [{}, {"shifts": 1}, {"shifts": 2}, {"scale_shift": True},
                                     {"scale_shift": True, "shifts": 2}])
@pytest.mark.parametrize("channels, time_channels", [(9, None), (6, 4)])
@torch.no_grad()
def test_a_block_equals_its_formula(channels, time_channels, options):
    block = fill(ResnetBlock(channels, 9, 3, EPS, time_channels, **options)).double()
    x = normal(2, 3, channels, 5, 7).double()
    time = None if time_channels is None else normal(2, time_channels, seed=2).double()
    torch.testing.assert_close(block(x, time), by_steps(block, x, time, **options))


@torch.no_grad()
def test_an_image_is_not_shifted():
    x = normal(2, 1, 6, 4, 5)
    images = [fill(ResnetBlock(6, 9, 3, EPS, shifts=shifts))(x) for shifts in (0, 1, 2)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


@torch.no_grad()
def test_temporal_layers_stand_after_their_convolutions():
    x, block, seen = normal(2, 3, 6, 5, 4), fill(ResnetBlock(6, 6, 3, EPS)), []
    for name in ("conv1", "temporal1", "conv2", "temporal2"):
        getattr(block, name).register_forward_hook(lambda _, args, out: seen.append(out))
    block.temporal2.register_forward_hook(lambda _, args, out: 0 * out)
    assert torch.equal(block(x), x)  # temporal2 ends the branch
    conv1, after1, conv2, after2 = seen
    assert torch.equal(after1.flatten(0, 1), conv1) and torch.equal(after2.flatten(0, 1), conv2)


# Other sizes


def of_ones(layer):
    """The layer with a convolution that adds up 3 x 3 positions."""
    nn.init.ones_(layer.conv.weight), nn.init.zeros_(layer.conv.bias)
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


def test_upsampling_stays_below_two_to_the_31_numbers_at_once():
    layer, sizes = Upsample(256).to("meta"), []
    layer.conv.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    assert layer(torch.empty(2, 64, 256, 128, 128, device="meta")).shape == (2, 64, 256, 256, 256)
    assert sizes == [127 * 2**24, 2**24]


# Attention and transformers


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
    source = x if context is None else context
    everything = torch.ones(5, source.shape[1], dtype=torch.bool)
    mask = everything.tril() if masked else None
    expected = by_loops(attention, x, source, everything if mask is None else mask)
    torch.testing.assert_close(attention(x, context, mask), expected)


@pytest.mark.parametrize("options, expected", [({}, False), ({"bias": True}, True)])
def test_projections_have_a_bias_only_on_request(options, expected):
    attention = Attention(4, 2, **options)
    assert [getattr(attention, name).bias is not None
            for name in ("to_q", "to_k", "to_v")] == [expected] * 3
    assert attention.to_out[0].bias is not None


@torch.no_grad()
def test_a_feed_forward_layer_by_hand():
    layer, x = fill(FeedForward(6)), normal(2, 3, 5, 6)
    first, gate = (x @ layer.net["0"].proj.weight.T + layer.net["0"].proj.bias).split(24, dim=-1)
    inner = first * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), inner @ layer.net["2"].weight.T + layer.net["2"].bias)


@pytest.mark.parametrize("temporal", [None, lambda y: y.cumsum(1)])
@torch.no_grad()
def test_a_transformer_block_equals_its_parts_frame_by_frame(temporal):
    block = fill(TransformerBlock(6, num_heads=2, context_channels=5))
    x, context = normal(2, 3, 4, 6), normal(2, 7, 5, seed=2)  # b t (h w) c, b n d
    block.temporal, past = temporal, 0
    out = block(x, context)
    for i in range(3):
        y = block.norm1(x[:, i])
        past = past + y  # what cumsum gives frame i
        y = x[:, i] + block.attn1(y) + (past if temporal else 0)
        y = y + block.attn2(block.norm2(y), context)
        y = y + block.ff(block.norm3(y))
        torch.testing.assert_close(out[:, i], y, atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_text_becomes_keys_once_per_clip_not_once_per_frame():
    block, seen = fill(TransformerBlock(6, num_heads=2, context_channels=5)), []
    block.attn2.to_k.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    block(normal(2, 3, 4, 6), normal(2, 7, 5))
    assert seen == [(2, 7, 5)]


@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_a_transformer_adds_to_images_the_output_of_its_block_for_their_tokens(linear):
    layer = fill(Transformer2D(6, num_heads=2, context_channels=5, groups=3, linear=linear))
    x, context = 1e-3 * normal(2, 3, 6, 4, 7), normal(2, 7, 5, seed=2)  # small: eps shows

    def project(projection, tokens):
        return tokens @ projection.weight.view(6, 6).T + projection.bias

    frames = [F.group_norm(frame, 3, layer.norm.weight, layer.norm.bias, eps=1e-6)
              for frame in x.unbind(1)]
    tokens = torch.stack(frames, 1).flatten(3).mT  # b t c h w -> b t (h w) c
    tokens = layer.transformer_blocks[0](project(layer.proj_in, tokens), context)
    expected = x + project(layer.proj_out, tokens).mT.unflatten(3, (4, 7))
    torch.testing.assert_close(layer(x, context), expected, atol=1e-6, rtol=0)
