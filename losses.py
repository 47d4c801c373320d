"""What the two networks of latent diffusion are trained to make small.

An objective is a module whose forward is the loss of a batch, so that one training loop
(trainer.py), one torch.compile and one DistributedDataParallel serve every stage.
"""

import torch
from torch import nn

from temporal import new_names


class ReconstructionLoss(nn.Module):
    """The autoencoder's loss: squared error and the pull towards N(0, 1). Rombach 2022, eq. 25.

    Pixels that differ from their frame's median, the shape on its background, weigh more: they are
    few, and all that matters.
    """

    def __init__(self, autoencoder, options):
        super().__init__()
        self.autoencoder, self.options = autoencoder, options

    def parameter_groups(self):
        """[(parameters, their part of the learning rate), ...]"""
        return [(list(self.autoencoder.parameters()), 1.0)]

    def forward(self, x, noise):
        """Frames x (n, 3, h, w) in [-1, 1], the noise (n, c, h/f, w/f) of the latents' sample."""
        gaussian = self.autoencoder.encode(x)
        latents = gaussian.mean + torch.exp(0.5 * gaussian.logvar) * noise
        median = x.flatten(2).median(dim=2).values[:, :, None, None]
        differs = ((x - median).abs().amax(dim=1, keepdim=True) > 0.1).to(x.dtype)
        error = (self.autoencoder.decode(latents) - x) ** 2
        weighted = (error * (1 + self.options.motion_weight * differs)).mean()
        return weighted + self.options.kl_weight * gaussian.kl().mean() / noise[0].numel()


class DenoisingLoss(nn.Module):
    """Mean squared error of the U-Net's prediction, the loss of DDPM (Ho 2020, eq. 14) and LDM.

    Texts come as ids (b, n) while a text encoder learns along, else already encoded (b, n, d).
    """

    def __init__(self, unet, diffusion, text_encoder=None, text_rate=1.0, new_layers_rate=1.0):
        super().__init__()
        self.unet, self.diffusion, self.text_encoder = unet, diffusion, text_encoder
        self.text_rate, self.new_layers_rate = text_rate, new_layers_rate

    def parameter_groups(self):
        """[(parameters, their part of the learning rate), ...]"""
        new, named = new_names(self.unet), list(self.unet.named_parameters())
        groups = [([p for name, p in named if name not in new], 1.0)]
        if new:
            groups.append(([p for name, p in named if name in new], self.new_layers_rate))
        if self.text_encoder is not None:
            groups.append((list(self.text_encoder.parameters()), self.text_rate))
        return groups

    def forward(self, latents, noise, timesteps, context):
        if self.text_encoder is not None:
            context = self.text_encoder(context)
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, context)
        target = self.diffusion.target(latents, noise, timesteps)
        return (prediction.float() - target).square().mean()
