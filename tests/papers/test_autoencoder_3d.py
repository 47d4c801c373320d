"""The 3-D autoencoder: its shapes, what it sees in time, and that it starts as the 2-D one."""

import dataclasses
import math

import pytest
import torch
from helpers import change
from recorded.rule import fill, normal

import vae
from papers import autoencoder_3d
from papers.autoencoder_3d import (
    LVDM,
    TimeConvolution,
    VideoAutoencoder,
    VideoVAEConfig,
    inflate,
    load_autoencoder,
    reach,
    save_autoencoder,
    spread,
)

OLD = vae.VAEConfig(block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
                    latent_channels=5, mid_block_add_attention=False, scaling_factor=0.7)
CONFIG = VideoVAEConfig(block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
                        latent_channels=5, time_factor=3, scaling_factor=0.7)


@pytest.fixture
def network():
    """Filled by the rule of the recordings: no layer is the identity any more."""
    return fill(VideoAutoencoder(CONFIG)).requires_grad_(False)


@pytest.fixture
def image_model():
    return fill(vae.AutoencoderKL(OLD)).requires_grad_(False)


# Shapes


@pytest.mark.parametrize("frames, latents", [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_a_clip_of_any_length_has_a_latent_frame_for_every_three(network, frames, latents):
    gaussian = network.encode(normal(frames, 3, 4, 6))
    assert gaussian.mean.shape == gaussian.logvar.shape == (latents, 5, 2, 3)
    assert network.decode(gaussian.mean).shape == (3 * latents, 3, 4, 6)


def test_missing_frames_are_the_last_one_again(network):
    clip = normal(4, 3, 4, 6)
    repeated = clip[[0, 1, 2, 3, 3, 3]]
    assert torch.equal(network.encode(clip).mean, network.encode(repeated).mean)


def test_a_batch_of_clips_is_its_clips_one_by_one(network):
    clips, noise = normal(2, 6, 3, 4, 6), normal(2, 2, 5, 2, 3, seed=3)
    reconstruction, gaussian = network(clips, noise)
    for clip, drawn, y, mean in zip(clips, noise, reconstruction, gaussian.mean, strict=True):
        alone = network.encode(clip)
        torch.testing.assert_close(mean, alone.mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(y, network.decode(alone.sample(drawn)), atol=1e-6, rtol=0)


def test_lvdm_takes_a_quarter_of_the_frames_and_an_eighth_of_the_size():
    with torch.device("meta"):
        network = VideoAutoencoder(LVDM)
        mean = network.encode(torch.empty(16, 3, 256, 256)).mean
    assert mean.shape == (4, 4, 32, 32)


# What is seen in time


def seen(function, x, place):
    """Frames of x on which frame `place` of function(x) depends, by its gradient."""
    x = x.clone().requires_grad_()
    function(x)[place].sum().backward()
    return [i for i, grad in enumerate(x.grad) if grad.abs().max() > 0]


def test_a_latent_frame_sees_two_latent_frames_on_each_side(network):
    assert reach(network.encoder) == reach(network.decoder) == 2
    assert seen(lambda x: network.encode(x).mean, normal(21, 3, 4, 6), 3) == list(range(3, 18))
    assert seen(network.decode, normal(7, 5, 2, 3), 3 * 3 + 1) == [1, 2, 3, 4, 5]


def test_a_time_convolution_is_a_sum_over_three_frames_whose_ends_are_repeated():
    layer, x = fill(TimeConvolution(3)).requires_grad_(False), normal(2, 4, 3, 2, 5)
    expected = torch.zeros_like(x)
    for t in range(4):
        for tap in range(3):
            frame = x[:, min(max(t + tap - 1, 0), 3)]  # b c h w
            expected[:, t] += torch.einsum("oc,bchw->bohw", layer.weight[:, :, tap, 0], frame)
    expected += layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_a_new_time_convolution_changes_nothing():
    x = normal(2, 4, 3, 2, 5)
    assert torch.equal(TimeConvolution(3)(x), x)


# Windows


@pytest.mark.parametrize("window", [1, 2, 3])
def test_windows_give_what_the_whole_clip_gives(network, monkeypatch, window):
    clip, latents = normal(20, 3, 4, 6), normal(7, 5, 2, 3)
    mean, frames = network.encode(clip).mean, network.decode(latents)
    monkeypatch.setattr(autoencoder_3d, "WINDOW", window)
    torch.testing.assert_close(network.encode(clip).mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(network.decode(latents), frames, atol=1e-6, rtol=0)


def test_windows_that_reach_less_far_would_differ(network, monkeypatch):
    latents = normal(7, 5, 2, 3)
    frames = network.decode(latents)
    monkeypatch.setattr(autoencoder_3d, "WINDOW", 2)
    monkeypatch.setattr(autoencoder_3d, "reach", lambda part: 1)
    assert (network.decode(latents) - frames).abs().max() > 1e-5


def test_a_long_clip_is_never_computed_as_a_whole(network):
    sizes = {"encoder": [], "decoder": []}
    for name, counts in sizes.items():
        getattr(network, name).register_forward_pre_hook(
            lambda _, args, counts=counts: counts.append(args[0].shape[1]))
    network.decode(network.encode(normal(60, 3, 4, 4)).mean)
    assert sizes == {"encoder": [30, 36, 18], "decoder": [10, 12, 6]}  # 8 and 2 on each side


# Inflation


def test_with_all_latents_it_starts_as_the_2d_autoencoder(image_model):
    network, clip = inflate(image_model, 15, time_factor=3), normal(6, 3, 4, 6)
    old, new = image_model.encode(clip), network.encode(clip)
    for name in ("mean", "logvar"):  # (t k) c -> t (k c)
        side_by_side = getattr(old, name).unflatten(0, (2, 3)).flatten(1, 2)
        torch.testing.assert_close(getattr(new, name), side_by_side, atol=1e-6, rtol=0)
    frames = image_model.decode(old.mean)
    torch.testing.assert_close(network.decode(new.mean), frames, atol=1e-6, rtol=0)


def test_with_fewer_latents_it_starts_with_the_mean_of_the_frames(image_model):
    network, clip = inflate(image_model, 5, time_factor=3), normal(6, 3, 4, 6)
    mean = image_model.encode(clip).mean.unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(network.encode(clip).mean, mean, atol=1e-6, rtol=0)
    frames = image_model.decode(mean).repeat_interleave(3, 0)
    torch.testing.assert_close(network.decode(mean), frames, atol=1e-6, rtol=0)


def test_its_config_is_that_of_the_2d_one_but_for_the_scale_which_is_yet_to_measure(image_model):
    config = inflate(image_model, 5, time_factor=3).config
    assert config == dataclasses.replace(CONFIG, scaling_factor=1.0)


def test_weights_are_spread_by_hand():
    weight = torch.tensor([[2.0, 4.0]])[..., None, None]  # one channel of two
    blocks = spread(weight, (2, 4, 1, 1))[..., 0, 0]
    assert blocks.tolist() == [[2, 4, 0, 0], [0, 0, 2, 4]]
    assert spread(weight, (1, 4, 1, 1))[..., 0, 0].tolist() == [[1, 2, 1, 2]]
    assert spread(weight, (2, 2, 1, 1))[..., 0, 0].tolist() == [[2, 4], [2, 4]]
    assert spread(torch.tensor([1.0, 2.0]), (4,)).tolist() == [1, 2, 1, 2]
    # Means and log variances: both of frame 1 and 2, not frame 1's and then frame 2's.
    assert spread(torch.tensor([1.0, 2.0]), (4,), halves_out=2).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("config, channels, message", [
    (OLD, 7, "latent_channels needs 5 or 15 to start from this 2-D autoencoder, got 7"),
    (dataclasses.replace(OLD, mid_block_add_attention=True), 5,
     "no attention .* got 3, True and none"),
])
def test_an_autoencoder_that_does_not_fit_is_not_inflated(config, channels, message):
    with pytest.raises(ValueError, match=message):
        inflate(vae.AutoencoderKL(config), channels, time_factor=3)


# As vae.py uses it


def test_standardised_latents_have_unit_variance_and_decode_to_the_same(network):
    clip = normal(12, 3, 4, 6)
    latents = network.encode(clip).mean
    before = network.decode(latents)
    vae.standardise(network, latents)
    scaled = vae.encode_clip(network, (clip + 1) * 127.5)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-5
    assert math.isclose(scaled.square().mean(), 1, rel_tol=1e-4)
    after = vae.decode_clips(network, scaled[None])[0]
    torch.testing.assert_close(after, before.clamp(-1, 1), atol=1e-5, rtol=0)


def test_clips_of_a_batch_do_not_see_each_other(network):
    latents = normal(2, 3, 5, 2, 3)
    clips = vae.decode_clips(network, latents)
    assert torch.equal(clips[1], vae.decode_clips(network, latents[1:])[0])


# Files and mistakes


def test_a_saved_autoencoder_is_the_same_again(network, tmp_path):
    save_autoencoder(tmp_path, network)
    loaded, clip = load_autoencoder(tmp_path), normal(5, 3, 4, 6)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.encode(clip).mean, network.encode(clip).mean)


def test_a_folder_without_one_or_with_another_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match="has no config.json; needs a trained 3-D autoencoder"):
        load_autoencoder(tmp_path)
    save_autoencoder(tmp_path, network)
    change(tmp_path / "config.json", time_factor=2)
    with pytest.raises(ValueError, match="does not fit its config"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("shape", [(3, 3, 5, 6), (3, 3, 4, 5), (0, 3, 4, 6), (3, 4, 6),
                                   (3, 2, 4, 6)])
def test_clips_that_do_not_divide_are_refused(network, shape):
    with pytest.raises(ValueError, match="with t >= 1 and h and w multiples of 2, got"):
        network.encode(torch.zeros(shape))


@pytest.mark.parametrize("values", [{"time_factor": 0}, {"temporal": "shift"}])
def test_a_time_factor_below_one_and_other_temporal_layers_are_refused(values):
    with pytest.raises(ValueError, match="time_factor >= 1, no attention and no other temporal"):
        VideoVAEConfig(**values)
