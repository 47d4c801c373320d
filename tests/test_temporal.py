"""The other variants: each layer against a slow loop, and what all keep of the image model."""

import re
from dataclasses import replace

import pytest
import torch
from recorded.rule import fill, normal

import temporal
from model import PRESETS, UNet, UNetConfig
from temporal import (VARIANTS, AttentionOverTime, DirectedAttention, FrameAdaptor, JointAttention,
                      TemporalAttention, TemporalConvolution, temporal_state)

SMALL = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
    attention_levels=(False, True), attention_head_dim=2, temporal="none", max_frames=3,
)
SHAPE = (2, 3, 6, 5, 4)  # b t c h w, all different


def untrained(variant, **options):
    """A U-Net with the weights of one image model, whatever its variant."""
    image, unet = fill(UNet(SMALL)), UNet(replace(SMALL, temporal=variant, **options))
    unet.load_state_dict(image.state_dict() | temporal_state(unet))
    return unet


def trained(variant, **options):
    """A variant whose temporal layers have moved away from the identity."""
    unet = untrained(variant, **options)
    for name, parameter in new_parameters(unet).items():
        parameter.data += 0.3 * normal(*parameter.shape, seed=len(name))
    return unet


def new_parameters(unet):
    return {name: unet.get_parameter(name) for name in temporal_state(unet)}


def inputs(b=2, t=3):
    return normal(b, t, 4, 4, 8), torch.tensor([37, 2])[:b], normal(b, 5, 20, seed=2)


LEARNED = [variant for variant in VARIANTS if temporal_state(untrained(variant))]


# Every variant in the U-Net


def test_all_variants_except_none_and_the_shift_have_parameters_of_their_own():
    assert {*VARIANTS} - {*LEARNED} == {"none", "shift"}


@pytest.mark.parametrize("variant", LEARNED)
def test_the_new_parameters_and_no_others_have_temporal_in_their_names(variant):
    image, unet = untrained("none"), untrained(variant)
    others = {name for name in unet.state_dict() if "temporal" not in name}
    assert others == set(image.state_dict()) == set(unet.state_dict()) - set(temporal_state(unet))


@pytest.mark.parametrize("variant", ["none", *LEARNED])
@torch.no_grad()
def test_new_temporal_layers_leave_each_frame_an_image_by_itself(variant):
    image_model, (latents, *others) = untrained("none"), inputs()
    expected = torch.cat([image_model(frame, *others) for frame in latents.split(1, dim=1)], 1)
    for shifts in (1, 2):
        clip = untrained(variant, shifts=shifts)(latents, *others)
        torch.testing.assert_close(clip, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_image_skips_every_temporal_layer_before_training_and_after(variant):
    image = inputs(t=1)
    expected = untrained("none")(*image)
    for shifts in (1, 2):
        assert torch.equal(untrained(variant, shifts=shifts)(*image), expected)
        assert torch.equal(trained(variant, shifts=shifts)(*image), expected)


@pytest.mark.parametrize("variant", ["shift", *LEARNED])
@torch.no_grad()
def test_frames_see_each_other_after_training(variant):
    unet, (latents, *others) = trained(variant), inputs()
    before = unet(latents, *others)
    latents[:, 0] = 1.0
    changed = (unet(latents, *others) - before).abs().amax((0, 2, 3, 4))
    assert changed.min() > 1e-5  # also in the last of three frames


@pytest.mark.parametrize("variant", LEARNED)
def test_the_first_gradient_reaches_a_parameter_of_each_temporal_layer(variant):
    unet, learns = untrained(variant), {}
    unet(*inputs()).square().mean().backward()
    for name, parameter in new_parameters(unet).items():
        layer = re.match(r".*?\.temporal(\d|\.\d|)", name)[0]
        learns[layer] = learns.get(layer, False) or bool(parameter.grad.any())
    assert len(learns) >= 5 and all(learns.values())


@pytest.mark.parametrize("variant", LEARNED)
def test_every_new_parameter_gets_a_gradient_after_the_first_steps(variant):
    unet = trained(variant)
    unet(*inputs()).square().mean().backward()
    assert all(parameter.grad.any() for parameter in new_parameters(unet).values())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_gradient_checkpointing_and_memory_layout_change_nothing(variant):
    unet = trained(variant)
    before = unet(*inputs())
    unet.to(memory_format=torch.channels_last).gradient_checkpointing = True
    with torch.enable_grad():
        after = unet(*inputs())
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant, expected", [
    # SD 1 has 22 blocks: five make 320 channels, five 640 and twelve 1280, with two convolutions.
    ("directed", 2 * 16 * 2 * (5 * 320 + 5 * 640 + 12 * 1280)
     + sum(n * (4 * c * c + c) for n, c in ((5, 320), (5, 640), (6, 1280)))),
    ("conv", 2 * sum(n * (3 * c * c + c) for n, c in ((5, 320), (5, 640), (12, 1280)))),
    # A layer is 4 c^2 + c of attention, 2 c of norm and 16 c of positions, after each of 21.
    ("attention", sum(n * (4 * c * c + 19 * c) for n, c in ((5, 320), (5, 640), (11, 1280)))),
])
def test_the_number_of_new_parameters_at_stable_diffusions_size_by_hand(variant, expected):
    with torch.device("meta"):
        unet = UNet(replace(PRESETS["sd1"], temporal=variant))
    assert sum(parameter.numel() for parameter in new_parameters(unet).values()) == expected


