"""The other variants: each layer against a slow loop, and what all keep of the image model."""

from dataclasses import replace

import pytest
import torch
from helpers import train_small
from recorded.rule import fill, normal
from torch import nn

from model import PRESETS, UNet, UNetConfig
from shift import temporal_shift
from temporal import (
    VARIANTS,
    AttentionOverTime,
    DirectedAttention,
    FrameAdaptor,
    JointAttention,
    TemporalAttention,
    TemporalConvolution,
    start_as_shift,
    temporal_state,
)
from transformer import TransformerBlock
from weights import load_unet, save_network

SMALL = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
    attention_levels=(False, True), attention_head_dim=2, temporal="none", max_frames=4,
)
LEARNED = ("attention", "joint", "directed", "conv")
SHAPE = (2, 3, 6, 5, 4)  # b t c h w, all different


def variant(temporal, **options):
    """A U-Net with the weights of one image model, whatever its temporal variant."""
    image, unet = fill(UNet(SMALL)), UNet(replace(SMALL, temporal=temporal, **options))
    unet.load_state_dict(unet.state_dict() | image.state_dict())
    return unet


def trained(temporal):
    """A variant whose temporal layers do something."""
    unet = variant(temporal)
    for name in list(temporal_state(unet)):
        parameter = unet.get_parameter(name)
        parameter.data += 0.3 * normal(*parameter.shape, seed=len(name))
    return unet


def inputs(b=2, t=3):
    return normal(b, t, 4, 4, 8), torch.tensor([37, 2])[:b], normal(b, 5, 20, seed=2)


def clip(*shape):
    return normal(*(shape or SHAPE), seed=3)


def softmax_by_hand(logits):
    powers = [logit.exp() for logit in logits]
    return [power / sum(powers) for power in powers]


def attention_by_loops(attention, tokens, directed):
    """Attention over time of tokens (b, t, n, c): clip by clip, place by place, head by head."""
    b, t, n, c = tokens.shape
    width = c // attention.num_heads
    out = torch.zeros(b, t, n, c)
    for clip_, place, head in torch.cartesian_prod(*map(torch.arange, (b, n, attention.num_heads))):
        part = slice(head * width, (head + 1) * width)
        x = tokens[clip_, :, place]
        q, k, v = (x @ to.weight[part].T for to in (attention.to_q, attention.to_k, attention.to_v))
        for i in range(t):
            seen = range(i + 1) if directed else range(t)
            shares = softmax_by_hand([q[i] @ k[j] / width**0.5 for j in seen])
            out[clip_, i, place, part] = sum(s * v[j] for s, j in zip(shares, seen, strict=True))
    return out @ attention.to_out[0].weight.T + attention.to_out[0].bias


# Each of them


