"""The autoencoder against diffusers' AutoencoderKL, and the arithmetic around its latents.

How the recorded numbers were made stands in recorded/README.md.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded.rule import fill, normal, probe, signature
from torch import nn
from torch.distributions import Normal, kl_divergence

import vae
from vae import (
    PRESETS,
    AutoencoderKL,
    DiagonalGaussian,
    VAEConfig,
    decode_clips,
    encode_clip,
    standardise,
)

CONFIG = VAEConfig(
    block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=5
)
TOLERANCE = 5e-7  # of outputs of about 0.03; float32 rounds them by less than 1e-7
ALL = json.loads((Path(__file__).parent / "recorded" / "diffusers.json").read_text())
RECORDED, SIGNATURE = ALL["vae"], ALL["signatures"]["vae"]


@pytest.fixture
def network():
    return fill(AutoencoderKL(CONFIG)).requires_grad_(False)


def outputs(network):
    """What was recorded: probes of the mean, of the log variance and of a decoded picture."""
    latents = network.encode(normal(2, 3, 12, 20))
    decoded = network.decode(normal(2, 5, 3, 4, seed=2))
    return torch.stack([probe(latents.mean), probe(latents.logvar), probe(decoded)])


def recorded(case="attention"):
    return torch.tensor(list(RECORDED[case].values()), dtype=torch.float64)


# The network


@pytest.mark.parametrize("case, attention", [("attention", True), ("none", False)])
@torch.no_grad()
def test_mean_logvar_and_pictures_equal_those_of_diffusers(case, attention):
    network = fill(AutoencoderKL(replace(CONFIG, mid_block_add_attention=attention)))
    torch.testing.assert_close(outputs(network), recorded(case), atol=TOLERANCE, rtol=0)


def wrong_eps(network):
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5


def wrong_padding(network):
    for module in network.modules():
        if getattr(module, "asymmetric", False):
            module.asymmetric, module.conv.padding = False, (1, 1)


def wrong_order_of_mean_and_logvar(network):
    weight, bias = network.quant_conv.weight, network.quant_conv.bias
    weight.copy_(weight.roll(5, 0)), bias.copy_(bias.roll(5, 0))


@pytest.mark.parametrize("mistake", [wrong_eps, wrong_padding, wrong_order_of_mean_and_logvar])
def test_the_recorded_numbers_notice_a(mistake, network):
    mistake(network)
    assert (outputs(network) - recorded()).abs().max() > 50 * TOLERANCE


def test_stable_diffusions_autoencoder_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        network = AutoencoderKL(PRESETS["sd"])
    assert signature(network) == SIGNATURE


def test_the_scale_of_latents_is_known_for_stable_diffusion_alone():
    scales = {name: config.scaling_factor for name, config in PRESETS.items()}
    assert scales == {"tiny": 1, "small": 1, "sd": 0.18215}  # training measures the others


@pytest.mark.parametrize("name", PRESETS)
def test_an_encoded_picture_is_smaller_by_the_downscale(name):
    with torch.device("meta"):
        network = AutoencoderKL(PRESETS[name])
        f = network.config.downscale
        mean = network.encode(torch.empty(1, 3, 2 * f, 3 * f)).mean
        decoded = network.decode(mean)
    assert mean.shape == (1, 4, 2, 3) and decoded.shape == (1, 3, 2 * f, 3 * f)


def test_chunks_do_not_change_the_latents(monkeypatch, network):
    frames = normal(5, 3, 8, 12)
    whole = network.encode(frames).mean
    monkeypatch.setattr(vae, "CHUNK_PIXELS", 2 * 8 * 12)
    torch.testing.assert_close(network.encode(frames).mean, whole, atol=TOLERANCE, rtol=0)


def test_chunks_do_not_change_the_pictures(monkeypatch, network):
    latents = normal(5, 5, 2, 3)
    whole = network.decode(latents)
    monkeypatch.setattr(vae, "CHUNK_PIXELS", 2 * 8 * 12)
    torch.testing.assert_close(network.decode(latents), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pixels, sizes", [(1, [1, 1, 1, 1, 1]), (250, [2, 2, 1]), (480, [5])])
def test_a_chunk_has_as_many_frames_as_fit(monkeypatch, network, pixels, sizes):
    seen = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(vae, "CHUNK_PIXELS", pixels)
    network.decode(network.encode(normal(5, 3, 8, 12)).mean)
    assert seen == sizes + sizes


@pytest.mark.parametrize("size, sizes", [(128, [5]), (256, [4, 1]), (512, [1] * 5)])
def test_a_chunk_is_four_frames_of_256_pixels_or_as_much_of_another_size(size, sizes):
    seen = []
    with torch.device("meta"):
        network = AutoencoderKL(PRESETS["tiny"])
        for part in (network.encoder, network.decoder):
            part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        network.decode(network.encode(torch.empty(5, 3, size, size)).mean)
    assert seen == sizes + sizes


# The Gaussian


def gaussian():
    return DiagonalGaussian(normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2))


def test_kl_equals_that_of_torch_distributions():
    posterior = gaussian()
    exact = kl_divergence(Normal(posterior.mean, (posterior.logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), exact.sum((1, 2, 3)))


def test_kl_by_hand():
    posterior = DiagonalGaussian(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1, 2))
    assert posterior.kl().tolist() == [9.0]  # two latents of unit variance, 3^2 / 2 each


def test_samples_have_the_mean_and_deviation_of_the_gaussian():
    mean, logvar = torch.full((1, 1, 200, 100), 5.0), torch.full((1, 1, 200, 100), math.log(9.0))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    sample = DiagonalGaussian(mean, logvar).sample(noise)
    assert (sample.mean().item(), sample.std().item()) == pytest.approx((5, 3), rel=0.02)


def test_a_sample_by_hand():
    mean, logvar = torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1, 2), math.log(9.0))
    noise = torch.tensor([[[[1.0, -2.0]]]])
    sample = DiagonalGaussian(mean, logvar).sample(noise)
    torch.testing.assert_close(sample, torch.tensor([[[[8.0, -1.0]]]]))


@torch.no_grad()
def test_a_forward_pass_decodes_a_sample_of_the_latents(network):
    x, noise = normal(2, 3, 8, 12), normal(2, CONFIG.latent_channels, 2, 3, seed=2)
    reconstruction, gaussian = network(x, noise)
    expected = network.encode(x)
    assert torch.equal(gaussian.mean, expected.mean)
    assert torch.equal(reconstruction, network.decode(expected.sample(noise)))


def test_extreme_variances_stay_finite():
    posterior = DiagonalGaussian(torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1e4, 1e4]]]]))
    assert posterior.kl().isfinite().all()


# Clips


def test_frames_of_bytes_become_scaled_means(network):
    network.config = replace(CONFIG, scaling_factor=0.5)
    frames = (torch.arange(2 * 3 * 8 * 12) % 256).to(torch.uint8).reshape(2, 3, 8, 12)
    expected = 0.5 * network.encode(frames.float() / 127.5 - 1).mean
    torch.testing.assert_close(encode_clip(network, frames), expected, atol=TOLERANCE, rtol=0)


def test_bytes_become_numbers_from_minus_one_to_one(network):
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 4, 2)
    encode_clip(network, black_and_white.repeat_interleave(2, 3))
    assert seen[0].unique().tolist() == [-1, 1]


def test_decoding_a_clip_decodes_its_frames(network):
    network.config = replace(CONFIG, scaling_factor=0.5)
    latents = normal(2, 3, 5, 2, 4)
    clips = decode_clips(network, latents)
    for b, t in itertools.product(range(2), range(3)):
        (frame,) = network.decode(latents[b, t][None] / 0.5)
        torch.testing.assert_close(clips[b, t], frame, atol=TOLERANCE, rtol=0)


def test_decoded_clips_stay_in_range(network):
    network.decoder.conv_out.bias.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    decoded = decode_clips(network, normal(1, 2, 5, 2, 3))
    assert decoded[:, :, 0].eq(-1).all() and decoded[:, :, 2].eq(1).all()


def test_standardised_latents_have_mean_zero_and_unit_variance(network):
    frames = normal(6, 3, 8, 12)
    standardise(network, network.encode(frames).mean)
    latents = network.encode(frames).mean * network.config.scaling_factor
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0))


def test_standardising_changes_no_reconstruction(network):
    frames = normal(2, 3, 8, 12)
    before = network.decode(network.encode(frames).mean)
    standardise(network, network.encode(normal(6, 3, 8, 12)).mean)
    after = network.decode(network.encode(frames).mean)
    torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=0)


def test_standardising_changes_no_variance(network):
    frames = normal(2, 3, 8, 12)
    before = network.encode(frames).logvar
    standardise(network, network.encode(frames).mean)
    assert torch.equal(network.encode(frames).logvar, before)


# Mistakes


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 10, 8), (3, 8, 8), (1, 2, 3, 8, 8)])
def test_refuses_pictures_that_do_not_divide(network, shape):
    with pytest.raises(ValueError, match="h and w multiples of 4, got"):
        network.encode(torch.zeros(shape))


@pytest.mark.parametrize("options, message", [
    ({"block_out_channels": ()}, "block_out_channels needs multiples of norm_num_groups"),
    ({"block_out_channels": (8, 0)}, "block_out_channels needs multiples of norm_num_groups"),
    ({"block_out_channels": (8, 10)}, r"multiples of norm_num_groups >= 1, got \(8, 10\) and 4"),
    ({"layers_per_block": 0}, "layers_per_block needs >= 1"),
    ({"scaling_factor": 0.0}, "scaling_factor > 0"),
    ({"scaling_factor": float("nan")}, "scaling_factor > 0"),
])
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