def test_a_temporal_layer_has_as_many_heads_as_its_level():
    unet = UNet(replace(SMALL, temporal="attention", attention_head_dim=(1, 4)))
    levels = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    assert [level.temporal[0].attention.num_heads for level in levels] == [1, 4, 4, 4, 1]


def test_a_clip_of_more_frames_than_the_model_has_parameters_for_is_refused():
    with pytest.raises(ValueError, match="at most max_frames=3 frames, .* got 4"):
        untrained("attention")(*inputs(t=4))


# Each layer


def attention_by_loops(attention, tokens, directed=False):
    """Attention over time of tokens (b, t, n, c), one query at a time."""
    b, t, n, c = tokens.shape
    width = c // attention.num_heads
    out = torch.zeros(b, t, n, c)
    for clip, position, head in torch.cartesian_prod(*map(torch.arange, (b, n, c // width))):
        part = slice(head * width, (head + 1) * width)
        x = tokens[clip, :, position]
        q, k, v = (x @ to.weight[part].T for to in (attention.to_q, attention.to_k, attention.to_v))
        for i in range(t):
            seen = slice(0, i + 1 if directed else t)
            powers = (k[seen] @ q[i] / width**0.5).exp()
            out[clip, i, position, part] = powers / powers.sum() @ v[seen]
    return out @ attention.to_out[0].weight.T + attention.to_out[0].bias


@pytest.mark.parametrize("max_frames, sizes", [  # None: no positions, any number of frames
    (4, [40]), (None, [16, 16, 8])])  # 2 clips of 5 x 4 positions
@torch.no_grad()
def test_temporal_attention_equals_attention_position_by_position(monkeypatch, max_frames, sizes):
    monkeypatch.setattr(temporal, "MAX_SEQUENCES", sizes[0])
    layer, x = fill(TemporalAttention(6, AttentionOverTime(6, 2), max_frames)), normal(*SHAPE)
    seen = []
    layer.attention.to_q.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    tokens = layer.norm(x.permute(0, 1, 3, 4, 2).flatten(2, 3))
    y = attention_by_loops(
        layer.attention, tokens + (layer.positions[:3, None] if max_frames else 0))
    expected = x + y.unflatten(2, (5, 4)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)
    assert seen == sizes


def test_positions_tell_every_frame_from_every_other():
    positions = TemporalAttention(8, AttentionOverTime(8, 2), max_frames=16).positions.detach()
    assert torch.cdist(positions, positions).fill_diagonal_(9.0).min() > 0.5


@torch.no_grad()
def test_directed_attention_is_attention_to_the_past_position_by_position():
    layer, tokens = fill(DirectedAttention(6, 2)), normal(2, 3, 5, 6)
    expected = attention_by_loops(layer, tokens, directed=True)
    torch.testing.assert_close(layer(tokens), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_joint_attention_is_attention_of_every_position_to_all_positions_of_all_frames():
    layer, tokens = fill(JointAttention(6, 2)), normal(2, 3, 5, 6)
    row = tokens.reshape(2, 15, 1, 6)  # the positions of all frames, as if they were frames
    expected = attention_by_loops(layer, row).view_as(tokens)
    torch.testing.assert_close(layer(tokens), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_adaptor_has_a_scale_and_an_offset_for_each_frame_and_channel():
    layer, x = fill(FrameAdaptor(6, max_frames=4)), normal(*SHAPE)
    expected = torch.zeros(SHAPE)
    for frame in range(3):
        for channel in range(6):
            scale, offset = layer.scale[frame, channel], layer.offset[frame, channel]
            expected[:, frame, channel] = scale * x[:, frame, channel] + offset
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_the_convolution_over_time_equals_a_triple_loop():
    layer, x = fill(TemporalConvolution(6)), normal(*SHAPE)
    expected = layer.bias[:, None, None].expand(SHAPE).clone()
    for frame in range(3):
        for tap in range(3):
            for channel in range(6):
                if 0 <= frame + tap - 1 < 3:
                    weight = layer.weight[:, channel, tap, 0][:, None, None]
                    expected[:, frame] += weight * x[:, frame + tap - 1, channel, None]
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [
    TemporalAttention(6, AttentionOverTime(6, 2), 4), TemporalConvolution(6), FrameAdaptor(6, 4),
])
@torch.no_grad()
def test_frames_that_lie_in_memory_as_h_w_c_stay_so(layer):
    x = normal(*SHAPE).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = x.unflatten(0, SHAPE[:2])
    assert layer(x).stride() == x.stride()