@torch.no_grad()
def test_temporal_attention_equals_attention_place_by_place():
    layer, x = fill(TemporalAttention(6, AttentionOverTime(6, 2), max_frames=4)), clip()
    tokens = layer.norm(x.permute(0, 1, 3, 4, 2).flatten(2, 3))
    tokens = tokens + layer.positions[:3, None]
    y = attention_by_loops(layer.attention, tokens, directed=False)
    expected = x + y.unflatten(2, (5, 4)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_positions_tell_every_frame_from_every_other():
    positions = TemporalAttention(8, AttentionOverTime(8, 2), max_frames=16).positions.detach()
    assert torch.cdist(positions, positions).fill_diagonal_(9.0).min() > 0.5


@torch.no_grad()
def test_directed_attention_is_attention_to_the_past_place_by_place():
    layer, tokens = fill(DirectedAttention(6, 2)), clip(2, 3, 5, 6)
    expected = attention_by_loops(layer, tokens, directed=True)
    torch.testing.assert_close(layer(tokens), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_joint_attention_is_attention_of_every_place_to_all_places_of_all_frames():
    layer, tokens = fill(JointAttention(6, 2)), clip(2, 3, 5, 6)
    row = tokens.reshape(2, 15, 1, 6)  # the places of all frames, as if they were frames
    expected = attention_by_loops(layer, row, directed=False).view_as(tokens)
    torch.testing.assert_close(layer(tokens), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_block_adds_directed_attention_to_the_spatial_one():
    block, x, context = fill(TransformerBlock(6, 2, 5)), clip(2, 3, 5, 6), clip(2, 4, 5)
    before = block(x, context)
    block.temporal = fill(DirectedAttention(6, 2))
    block.attn2.to_out[0].weight.zero_()
    y, text = block.norm1(x), block.attn2.to_out[0].bias
    attended = torch.stack([block.attn1(frame) for frame in y.unbind(1)], 1)
    inside = x + attended + block.temporal(y) + text
    expected = inside + block.ff(block.norm3(inside))
    torch.testing.assert_close(block(x, context), expected, atol=1e-6, rtol=0)
    assert (expected - before).abs().max() > 1e-3


@torch.no_grad()
def test_a_later_frame_changes_nothing_earlier_in_directed_attention():
    layer, tokens = fill(DirectedAttention(6, 2)), clip(2, 4, 5, 6)
    before = layer(tokens)
    tokens[:, 2] = 7.0
    same = ((layer(tokens) - before).abs() < 1e-6).flatten(2).all(2)
    assert same.tolist() == [[True, True, False, False]] * 2


@torch.no_grad()
def test_the_adaptor_scales_and_moves_each_frame_by_its_own():
    layer, x = fill(FrameAdaptor(6, max_frames=4)), clip()
    expected = torch.zeros(SHAPE)
    for frame in range(3):
        for channel in range(6):
            scale, offset = layer.scale[frame, channel], layer.offset[frame, channel]
            expected[:, frame, channel] = scale * x[:, frame, channel] + offset
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_the_convolution_over_time_equals_a_triple_loop():
    layer, x = fill(TemporalConvolution(6)), clip()
    expected = layer.bias[:, None, None].expand(SHAPE).clone()
    for frame in range(3):
        for tap in range(3):
            for channel in range(6):
                if 0 <= frame + tap - 1 < 3:
                    weight = layer.weight[:, channel, tap, 0][:, None, None]
                    expected[:, frame] += weight * x[:, frame + tap - 1, channel, None]
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_convolution_over_time_is_a_3d_convolution_of_one_place():
    layer, x = fill(TemporalConvolution(6)), clip()
    convolution = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0))
    convolution.load_state_dict({"weight": layer.weight[..., None], "bias": layer.bias})
    expected = convolution(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [
    TemporalAttention(6, AttentionOverTime(6, 2), 4), TemporalConvolution(6), FrameAdaptor(6, 4),
])
@torch.no_grad()
def test_frames_that_lie_in_memory_as_h_w_c_stay_so(layer):
    x = clip().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, SHAPE[:2])
    assert layer(x).stride() == x.stride()


# In the U-Net


