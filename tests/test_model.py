"""The U-Net: what the shift does to it, and its numbers against diffusers' UNet2DConditionModel.

How the recorded numbers were made stands in recorded/README.md.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded.rule import fill, normal, probe, signature
from torch import nn

import layers
import temporal
from model import PRESETS, UNet, UNetConfig
from shift import temporal_shift
from temporal import Shift

RECORDED = json.loads((Path(__file__).parent / "recorded" / "diffusers.json").read_text())
SIGNATURES = RECORDED["signatures"]
TOLERANCE = 5e-7  # of outputs of about 0.03; float32 rounds them by less than 1e-7
SMALL = UNetConfig(
    block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
    attention_levels=(True, True, False), attention_head_dim=2,
)
CASES = {
    "sd1": SMALL,
    "sd2": replace(SMALL, attention_head_dim=(1, 2, 4), use_linear_projection=True),
    "small": replace(
        SMALL, resnet_time_scale_shift="scale_shift", class_embed_type="simple_projection"
    ),
}


def build(config=SMALL, **options):
    return fill(UNet(replace(config, **options)))


def inputs(b=2, t=3, h=8, w=12):
    """Latents, timesteps and a text of five tokens."""
    timesteps = torch.tensor([37, 2])[:b]  # small: float32 knows their sines to seven digits
    return normal(b, t, 4, h, w), timesteps, normal(b, 5, 20, seed=2)


def on_meta(config):
    with torch.device("meta"):
        return UNet(config)


# From an image model to a video model


@pytest.mark.parametrize("name", PRESETS)
def test_the_shift_has_no_parameters(name):
    image, video = (on_meta(replace(PRESETS[name], temporal=kind)) for kind in ("none", "shift"))
    assert signature(video) == signature(image)


@torch.no_grad()
def test_without_the_shift_every_frame_is_a_picture_by_itself():
    unet = build(temporal="none")
    latents, timesteps, context = inputs()
    one_by_one = [unet(latents[:, i : i + 1], timesteps, context) for i in range(3)]
    clip = unet(latents, timesteps, context)
    torch.testing.assert_close(clip, torch.cat(one_by_one, 1), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_video_model_still_draws_the_image_models_pictures():
    picture = inputs(t=1)
    assert torch.equal(build(temporal="shift")(*picture), build(temporal="none")(*picture))


@torch.no_grad()
def test_the_video_model_draws_other_clips_than_the_image_model():
    clip = inputs()
    difference = build(temporal="shift")(*clip) - build(temporal="none")(*clip)
    assert difference.abs().amax((0, 2, 3, 4)).min() > 1e-3  # in each frame


@pytest.mark.parametrize("shift_before, num_shifts", [("conv1", 8), ("conv2", 8), ("both", 16)])
def test_every_shift_widens_what_a_frame_sees_by_one(monkeypatch, shift_before, num_shifts):
    calls = []

    def count(*arguments):
        calls.append(1)
        return temporal_shift(*arguments)

    monkeypatch.setattr(temporal, "temporal_shift", count)
    config = replace(SMALL, block_out_channels=(8, 8), attention_levels=(True, False))
    unet = build(config, shift_before=shift_before).double()
    for name, parameter in unet.named_parameters():  # so that far frames do not fade into zeros
        parameter.data *= 30 if name.endswith(("conv1.weight", "conv2.weight")) else 1
    latents, timesteps, context = inputs(b=1, t=2 * num_shifts + 5, h=2, w=4)
    latents, centre = latents.double().requires_grad_(), num_shifts + 2
    out = unet(latents, timesteps, context.double())
    (grad,) = torch.autograd.grad(out[:, centre].sum(), latents)
    seen = [abs(frame - centre) <= num_shifts for frame in range(latents.shape[1])]
    assert len(calls) == num_shifts and (grad[0].abs().sum((1, 2, 3)) > 0).tolist() == seen


def shifted_block(*channels, groups):
    around = 2 * [Shift(fold=3, causal=False), nn.Identity()]
    return fill(layers.ResnetBlock(*channels, groups, eps=1e-5, temporal=around))


@torch.no_grad()
def test_only_the_residual_branch_is_shifted():
    block = shifted_block(6, 6, groups=2)
    block.conv2.weight.zero_(), block.conv2.bias.zero_()
    x = normal(2, 3, 6, 4, 5)
    assert torch.equal(block(x), x)


@torch.no_grad()
def test_a_block_shifts_what_its_convolutions_read():
    block = shifted_block(6, 9, groups=3)
    x, expected = normal(2, 3, 6, 4, 5), []
    y = torch.stack([block.norm1(frame) for frame in x.unbind(1)], 1)
    y = temporal_shift(nn.functional.silu(y))
    y = torch.stack([block.norm2(block.conv1(frame)) for frame in y.unbind(1)], 1)
    y = temporal_shift(nn.functional.silu(y))
    for before, after in zip(x.unbind(1), y.unbind(1), strict=True):
        expected.append(block.conv_shortcut(before) + block.conv2(after))
    torch.testing.assert_close(block(x), torch.stack(expected, 1), atol=1e-6, rtol=0)


# Clips and texts


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    unet, (latents, timesteps, context) = build(CASES["small"]), inputs()
    alone = [unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)]
    together = unet(latents, timesteps, context)
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("changed", ["latents", "timesteps", "context"])
@torch.no_grad()
def test_every_input_matters(changed):
    unet, arguments = build(), dict(zip(("latents", "timesteps", "context"), inputs(), strict=True))
    before = unet(**arguments)
    arguments[changed] = arguments[changed].flip(0)  # the other clip's
    assert (unet(**arguments) - before).abs().max() > 1e-4


# Numbers of Stable Diffusion


@pytest.mark.parametrize("name, parameters", [("sd1", 859_520_964), ("sd2", 865_910_724)])
def test_stable_diffusion_has_the_known_number_of_parameters(name, parameters):
    assert signature(on_meta(PRESETS[name]))["parameters"] == parameters


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_stable_diffusion_has_the_names_and_shapes_of_diffusers(name):
    assert signature(on_meta(PRESETS[name])) == SIGNATURES[name]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_predictions_equal_those_of_diffusers(name):
    out = build(CASES[name], temporal="none")(*inputs())
    expected = torch.tensor(RECORDED["unet"][name], dtype=torch.float64)
    torch.testing.assert_close(probe(out), expected, atol=TOLERANCE, rtol=0)


def wrong_heads(unet):
    for module in unet.modules():
        if isinstance(module, layers.Attention):
            module.num_heads *= 2


def wrong_heads_in_the_middle(unet):
    wrong_heads(unet.mid_block)


def wrong_eps_of_the_blocks(unet):
    for module in unet.modules():
        if isinstance(module, layers.ResnetBlock):
            module.norm1.eps = module.norm2.eps = 1e-6


def wrong_eps_of_the_transformers(unet):
    for name, module in unet.named_modules():
        if "attentions" in name and isinstance(module, nn.GroupNorm):
            module.eps = 1e-5


def wrong_eps_of_the_output(unet):
    unet.conv_norm_out.eps = 1e-6


def wrong_padding(unet):
    for module in unet.modules():
        if isinstance(module, layers.Downsample):
            module.asymmetric, module.conv.padding = True, (0, 0)


def wrong_order_of_cosine_and_sine(unet):
    weight = unet.time_embedding.linear_1.weight.data
    weight.copy_(weight.roll(4, 1))


@pytest.mark.parametrize("mistake", [
    wrong_heads, wrong_heads_in_the_middle, wrong_eps_of_the_blocks,
    wrong_eps_of_the_transformers, wrong_eps_of_the_output, wrong_padding,
    wrong_order_of_cosine_and_sine,
])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_recorded_numbers_notice_a(mistake, name):
    unet = build(CASES[name], temporal="none")
    mistake(unet)
    expected = torch.tensor(RECORDED["unet"][name], dtype=torch.float64)
    assert (probe(unet(*inputs())) - expected).abs().max() > 10 * TOLERANCE


# How it is computed


@torch.no_grad()
def test_memory_layout_changes_no_value():
    unet, (latents, timesteps, context) = build(), inputs()
    before = unet(latents, timesteps, context)
    frames = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    unet = unet.to(memory_format=torch.channels_last)
    after = unet(frames.unflatten(0, (2, 3)), timesteps, context)
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_inputs_are_not_written_into():
    given = inputs()
    build(CASES["small"])(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, inputs(), strict=True))


@torch.no_grad()
def test_bfloat16_goes_through():
    latents, timesteps, context = inputs()
    out = build(CASES["small"]).bfloat16()(latents.bfloat16(), timesteps, context.bfloat16())
    expected = build(CASES["small"])(latents, timesteps, context)
    torch.testing.assert_close(out.float(), expected, atol=0.01, rtol=0)


# Mistakes


@pytest.mark.parametrize("options, message", [
    ({"temporal": "telepathy"}, "temporal needs one of .* got 'telepathy'"),
    ({"shift_fold": 1}, "shift_fold needs >= 2 .* got 1"),
    ({"shift_fold": 9}, "shift_fold needs .* at most the channels of a level, .* got 9"),
    ({"max_frames": 0}, "max_frames >= 1, got 3, 0"),
    ({"shift_before": "conv3"}, "shift_before needs one of .* got 'conv3'"),
    ({"resnet_time_scale_shift": "scale"}, "resnet_time_scale_shift needs one of .* got 'scale'"),
    ({"class_embed_type": "timestep"}, "class_embed_type needs one of .* got 'timestep'"),
    ({"attention_levels": (True, True)}, "need 3 values, one a level"),
    ({"attention_head_dim": (2, 2)}, "need 3 values, one a level"),
    ({"block_out_channels": (8, 16, 30)}, "norm_num_groups=4 .* got 30"),
    ({"attention_head_dim": (1, 2, 5)}, "number of heads 5, got 32"),
    ({"norm_num_groups": 1, "attention_head_dim": 1, "block_out_channels": (8, 16, 33)}, "got 33"),
])
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


@pytest.mark.parametrize("latents, timesteps, context, message", [
    ((2, 4, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 4, 3, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 3, 4, 6, 12), (2,), (2, 5, 20), "h and w to be multiples of 4"),
    ((2, 3, 4, 8, 10), (2,), (2, 5, 20), "h and w to be multiples of 4"),
    ((2, 3, 4, 8, 12), (), (2, 5, 20), r"timesteps need the shape \(2,\), got \(\)"),
    ((2, 3, 4, 8, 12), (6,), (2, 5, 20), r"timesteps need the shape \(2,\), got \(6,\)"),
    ((2, 3, 4, 8, 12), (2,), (1, 5, 20), "context needs a multiple of 2 texts, got 1"),
    ((2, 3, 4, 8, 12), (2,), (3, 5, 20), "context needs a multiple of 2 texts, got 3"),
    ((2, 3, 4, 8, 12), (2,), (0, 5, 20), "context needs a multiple of 2 texts, got 0"),
    ((2, 3, 4, 8, 12), (2,), (2, 5, 21), r"context needs the shape \(b, n, 20\), got"),
    ((2, 3, 4, 8, 12), (2,), (2, 20), r"context needs the shape \(b, n, 20\), got"),
])
def test_inputs_that_do_not_fit_are_refused(latents, timesteps, context, message):
    with pytest.raises(ValueError, match=message):
        on_meta(SMALL)(torch.zeros(latents), torch.zeros(timesteps), torch.zeros(context))
