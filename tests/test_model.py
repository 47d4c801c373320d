"""The U-Net: what the shift does to it, and its numbers against diffusers' UNet2DConditionModel.

recorded/README.md says how the recorded numbers were made.
"""

from dataclasses import replace

import pytest
import torch
from helpers import RECORDED, SMALL_UNET, TOLERANCE, UNETS, build_unet, unet_inputs
from recorded.rule import probe, signature

import layers
from model import PRESETS, UNet, UNetConfig
from shift import temporal_shift


def on_meta(config):
    with torch.device("meta"):
        return UNet(config)


# From an image model to a video model


def test_the_default_is_the_papers_single_shift():
    config = UNetConfig()
    assert (config.temporal, config.shifts, config.max_frames) == ("shift", 1, 16)


@pytest.mark.parametrize("shifts", [1, 2])
def test_an_image_model_and_its_video_model_have_the_same_parameters(shifts):
    image, video = (build_unet(temporal=kind, shifts=shifts) for kind in ("none", "shift"))
    assert signature(video) == signature(image)
    video.load_state_dict(image.state_dict())


@torch.no_grad()
def test_without_the_shift_every_frame_is_an_image_by_itself():
    unet = build_unet(temporal="none", shifts=2)
    latents, timesteps, context = unet_inputs()
    one_by_one = [unet(latents[:, i : i + 1], timesteps, context) for i in range(3)]
    clip = unet(latents, timesteps, context)
    torch.testing.assert_close(clip, torch.cat(one_by_one, 1), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_one_shift_two_and_none_draw_three_different_clips_and_the_same_image():
    kinds = [{"temporal": "none"}, {"shifts": 1}, {"shifts": 2}]
    unets, clip, image = [build_unet(**kind) for kind in kinds], unet_inputs(), unet_inputs(t=1)
    a, b, c = (unet(*clip) for unet in unets)
    for difference in (a - b, a - c, b - c):
        assert difference.abs().amax((0, 2, 3, 4)).min() > 1e-3  # in each frame
    a, b, c = (unet(*image) for unet in unets)
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("shifts, num_shifts", [(1, 8), (2, 16)])
def test_every_shift_widens_what_a_frame_sees_by_one(monkeypatch, shifts, num_shifts):
    calls = []
    monkeypatch.setattr(layers, "temporal_shift", lambda x: calls.append(1) or temporal_shift(x))
    config = replace(SMALL_UNET, block_out_channels=(8, 8), attention_levels=(True, False))
    unet = build_unet(config, shifts=shifts).double()
    for name, parameter in unet.named_parameters():  # so that far frames do not fade into zeros
        parameter.data *= 30 if name.endswith(("conv1.weight", "conv2.weight")) else 1
    latents, timesteps, context = unet_inputs(b=1, t=2 * num_shifts + 5, h=2, w=4)
    latents, centre = latents.double().requires_grad_(), num_shifts + 2
    out = unet(latents, timesteps, context.double())
    (grad,) = torch.autograd.grad(out[:, centre].sum(), latents)
    seen = [abs(frame - centre) <= num_shifts for frame in range(latents.shape[1])]
    assert len(calls) == num_shifts and (grad[0].abs().sum((1, 2, 3)) > 0).tolist() == seen


# Clips and texts


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    unet, (latents, timesteps, context) = build_unet(UNETS["small"]), unet_inputs()
    alone = [unet(latents[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(2)]
    together = unet(latents, timesteps, context)
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_the_last_token_enters_a_new_models_time_embedding_with_gain_4():
    weight = UNet(UNETS["small"]).class_embedding.weight  # 32 20
    torch.testing.assert_close(weight.T @ weight, 16 * torch.eye(20), atol=1e-4, rtol=0)


# Numbers of Stable Diffusion


@pytest.mark.parametrize("name, parameters, num_heads, latent_size", [
    ("sd1", 859_520_964, (8, 8, 8, 8), 512 // 8), ("sd2", 865_910_724, (5, 10, 20, 20), 768 // 8),
    ("tiny", 1_063_812, (4, 4), 32 // 4), ("small", 66_633_988, (8, 8, 8), 64 // 4),
])
def test_presets_have_their_size(name, parameters, num_heads, latent_size):
    assert signature(on_meta(PRESETS[name]))["parameters"] == parameters
    assert PRESETS[name].num_heads == num_heads  # which no parameter shows
    assert PRESETS[name].sample_size == latent_size


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_stable_diffusion_has_the_names_and_shapes_of_diffusers(name):
    assert signature(on_meta(PRESETS[name])) == RECORDED["signatures"][name]


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_predictions_equal_those_of_diffusers(name):
    out = probe(build_unet(UNETS[name], temporal="none")(*unet_inputs()))
    expected = torch.tensor(RECORDED["unet"][name], dtype=torch.float64)
    assert (out - expected).abs().max() < TOLERANCE


# How it is computed


@torch.no_grad()
def test_bfloat16_goes_through():
    latents, timesteps, context = unet_inputs()
    out = build_unet(UNETS["small"]).bfloat16()(latents.bfloat16(), timesteps, context.bfloat16())
    expected = build_unet(UNETS["small"])(latents, timesteps, context)
    torch.testing.assert_close(out.float(), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", UNETS)
def test_gradient_checkpointing_computes_every_block_twice_and_changes_no_gradient(name):
    unet, calls = build_unet(UNETS[name]), []
    for block in unet.modules():
        if isinstance(block, layers.ResnetBlock):
            block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        return torch.autograd.grad(unet(*unet_inputs()).square().mean(), list(unet.parameters()))

    expected, once = gradients(), len(calls)
    unet.gradient_checkpointing = True
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (once, len(calls)) == (11, 11 + 22)


# Mistakes


@pytest.mark.parametrize("options, message", [
    ({"attention_levels": (True, True)}, "need one value per level"),
    ({"block_out_channels": (8, 16, 0)}, "even multiples of norm_num_groups and .* got .*16, 0"),
    ({"block_out_channels": (8, 16, 30)}, "even multiples of norm_num_groups and .* got .*16, 30"),
    ({"temporal": "telepathy"}, "temporal needs one of .* got 'telepathy'"),
    ({"shifts": 3}, "shifts 1 or 2, got 'shift' and 3"),
])
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL_UNET, **options)


@pytest.mark.parametrize("latents, timesteps, context, message", [
    ((2, 4, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 4, 3, 8, 12), (2,), (2, 5, 20), r"latents need the shape \(b, t, 4, h, w\)"),
    ((2, 3, 4, 6, 12), (2,), (2, 5, 20), "h and w multiples of 4"),
    ((2, 3, 4, 8, 12), (6,), (2, 5, 20), r"shapes \(2,\) and .*, got \(6,\) and"),
    ((2, 3, 4, 8, 12), (2,), (1, 5, 20), r"and \(2, n, 20\), got .* and \(1, 5, 20\)"),
])
def test_inputs_that_do_not_fit_are_refused(latents, timesteps, context, message):
    with pytest.raises(ValueError, match=message):
        on_meta(SMALL_UNET)(torch.zeros(latents), torch.zeros(timesteps), torch.zeros(context))