@pytest.mark.parametrize("temporal", ["none", *LEARNED])
@torch.no_grad()
def test_a_clip_starts_as_the_image_models_images(temporal):
    expected = variant("none")(*inputs())
    torch.testing.assert_close(variant(temporal)(*inputs()), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temporal", VARIANTS)
@torch.no_grad()
def test_a_image_is_the_image_models_before_and_after_training(temporal):
    image = inputs(t=1)
    expected = variant("none")(*image)
    assert torch.equal(variant(temporal)(*image), expected)
    assert torch.equal(trained(temporal)(*image), expected)


@pytest.mark.parametrize("temporal", ["shift", *LEARNED])
@torch.no_grad()
def test_frames_see_each_other_once_it_is_trained(temporal):
    unet, (latents, *others) = trained(temporal), inputs()
    before = unet(latents, *others)
    latents[:, 0] = 1.0
    changed = (unet(latents, *others) - before).abs().amax((0, 2, 3, 4))
    assert changed.min() > 1e-5


@pytest.mark.parametrize("temporal", LEARNED)
def test_the_first_gradient_reaches_what_lets_the_rest_learn(temporal):
    unet = variant(temporal)
    unet(*inputs()).square().mean().backward()
    silent = {  # until the zeros in front of them have moved
        name for name in list(temporal_state(unet)) if not unet.get_parameter(name).grad.any()
    }
    waiting = ("norm.weight", "norm.bias", "positions", "to_q.weight", "to_k.weight", "to_v.weight")
    assert silent == {name for name in list(temporal_state(unet)) if name.endswith(waiting)}


@pytest.mark.parametrize("temporal", LEARNED)
def test_every_new_parameter_gets_a_gradient_when_it_is_trained(temporal):
    unet = trained(temporal)
    unet(*inputs()).square().mean().backward()
    assert all(unet.get_parameter(name).grad.abs().max() > 0 for name in list(temporal_state(unet)))


def test_names_of_the_new_parameters():
    names = {
        kind: list(temporal_state(UNet(replace(SMALL, temporal=kind)))) for kind in VARIANTS
    }
    assert names["none"] == names["shift"] == []
    assert names["conv"][:2] == [
        "down_blocks.0.resnets.0.temporal_after1.weight",
        "down_blocks.0.resnets.0.temporal_after1.bias",
    ]
    parts = {
        kind: sorted({name.split("temporal")[1].lstrip("_.0123456789") for name in names[kind]})
        for kind in LEARNED
    }
    projections = [f"to_{part}" for part in ("k.weight", "out.0.bias", "out.0.weight", "q.weight",
                                             "v.weight")]
    attention = [f"attention.{name}" for name in projections]
    attention += ["norm.bias", "norm.weight", "positions"]
    assert parts == {
        "attention": attention, "joint": attention,
        "directed": ["after1.offset", "after1.scale", "after2.offset", "after2.scale"]
        + projections,
        "conv": ["after1.bias", "after1.weight", "after2.bias", "after2.weight"],
    }


@pytest.mark.parametrize("temporal, expected", [
    # SD 1 has 22 blocks: five make 320 channels, five 640 and twelve 1280, with two convolutions.
    ("directed", 2 * 16 * 2 * (5 * 320 + 5 * 640 + 12 * 1280)
     + sum(n * (4 * c * c + c) for n, c in ((5, 320), (5, 640), (6, 1280)))),
    ("conv", 2 * sum(n * (3 * c * c + c) for n, c in ((5, 320), (5, 640), (12, 1280)))),
    # A layer is 4 c^2 + c of attention, 2 c of norm and 16 c of positions, behind each of 21.
    ("attention", sum(n * (4 * c * c + 19 * c) for n, c in ((5, 320), (5, 640), (11, 1280)))),
    ("shift", 0),
])
def test_number_of_new_parameters_at_stable_diffusions_size_by_hand(temporal, expected):
    with torch.device("meta"):
        unet = UNet(replace(PRESETS["sd1"], temporal=temporal))
    assert sum(unet.get_parameter(name).numel() for name in list(temporal_state(unet))) == expected


def test_a_temporal_layer_has_as_many_heads_as_its_level():
    unet = UNet(replace(SMALL, temporal="attention", attention_head_dim=(1, 4)))
    levels = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    assert [level.temporal[0].attention.num_heads for level in levels] == [1, 4, 4, 4, 1]


@pytest.mark.parametrize("temporal", ("attention", "directed"))
def test_a_clip_with_more_frames_than_there_are_parameters_for_is_refused(temporal):
    with pytest.raises(ValueError, match="at most max_frames=4 frames, .* got 5"):
        variant(temporal)(*inputs(t=5))


@pytest.mark.parametrize("temporal", VARIANTS)
@torch.no_grad()
def test_gradient_checkpointing_and_memory_layout_change_nothing(temporal):
    unet = trained(temporal)
    before = unet(*inputs())
    unet.to(memory_format=torch.channels_last).gradient_checkpointing = True
    with torch.enable_grad():
        after = unet(*inputs())
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


# The shift's variants


@torch.no_grad()
def test_every_option_of_the_shift_reaches_it():
    given = inputs()
    drawn = [
        variant("shift", shift_fold=fold, shift_causal=causal)(*given)
        for fold in (3, 4, 8) for causal in (False, True)
    ]
    distances = torch.cdist(*2 * [torch.stack(drawn).flatten(1)])
    assert distances.fill_diagonal_(1.0).min() > 1e-3


@torch.no_grad()
def test_with_a_causal_shift_a_later_frame_changes_nothing_earlier():
    unet, (latents, *others) = variant("shift", shift_causal=True), inputs(t=4)
    before = unet(latents, *others)
    latents[:, 2] = 1.0
    changed = (unet(latents, *others) - before).abs().amax((0, 2, 3, 4)) > 1e-6
    assert changed.tolist() == [False, False, True, True]


# Image weights and folders


@pytest.mark.parametrize("temporal", VARIANTS)
@torch.no_grad()
def test_a_folder_of_each_loads_again(tmp_path, temporal):
    unet = trained(temporal)
    save_network(tmp_path, unet)
    loaded = load_unet(tmp_path)
    assert loaded.config == unet.config
    assert torch.equal(loaded(*inputs()), unet(*inputs()))


def test_a_folder_with_temporal_layers_is_no_image_model(tmp_path):
    save_network(tmp_path, variant("conv"))
    with pytest.raises(ValueError, match="32 unexpected: .*temporal_after1"):
        load_unet(tmp_path, "none")


# Learning


def test_a_run_learns_new_layers_in_its_video_stage_alone(tmp_path):
    train_small(tmp_path, temporal="directed", new_layers_rate=2.0)
    image, video = (load_unet(tmp_path / part) for part in ("image_unet", "unet"))
    assert list(temporal_state(image)) == [] and video.config.max_frames == 3
    untouched = UNet(video.config)
    adaptors = [name for name in list(temporal_state(video)) if name.endswith("scale")]
    assert adaptors and not any(
        torch.equal(video.get_parameter(name), untouched.get_parameter(name)) for name in adaptors
    )


def test_a_convolution_over_time_can_start_as_the_shift():
    convolution, x = TemporalConvolution(7), normal(2, 3, 7, 5, 6)
    start_as_shift(convolution)
    assert torch.equal(convolution(x), temporal_shift(x))
