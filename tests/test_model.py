"""The U-Net: what the shift does to it, and its numbers against diffusers' UNet2DConditionModel.

How the recorded numbers were made stands in recorded/README.md.
"""

from dataclasses import replace

import pytest
import torch
from helpers import RECORDED, SMALL_UNET, TOLERANCE, UNETS, build_unet, unet_inputs
from recorded.rule import fill, normal, probe, signature
from torch import nn

import layers
from model import PRESETS, UNet, UNetConfig
from shift import temporal_shift

SIGNATURES = RECORDED["signatures"]


def on_meta(config):
    with torch.device("meta"):
        return UNet(config)


# From an image model to a video model


@pytest.mark.parametrize("name", PRESETS)
def test_the_shift_has_no_parameters(name):
    image, video = (on_meta(replace(PRESETS[name], temporal=kind)) for kind in ("none", "shift"))
    assert signature(video) == signature(image)


def test_a_config_that_names_no_variant_has_the_papers_shift():
    config = UNetConfig()
    assert (config.temporal, config.shift_before) == ("shift", "both")
    assert (config.shift_fold, config.shift_causal, config.max_frames) == (3, False, 16)


@torch.no_grad()
def test_without_the_shift_every_frame_is_an_image_by_itself():
    unet = build_unet(temporal="none")
    latents, timesteps, context = unet_inputs()
    one_by_one = [unet(latents[:, i : i + 1], timesteps, context) for i in range(3)]
    clip = unet(latents, timesteps, context)
    torch.testing.assert_close(clip, torch.cat(one_by_one, 1), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_video_model_still_draws_the_image_models_images():
    image = unet_inputs(t=1)
    assert torch.equal(build_unet(temporal="shift")(*image), build_unet(temporal="none")(*image))


def test_an_image_model_and_the_shift_have_no_module_of_other_variants():
    for kind in ("none", "shift"):
        unet = on_meta(replace(PRESETS["tiny"], temporal=kind))
        kinds = {type(module) for module in unet.modules()}
        assert not {kind for kind in kinds if kind is nn.Identity or kind.__module__ == "temporal"}


def test_the_image_models_weights_are_the_video_models_strictly():
    image, video = build_unet(temporal="none"), UNet(replace(SMALL_UNET, temporal="shift"))
    video.load_state_dict(image.state_dict())
    assert list(video.state_dict()) == list(image.state_dict())


@torch.no_grad()
def test_the_video_model_draws_other_clips_than_the_image_model():
    clip = unet_inputs()
    difference = build_unet(temporal="shift")(*clip) - build_unet(temporal="none")(*clip)
    assert difference.abs().amax((0, 2, 3, 4)).min() > 1e-3  # in each frame


@pytest.mark.parametrize("shift_before, num_shifts", [("conv1", 8), ("conv2", 8), ("both", 16)])
def test_every_shift_widens_what_a_frame_sees_by_one(monkeypatch, shift_before, num_shifts):
    calls = []

    def count(*arguments):
        calls.append(1)
        return temporal_shift(*arguments)

    monkeypatch.setattr(layers, "temporal_shift", count)
    config = replace(SMALL_UNET, block_out_channels=(8, 8), attention_levels=(True, False))
    unet = build_unet(config, shift_before=shift_before).double()
    for name, parameter in unet.named_parameters():  # so that far frames do not fade into zeros
        parameter.data *= 30 if name.endswith(("conv1.weight", "conv2.weight")) else 1
    latents, timesteps, context = unet_inputs(b=1, t=2 * num_shifts + 5, h=2, w=4)
    latents, centre = latents.double().requires_grad_(), num_shifts + 2
    out = unet(latents, timesteps, context.double())
    (grad,) = torch.autograd.grad(out[:, centre].sum(), latents)
    seen = [abs(frame - centre) <= num_shifts for frame in range(latents.shape[1])]
    assert len(calls) == num_shifts and (grad[0].abs().sum((1, 2, 3)) > 0).tolist() == seen


def shifted_block(*channels, groups):
    both = ("conv1", "conv2")
    return fill(layers.ResnetBlock(*channels, groups, eps=1e-5, shift_before=both))


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
    unet, (latents, timesteps, context) = build_unet(UNETS["small"]), unet_inputs()
    alone = [unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)]
    together = unet(latents, timesteps, context)
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("changed", ["latents", "timesteps", "context"])
@torch.no_grad()
def test_every_input_matters(changed):
    names = ("latents", "timesteps", "context")
    unet, arguments = build_unet(), dict(zip(names, unet_inputs(), strict=True))
    before = unet(**arguments)
    arguments[changed] = arguments[changed].flip(0)  # the other clip's
    assert (unet(**arguments) - before).abs().max() > 1e-4


# Numbers of Stable Diffusion


@pytest.mark.parametrize("name, parameters", [
    ("sd1", 859_520_964), ("sd2", 865_910_724),
    ("tiny", 1_063_812), ("small", 66_633_988),  # older runs have to load
])
def test_presets_have_their_number_of_parameters(name, parameters):
    assert signature(on_meta(PRESETS[name]))["parameters"] == parameters


