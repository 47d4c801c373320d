"""The 3-D autoencoder: its latents, what they see in time, and that it starts as the 2-D one."""

import dataclasses

import pytest
import torch
from recorded.rule import fill, normal

import vae
from checkpoints.weights import save_network
from papers import autoencoder_3d
from papers.autoencoder_3d import (TimeConvolution, VideoAutoencoder, VideoAutoencoderConfig,
                                   inflate, load_autoencoder, spread)

OLD = vae.VAEConfig(block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
                    latent_channels=5, mid_block_add_attention=False, scaling_factor=0.7)
CONFIG = VideoAutoencoderConfig(block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
                                latent_channels=5, time_factor=3, scaling_factor=0.7)
same = {"atol": 1e-6, "rtol": 0}


@pytest.fixture
def network():
    """Filled by the rule of the recordings, so no layer is the identity."""
    return fill(VideoAutoencoder(CONFIG)).requires_grad_(False)


@pytest.fixture
def image_model():
    return fill(vae.AutoencoderKL(OLD)).requires_grad_(False)


@pytest.mark.parametrize("frames, latents", [(1, 1), (3, 1), (4, 2)])
def test_a_clip_of_any_length_has_a_latent_frame_for_every_three(network, frames, latents):
    gaussian = network.encode(normal(frames, 3, 4, 6))
    assert gaussian.mean.shape == gaussian.logvar.shape == (latents, 5, 2, 3)
    assert network.decode(gaussian.mean[None]).shape == (1, 3 * latents, 3, 4, 6)


def test_missing_frames_are_copies_of_the_last_one(network):
    clip = normal(4, 3, 4, 6)
    repeated = clip[[0, 1, 2, 3, 3, 3]]
    assert torch.equal(network.encode(clip).mean, network.encode(repeated).mean)


def test_training_computes_what_encode_and_decode_compute_for_each_clip(network):
    clips, noise = normal(2, 6, 3, 4, 6), normal(2, 2, 5, 2, 3, seed=3)
    reconstruction, gaussian = network(clips, noise)
    for clip, drawn, y, mean in zip(clips, noise, reconstruction, gaussian.mean, strict=True):
        alone = network.encode(clip)
        torch.testing.assert_close(mean, alone.mean, **same)
        torch.testing.assert_close(y, network.decode(alone.sample(drawn)[None])[0], **same)


def seen(function, x, position):
    """Frames of x on which frame `position` of function(x) depends, by its gradient."""
    x = x.clone().requires_grad_()
    function(x)[position].sum().backward()
    return [i for i, grad in enumerate(x.grad) if grad.abs().max() > 0]


def test_a_latent_frame_sees_two_latent_frames_on_each_side(network):
    assert seen(lambda x: network.encode(x).mean, normal(21, 3, 4, 6), 3) == list(range(3, 18))
    frames = seen(lambda z: network.decode(z[None])[0], normal(7, 5, 2, 3), 3 * 3 + 1)
    assert frames == [1, 2, 3, 4, 5]


def test_a_time_convolution_is_a_sum_over_three_frames_whose_ends_are_repeated():
    layer, x = fill(TimeConvolution(3)).requires_grad_(False), normal(2, 4, 3, 2, 5)
    expected = torch.zeros_like(x)
    for t in range(4):
        for tap in range(3):
            frame = x[:, min(max(t + tap - 1, 0), 3)]  # b c h w
            expected[:, t] += torch.einsum("oc,bchw->bohw", layer.weight[:, :, tap, 0], frame)
    expected += layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, **same)


def test_windows_give_what_the_whole_clip_gives(network, monkeypatch):
    clip, latents = normal(20, 3, 4, 6), normal(2, 7, 5, 2, 3)
    mean, frames = network.encode(clip).mean, network.decode(latents)
    for window in (1, 2, 3):
        monkeypatch.setattr(autoencoder_3d, "WINDOW", window)
        torch.testing.assert_close(network.encode(clip).mean, mean, **same)
        torch.testing.assert_close(network.decode(latents), frames, **same)


def test_a_long_clip_is_never_computed_as_a_whole(network):
    sizes = {"encoder": [], "decoder": []}
    for name, counts in sizes.items():
        getattr(network, name).register_forward_pre_hook(
            lambda _, args, counts=counts: counts.append(args[0].shape[1]))
    network.decode(network.encode(normal(60, 3, 4, 4)).mean[None])
    assert sizes == {"encoder": [30, 36, 18], "decoder": [10, 12, 6]}  # 8, and 2 on each side


def test_with_all_latents_it_starts_as_the_2d_autoencoder(image_model):
    network, clip = inflate(image_model, 15, time_factor=3), normal(6, 3, 4, 6)
    old, new = image_model.encode(clip), network.encode(clip)
    for name in ("mean", "logvar"):  # (t k) c -> t (k c)
        side_by_side = getattr(old, name).unflatten(0, (2, 3)).flatten(1, 2)
        torch.testing.assert_close(getattr(new, name), side_by_side, **same)
    frames = image_model.decode(old.mean)
    torch.testing.assert_close(network.decode(new.mean[None])[0], frames, **same)


def test_with_fewer_latents_it_starts_with_the_mean_of_the_frames(image_model):
    network, clip = inflate(image_model, 5, time_factor=3), normal(6, 3, 4, 6)
    assert network.config == dataclasses.replace(CONFIG, scaling_factor=1.0)
    mean = image_model.encode(clip).mean.unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(network.encode(clip).mean, mean, **same)
    frames = image_model.decode(mean).repeat_interleave(3, 0)
    torch.testing.assert_close(network.decode(mean[None])[0], frames, **same)


def test_weights_are_spread_by_hand():
    weight = torch.tensor([[2.0, 4.0]])[..., None, None]  # one channel of two
    blocks = spread(weight, (2, 4, 1, 1))[..., 0, 0]
    assert blocks.tolist() == [[2, 4, 0, 0], [0, 0, 2, 4]]
    assert spread(weight, (1, 4, 1, 1))[..., 0, 0].tolist() == [[1, 2, 1, 2]]
    assert spread(weight, (2, 2, 1, 1))[..., 0, 0].tolist() == [[2, 4], [2, 4]]
    # The means of both frames, then their log variances
    assert spread(torch.tensor([1.0, 2.0]), (4,), halves_out=2).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("attention, channels", [(False, 7), (True, 5)])
def test_an_autoencoder_that_does_not_fit_is_not_inflated(attention, channels):
    config = dataclasses.replace(OLD, mid_block_add_attention=attention)
    with pytest.raises(ValueError, match=f"without attention, .* 5 or 15, got {channels}"):
        inflate(vae.AutoencoderKL(config), channels, time_factor=3)


def test_a_saved_autoencoder_gives_the_same_bits(network, tmp_path):
    save_network(tmp_path, network)
    loaded, clip = load_autoencoder(tmp_path), normal(5, 3, 4, 6)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.encode(clip).mean, network.encode(clip).mean)
