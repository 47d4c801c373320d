"""The autoencoder against diffusers' AutoencoderKL, and the arithmetic around its latents.

recorded/README.md says how the recorded numbers were made.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import RECORDED, TOLERANCE
from recorded.rule import fill, normal, probe, signature
from torch.distributions import Normal, kl_divergence

import vae
from vae import PRESETS, AutoencoderKL, DiagonalGaussian, VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=5
)


@pytest.fixture
def network():
    return fill(AutoencoderKL(CONFIG)).requires_grad_(False)


def difference_from_diffusers(network, case="attention"):
    """The largest difference from the recorded mean, log variance and frames."""
    latents = network.encode(normal(2, 3, 12, 20))
    decoded = network.decode(normal(2, 5, 3, 4, seed=2))
    out = torch.stack([probe(latents.mean), probe(latents.logvar), probe(decoded)])
    expected = torch.tensor(list(RECORDED["vae"][case].values()), dtype=torch.float64)
    return (out - expected).abs().max()


# The network


@pytest.mark.parametrize("case, attention", [("attention", True), ("none", False)])
@torch.no_grad()
def test_mean_logvar_and_frames_equal_those_of_diffusers(case, attention):
    network = fill(AutoencoderKL(replace(CONFIG, mid_block_add_attention=attention)))
    assert difference_from_diffusers(network, case) < TOLERANCE


def on_meta(name):
    with torch.device("meta"):
        return AutoencoderKL(PRESETS[name])


def test_stable_diffusions_autoencoder_has_the_names_and_shapes_of_diffusers():
    assert signature(on_meta("sd")) == RECORDED["signatures"]["vae"]


@pytest.mark.parametrize("name, parameters, pixels, factor, scale", [
    ("tiny", 233_751, 32, 4, 1), ("small", 5_120_039, 64, 4, 1),  # training measures the scale
    ("sd", 83_653_863, 512, 8, 0.18215),
])
def test_presets_have_their_size_and_scale(name, parameters, pixels, factor, scale):
    network = on_meta(name)
    mean = network.encode(torch.empty(1, 3, 2 * factor, 3 * factor, device="meta")).mean
    assert mean.shape == (1, 4, 2, 3)
    assert network.decode(mean).shape == (1, 3, 2 * factor, 3 * factor)
    assert signature(network)["parameters"] == parameters
    assert (network.config.sample_size, network.config.scaling_factor) == (pixels, scale)


@pytest.mark.parametrize("pixels, sizes", [(1, [1, 1, 1, 1, 1]), (250, [2, 2, 1]), (480, [5])])
@torch.no_grad()
def test_a_long_clip_goes_through_in_parts_with_the_same_result(
        monkeypatch, network, pixels, sizes):
    frames, latents, seen = normal(5, 3, 8, 12), normal(5, 5, 2, 3), []
    whole = network.encode(frames).mean, network.decode(latents)
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(vae, "CHUNK_PIXELS", pixels)
    in_parts = network.encode(frames).mean, network.decode(latents)
    assert seen == sizes + sizes
    torch.testing.assert_close(in_parts, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("gradients, sizes", [(False, [4, 4, 1]), (True, [9])])
def test_a_part_is_four_frames_of_256_pixels_or_with_gradients_everything(gradients, sizes):
    seen, network = [], on_meta("tiny")
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.set_grad_enabled(gradients):
        network.encode(torch.empty(9, 3, 256, 256, device="meta"))
    assert seen == sizes


# The Gaussian


def test_kl_equals_that_of_torch_distributions():
    gaussian = DiagonalGaussian(normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2))
    exact = kl_divergence(Normal(gaussian.mean, (gaussian.logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian.kl(), exact.sum((1, 2, 3)))


def test_a_sample_by_hand():
    mean, logvar = torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1, 2), math.log(9.0))
    sample = DiagonalGaussian(mean, logvar).sample(torch.tensor([[[[1.0, -2.0]]]]))
    torch.testing.assert_close(sample, torch.tensor([[[[8.0, -1.0]]]]))  # 5 + 3, 5 - 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_variances_are_clamped_to_what_float32_can_hold(dtype):
    gaussian = DiagonalGaussian(*torch.tensor([[[[[0, 0]]]], [[[[-1e4, 1e4]]]]], dtype=dtype))
    assert gaussian.logvar.tolist() == [[[[-30, 20]]]] and gaussian.kl().isfinite()


def test_a_forward_pass_decodes_a_sample_of_the_latents(network):
    x, noise = normal(2, 3, 8, 12), normal(2, 5, 2, 3, seed=2)
    reconstruction, gaussian = network(x, noise)
    expected = network.encode(x)
    assert torch.equal(gaussian.mean, expected.mean)
    assert torch.equal(reconstruction, network.decode(expected.sample(noise)))


# Clips


def test_frames_of_bytes_become_scaled_means_of_numbers_from_minus_one_to_one(network):
    network.config = replace(CONFIG, scaling_factor=0.5)
    seen, frames = [], (torch.arange(2 * 3 * 8 * 12) % 256).byte().view(2, 3, 8, 12)
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    latents = vae.encode_clip(network, frames)
    (x,) = seen
    assert (x.min(), x.max()) == (-1, 1) and torch.equal((127.5 * (x + 1)).round(), frames.float())
    torch.testing.assert_close(latents, 0.5 * network.encode(x).mean, atol=TOLERANCE, rtol=0)


def test_decoding_clips_decodes_each_frame_by_itself(network):
    network.config = replace(CONFIG, scaling_factor=0.5)
    latents = normal(2, 3, 5, 2, 4)
    frames = [network.decode(frame[None] / 0.5) for frame in latents.flatten(0, 1)]
    expected = torch.cat(frames).unflatten(0, (2, 3))
    torch.testing.assert_close(
        vae.decode_clips(network, latents), expected, atol=TOLERANCE, rtol=0)


def test_decoded_clips_stay_in_range(network):
    network.decoder.conv_out.bias.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    decoded = vae.decode_clips(network, normal(1, 2, 5, 2, 3))
    assert decoded[:, :, 0].eq(-1).all() and decoded[:, :, 2].eq(1).all()


def test_standardised_latents_have_mean_zero_and_unit_variance(network):
    frames = normal(6, 3, 8, 12)
    vae.standardise(network, network.encode(frames).mean)
    latents = network.encode(frames).mean * network.config.scaling_factor
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0))


def test_standardising_changes_no_reconstruction_and_no_variance(network):
    def of_frames():
        gaussian = network.encode(normal(2, 3, 8, 12))
        return network.decode(gaussian.mean), gaussian.logvar

    before = of_frames()
    vae.standardise(network, network.encode(normal(6, 3, 8, 12, seed=2)).mean)
    torch.testing.assert_close(of_frames(), before, atol=TOLERANCE, rtol=0)


# Mistakes


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 10, 8), (1, 2, 3, 8, 8)])
def test_frames_that_do_not_fit_are_refused(network, shape):
    with pytest.raises(ValueError, match="h and w multiples of 4, got"):
        network.encode(torch.zeros(shape))


@pytest.mark.parametrize("options, message", [
    ({"block_out_channels": (8, 0)}, r"multiples of norm_num_groups >= 1, got \(8, 0\) and 4"),
    ({"block_out_channels": (8, 10)}, r"multiples of norm_num_groups >= 1, got \(8, 10\) and 4"),
    ({"scaling_factor": float("nan")}, "scaling_factor needs > 0, got nan"),
    ({"scaling_factor": 0.0}, "scaling_factor needs > 0, got 0"),
])
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