@pytest.mark.parametrize("name, pixels, factor", [
    ("sd1", 512, 8), ("sd2", 768, 8), ("tiny", 32, 4), ("small", 64, 4),
])
def test_sample_sizes_are_those_of_the_latents_of_the_presets_images(name, pixels, factor):
    assert PRESETS[name].sample_size == pixels // factor


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_stable_diffusion_has_the_names_and_shapes_of_diffusers(name):
    assert signature(on_meta(PRESETS[name])) == SIGNATURES[name]


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_predictions_equal_those_of_diffusers(name):
    out = build_unet(UNETS[name], temporal="none")(*unet_inputs())
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
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_the_recorded_numbers_notice_a(mistake, name):
    unet = build_unet(UNETS[name], temporal="none")
    mistake(unet)
    expected = torch.tensor(RECORDED["unet"][name], dtype=torch.float64)
    assert (probe(unet(*unet_inputs())) - expected).abs().max() > 10 * TOLERANCE


# How it is computed


@torch.no_grad()
def test_memory_layout_changes_no_value():
    unet, (latents, timesteps, context) = build_unet(), unet_inputs()
    before = unet(latents, timesteps, context)
    frames = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    unet = unet.to(memory_format=torch.channels_last)
    after = unet(frames.unflatten(0, (2, 3)), timesteps, context)
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_inputs_are_not_written_into():
    given = unet_inputs()
    build_unet(UNETS["small"])(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, unet_inputs(), strict=True))


@torch.no_grad()
def test_bfloat16_goes_through():
    latents, timesteps, context = unet_inputs()
    out = build_unet(UNETS["small"]).bfloat16()(latents.bfloat16(), timesteps, context.bfloat16())
    expected = build_unet(UNETS["small"])(latents, timesteps, context)
    torch.testing.assert_close(out.float(), expected, atol=0.01, rtol=0)


# Mistakes


@pytest.mark.parametrize("options, message", [
    ({"temporal": "telepathy"}, "temporal needs one of .* got 'telepathy'"),
    ({"shift_fold": 1}, "shift_fold needs 2 to 8 .* got 1"),
    ({"shift_fold": 9}, "shift_fold needs 2 to 8 .* got 9"),
    ({"max_frames": 0}, "max_frames needs >= 1, got 0"),
    ({"layers_per_block": 0}, "layers_per_block needs >= 1, got 0"),
    ({"norm_num_groups": 0}, "norm_num_groups needs >= 1, got 0"),
    ({"shift_before": "conv3"}, "shift_before needs one of .* got 'conv3'"),
    ({"resnet_time_scale_shift": "scale"}, "resnet_time_scale_shift needs one of .* got 'scale'"),
    ({"class_embed_type": "timestep"}, "class_embed_type needs one of .* got 'timestep'"),
    ({"block_out_channels": ()}, r"block_out_channels needs one level or more, .* got \(\)"),
    ({"block_out_channels": (8, 16, 0)}, "block_out_channels needs .* >= 1 channels, got"),
    ({"attention_levels": (True, True)}, "attention_levels needs 3 values, one a level"),
    ({"attention_head_dim": (2, 2)}, "attention_head_dim needs .* 3, one a level"),
    ({"attention_head_dim": (2, 0, 2)}, r"attention_head_dim needs .* >= 1, .* got \(2, 0, 2\)"),
    ({"block_out_channels": (8, 16, 30)}, "norm_num_groups=4 .* got .*30"),
    ({"attention_head_dim": (1, 2, 5)}, r"numbers of heads \(1, 2, 5\), got .*32"),
    ({"norm_num_groups": 1, "attention_head_dim": 1, "block_out_channels": (8, 16, 33)},
     "even multiples .* got .*33"),
])
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL_UNET, **options)


@pytest.mark.parametrize("latents, timesteps, context, message", [
    ((2, 4, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 4, 3, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 3, 4, 6, 12), (2,), (2, 5, 20), "h and w multiples of 4"),
    ((2, 3, 4, 8, 10), (2,), (2, 5, 20), "h and w multiples of 4"),
    ((2, 3, 4, 8, 12), (), (2, 5, 20), r"shapes \(2,\) and .*, got \(\) and"),
    ((2, 3, 4, 8, 12), (6,), (2, 5, 20), r"shapes \(2,\) and .*, got \(6,\) and"),
    ((2, 3, 4, 8, 12), (2,), (2,), r"and \(2, n, 20\), got .* and \(2,\)"),
    ((2, 3, 4, 8, 12), (2,), (1, 5, 20), r"and \(2, n, 20\), got .* and \(1, 5, 20\)"),
    ((2, 3, 4, 8, 12), (2,), (2, 5, 21), r"and \(2, n, 20\), got .* and \(2, 5, 21\)"),
    ((2, 3, 4, 8, 12), (2,), (2, 20), r"and \(2, n, 20\), got .* and \(2, 20\)"),
])
def test_inputs_that_do_not_fit_are_refused(latents, timesteps, context, message):
    with pytest.raises(ValueError, match=message):
        on_meta(SMALL_UNET)(torch.zeros(latents), torch.zeros(timesteps), torch.zeros(context))
