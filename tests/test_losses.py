"""The two losses of train.py, against arithmetic by hand, and a U-Net that learns in seconds."""

import dataclasses

import pytest
import torch
from helpers import build_unet, unet_inputs
from recorded.rule import normal

import vae
from diffusion import Diffusion
from model import PRESETS, UNet
from train import denoising_loss, reconstruction_loss
from vae import AutoencoderKL, DiagonalGaussian


def autoencoder(x, noise):
    """Answers 0.25 everywhere and a Gaussian N(1, 1), whatever it gets."""
    ones = torch.ones(len(x), 4, 1, 1)
    return torch.full_like(x, 0.25), DiagonalGaussian(ones, torch.zeros_like(ones))


def test_the_reconstruction_loss_by_hand():
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = 1.0  # one of 16 pixels differs from the background, in one channel
    loss = reconstruction_loss(autoencoder, x, torch.zeros(1, 4, 1, 1), 4.0, kl_weight=0.1)
    error = (15 * 3 * 0.25**2 + 5 * (0.75**2 + 2 * 0.25**2)) / 48
    kl = 0.5  # nats a latent number, of N(1, 1) from N(0, 1)
    assert loss.item() == pytest.approx(error + 0.1 * kl)


def test_a_faint_difference_from_the_background_weighs_no_more():
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = 0.59  # it counts as a shape from 0.1 on
    losses = [reconstruction_loss(autoencoder, x, torch.zeros(1, 4, 1, 1), weight, kl_weight=0.0)
              for weight in (0.0, 4.0)]
    assert losses[0] == losses[1]


def test_a_difference_of_more_than_a_tenth_weighs_more():
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = 0.61
    losses = [reconstruction_loss(autoencoder, x, torch.zeros(1, 4, 1, 1), weight, kl_weight=0.0)
              for weight in (0.0, 4.0)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoising_loss_by_a_loop_over_the_clips(prediction_type):
    diffusion, shape = Diffusion(prediction_type=prediction_type), (2, 3, 4, 5, 6)
    x0, noise, context = normal(*shape), normal(*shape, seed=2), normal(2, 7, 8, seed=3)
    timesteps = torch.tensor([10, 900])

    def unet(noisy, timesteps, context):  # answers numbers that depend on all that it gets
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


def gradients_of(loss, network, *inputs):
    network.zero_grad()
    loss(network, *inputs).backward()
    return [parameter.grad for parameter in network.parameters()]


def test_the_denoising_loss_compiles_to_one_graph_with_the_same_gradients():
    unet = build_unet(block_out_channels=(8,), attention_levels=(True,))
    x0, timesteps, context = unet_inputs()
    inputs = unet, Diffusion(prediction_type="v_prediction"), x0, x0.flip(1), timesteps, context
    compiled = torch.compile(denoising_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(gradients_of(compiled, *inputs), gradients_of(denoising_loss, *inputs),
                    strict=True):
        torch.testing.assert_close(a, b)


def test_the_reconstruction_loss_compiles_to_one_graph_with_the_same_gradients():
    torch.manual_seed(0)
    config = dataclasses.replace(vae.PRESETS["tiny"], block_out_channels=(32, 32))
    inputs = (AutoencoderKL(config), normal(2, 3, 8, 8), normal(2, 4, 4, 4, seed=2), 5.0, 1e-3)
    compiled = torch.compile(reconstruction_loss, fullgraph=True, backend="aot_eager",
                             dynamic=False)
    for a, b in zip(gradients_of(compiled, *inputs), gradients_of(reconstruction_loss, *inputs),
                    strict=True):
        torch.testing.assert_close(a, b)


def test_a_tiny_unet_learns_one_batch_in_seconds():
    torch.manual_seed(0)
    unet, diffusion = UNet(PRESETS["tiny"]), Diffusion(prediction_type="v_prediction")
    x0, noise, context = normal(2, 3, 4, 8, 8), normal(2, 3, 4, 8, 8, seed=5), normal(2, 5, 64)
    timesteps = torch.tensor([740, 300])
    optimizer = torch.optim.Adam(unet.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = denoising_loss(unet, diffusion, x0, noise, timesteps, context)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.9 and losses[-1] < 0.1
