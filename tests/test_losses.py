"""The two objectives, against arithmetic by hand."""

import pytest
import torch
from torch import nn

from diffusion import Diffusion
from losses import DenoisingLoss, ReconstructionLoss
from options import TrainOptions
from vae import DiagonalGaussian


class Nothing(nn.Module):
    """A network that answers 0, as a U-Net or as an autoencoder whose Gaussian is N(1, 1)."""

    def forward(self, latents, timesteps, context):
        return torch.zeros_like(latents)

    def encode(self, x):
        ones = torch.ones(len(x), 4, 1, 1)
        return DiagonalGaussian(ones, torch.zeros_like(ones))

    def decode(self, z):
        return torch.zeros(len(z), 3, 4, 4)


def test_the_reconstruction_loss_by_hand():
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = 1.0  # one of 16 pixels differs from the background, in one channel
    loss = ReconstructionLoss(Nothing(), TrainOptions(motion_weight=4.0, kl_weight=0.1))
    error = (15 * 3 * 0.25 + 5 * (1.0 + 0.25 + 0.25)) / 48
    kl = 0.5  # nats a latent number, of N(1, 1) from N(0, 1)
    assert loss(x, torch.zeros(1, 4, 1, 1)).item() == pytest.approx(error + 0.1 * kl)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_network_that_predicts_nothing_loses_the_square_of_the_target(prediction_type):
    diffusion = Diffusion(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    timesteps = torch.tensor([10, 900])
    loss = DenoisingLoss(Nothing(), diffusion)(x0, noise, timesteps, torch.zeros(2, 1, 8))
    target = diffusion.target(x0, noise, timesteps)
    assert loss.item() == pytest.approx((target**2).mean().item())
