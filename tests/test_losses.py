"""The two losses of train.py, against arithmetic by hand, and a U-Net that learns in seconds."""

import pytest
import torch
from helpers import build_unet, unet_inputs
from recorded.rule import normal

from diffusion import Diffusion
from model import PRESETS, UNet
from train import denoising_loss, reconstruction_loss
from vae import AutoencoderKL, DiagonalGaussian, VAEConfig


def constant_autoencoder(x, noise):
    """Answers 0.25 everywhere and a Gaussian N(1, 1), whatever it gets."""
    ones = torch.ones(len(x), 4, 1, 1)
    return torch.full_like(x, 0.25), DiagonalGaussian(ones, torch.zeros_like(ones))


def loss_of(pixel, motion_weight, kl_weight=0.0):
    """The loss of frames of 0.5 in which one of 16 pixels has another value in one channel."""
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = pixel
    return reconstruction_loss(
        constant_autoencoder, x, torch.zeros(1, 4, 1, 1), motion_weight, kl_weight).item()


def test_the_reconstruction_loss_by_hand():
    error = (15 * 3 * 0.25**2 + 5 * (0.75**2 + 2 * 0.25**2)) / 48  # weight 1 + 4 where it differs
    kl = 0.5  # nats per latent number, of N(1, 1) from N(0, 1)
    assert loss_of(1.0, 4.0, kl_weight=0.1) == pytest.approx(error + 0.1 * kl)


def test_a_pixel_weighs_more_from_a_difference_of_a_tenth_on():
    assert loss_of(0.59, 0.0) == loss_of(0.59, 4.0)
    assert loss_of(0.61, 0.0) < loss_of(0.61, 4.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoising_loss_by_a_loop_over_the_clips(prediction_type):
    diffusion, shape = Diffusion(prediction_type=prediction_type), (2, 3, 4, 5, 6)
    x0, noise, context = normal(*shape), normal(*shape, seed=2), normal(2, 7, 8, seed=3)
    timesteps = torch.tensor([10, 900])

    def unet(noisy, timesteps, context):  # answers numbers that depend on all its inputs
        return noisy.tanh() + timesteps.view(2, 1, 1, 1, 1) / 1000 + context.mean((1, 2)).view(
            2, 1, 1, 1, 1)

    expected = 0.0
    for i, t in enumerate((10, 900)):
        alpha_bar = diffusion.alphas_cumprod[t].item()
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        prediction = torch.tanh(signal * x0[i] + sigma * noise[i]) + t / 1000 + context[i].mean()
        target = noise[i] if prediction_type == "epsilon" else signal * noise[i] - sigma * x0[i]
        expected += (prediction - target).square().mean().item() / 2
    loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def of_the_unet():
    unet = build_unet(block_out_channels=(8,), attention_levels=(True,))
    x0, timesteps, context = unet_inputs()
    diffusion = Diffusion(prediction_type="v_prediction")
    return denoising_loss, unet, diffusion, x0, x0.flip(1), timesteps, context


def of_the_autoencoder():
    autoencoder = AutoencoderKL(
        VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    return reconstruction_loss, autoencoder, normal(2, 3, 8, 8), normal(2, 4, 4, 4), 5.0, 1e-3


@pytest.mark.parametrize("case", [of_the_unet, of_the_autoencoder])
def test_a_loss_compiles_to_one_graph_with_the_same_gradients(case):
    loss, network, *inputs = case()
    parameters = list(network.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=False)
    actual, expected = (torch.autograd.grad(function(network, *inputs), parameters)
                        for function in (compiled, loss))
    torch.testing.assert_close(actual, expected)


def test_a_tiny_unet_learns_one_batch_in_seconds():
    torch.manual_seed(0)
    unet, diffusion = UNet(PRESETS["tiny"]), Diffusion(prediction_type="v_prediction")
    x0, noise, context = normal(2, 3, 4, 8, 8), normal(2, 3, 4, 8, 8, seed=5), normal(2, 5, 64)
    timesteps = torch.tensor([740, 300])
    optimizer = torch.optim.Adam(unet.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.9 and losses[-1] < 0.1
