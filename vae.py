"""The KL autoencoder: frames to latents and back, so that diffusion works on fewer numbers.

The encoder maps a frame (3, h, w) to the mean and variance of a Gaussian over latents (4, h/f,
w/f); the decoder maps latents back. Training minimises the reconstruction error, with a small
penalty for Gaussians far from N(0, 1). Nothing here knows about time; a clip is encoded and decoded
frame by frame.

Latent diffusion, Rombach et al. 2022, section 3.1 and appendix G; Latent-Shift, section 3.1. With
PRESETS["sd"] this is Stable Diffusion's autoencoder, name by name.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from layers import Attention, Downsample, GroupNorm, ResnetBlock, Upsample, per_frame

# GroupNorm's epsilon. With the U-Net's 1e-5 a checkpoint also loads, but gives worse images.
EPS = 1e-6
# Pixels of the frames that go through the network at once (4 frames of 256x256), so that a long
# clip needs no more memory than a short one.
CHUNK_PIXELS = 2**18


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder's shape, in diffusers' names. Each level except the last halves the size."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215  # latents times this have variance 1, as the U-Net sees them
    sample_size: int = 512  # pixels it was trained on; a note, not a limit

    def __post_init__(self):
        widths, groups = self.block_out_channels, self.norm_num_groups
        if min(groups, *widths, len(widths)) < 1 or any(width % groups for width in widths):
            raise ValueError("block_out_channels needs multiples of norm_num_groups >= 1, got "
                             f"{widths} and {groups}")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor needs > 0, got {self.scaling_factor}")

    @property
    def downscale(self):
        """Pixels of a frame per latent, in each direction (the f of the papers)."""
        return 2 ** (len(self.block_out_channels) - 1)


# "tiny" is narrow and has no attention, to suit a CPU; 32x32 pixels become 8x8 latents.
PRESETS = {
    "tiny": VAEConfig(
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False, scaling_factor=1.0, sample_size=32,
    ),
    "small": VAEConfig(
        block_out_channels=(64, 128, 128), layers_per_block=2, scaling_factor=1.0, sample_size=64,
    ),
    "sd": VAEConfig(),
}


class DiagonalGaussian:
    """A Gaussian over latents; `mean` and `logvar` are (n, c, h, w)."""

    def __init__(self, mean, logvar):
        self.mean = mean.float()
        # An untrained encoder may return any number, and exp(logvar) must be finite in float32.
        self.logvar = logvar.float().clamp(-30.0, 20.0)

    def sample(self, noise):
        """Latents (n, c, h, w), drawn with N(0, 1) noise of that shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise  # mean + deviation * noise

    def kl(self):
        """KL divergence from N(0, 1) in nats, summed over each image: (n,)."""
        # KL(N(m, s^2) | N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 for each latent number.
        per_latent = self.mean**2 + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * per_latent.flatten(1).sum(1)


class Level(nn.Module):
    """The blocks of one resolution, then a step "down" or "up" to the next one, if any."""

    def __init__(self, in_channels, out_channels, num_layers, groups, step=None):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.Sequential(*(ResnetBlock(a, b, groups, EPS) for a, b in pairwise(widths)))
        # An empty Sequential is the identity, so forward needs no case for a level without a step.
        down = [Downsample(out_channels, asymmetric=True)] if step == "down" else []
        self.downsamplers = nn.Sequential(*down)
        self.upsamplers = nn.Sequential(*[Upsample(out_channels)] if step == "up" else [])

    def forward(self, x):
        return self.upsamplers(self.downsamplers(self.resnets(x)))  # n c h w -> half or twice h w


class MidBlock(nn.Module):
    """Two blocks at the lowest resolution, with optional attention between them."""

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.Sequential(*[SpatialAttention(channels, groups)] if attention else [])

    def forward(self, x):
        return self.resnets[1](per_frame(self.attentions, self.resnets[0](x)))


class SpatialAttention(Attention):
    """Single-headed self-attention over an image's positions, with norm and skip connection."""

    def __init__(self, channels, groups):
        super().__init__(channels, num_heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, EPS)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # n c h w -> n (h w) c
        y = super().forward(tokens).transpose(1, 2)  # n (h w) c -> n c (h w)
        return x + y.unflatten(2, x.shape[2:])  # n c (h w) -> n c h w


class Encoder(nn.Module):
    """Frames (n, 3, h, w) to mean and logvar in one tensor, (n, 2 * latent_channels, h/f, w/f)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups,
                  "down" if i < len(widths) - 1 else None)
            for i, width in enumerate(widths)
        ))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.down_blocks(self.conv_in(x)))  # n 3 h w -> n c h/f w/f
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (..., latent_channels, h, w) to frames (..., 3, f h, f w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        # One more block per level than the encoder. In DDPM's U-Net it consumed the extra skip
        # connection.
        self.up_blocks = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups,
                  "up" if i < len(widths) - 1 else None)
            for i, width in enumerate(widths)
        ))
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.up_blocks(self.mid_block(per_frame(self.conv_in, z)))  # ... 4 h w -> ... c fh fw
        return per_frame(self.conv_out, F.silu(per_frame(self.conv_norm_out, x)))


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion, for frames of any size that is a multiple of f."""

    overflows_float16 = True  # as Stable Diffusion's may, so freeze() leaves it in float32

    def __init__(self, config):
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)  # n 3 h w -> n 2c h/f w/f
        self.decoder = Decoder(config)  # n c h/f w/f -> n 3 h w
        # 1x1 convolutions around the latents, named after VQGAN, which quantised between them.
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def forward(self, x, noise):
        """(reconstruction, Gaussian) of frames x (n, 3, h, w), with noise for its sample."""
        gaussian = self.encode(x)  # n 3 h w -> mean and logvar n c h/f w/f
        return self.decode(gaussian.sample(noise)), gaussian

    def encode(self, x):
        """The Gaussian over latents of frames x (n, 3, h, w) in [-1, 1].

        Raises ValueError if x has another shape, or h or w is not a multiple of config.downscale.
        """
        f, c = self.config.downscale, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != c or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"encode needs frames (n, {c}, h, w) with h and w multiples of {f}, "
                             f"got {tuple(x.shape)}")
        moments = in_parts(lambda part: self.quant_conv(self.encoder(part)), x, x[0, 0].numel())
        return DiagonalGaussian(*moments.chunk(2, dim=1))  # n 2c h/f w/f -> n c h/f w/f

    def decode(self, z):
        """Frames (..., 3, f h, f w), roughly in [-1, 1], from unscaled latents z (..., c, h, w)."""
        pixels = z.shape[-2:].numel() * self.config.downscale**2
        frames = in_parts(lambda part: self.decoder(self.post_quant_conv(part)),
                          z.flatten(0, -4), pixels)  # b t c h w -> (b t) 3 fh fw
        return frames.unflatten(0, z.shape[:-3])


def in_parts(network, x, pixels):
    """network(x) for x (n, ...); without gradients, CHUNK_PIXELS / pixels images at a time."""
    if torch.is_grad_enabled():  # training keeps the activations of all frames anyway
        return network(x)
    return torch.cat([network(part) for part in x.split(max(1, CHUNK_PIXELS // pixels))])


@torch.no_grad()
def encode_clip(vae, frames):
    """Scaled latents (t, c, h, w) of a clip's frames uint8 (t, 3, h, w): what the U-Net sees."""
    parameter = next(vae.parameters())
    x = frames.to(parameter.device).float() / 127.5 - 1  # 0..255 -> -1..1
    # The mean, not a sample, because diffusion adds noise that is far stronger than a sample's.
    return vae.encode(x.to(parameter.dtype)).mean * vae.config.scaling_factor


@torch.no_grad()
def standardise(vae, latents):
    """Give a trained autoencoder latents of mean 0 and variance 1, measured on (n, c, h, w).

    Each channel's mean goes into the biases of the two 1x1 convolutions around the latents, where
    it costs nothing and changes no reconstruction. 1 / deviation becomes config.scaling_factor.
    """
    c, mean = latents.shape[1], latents.mean((0, 2, 3))
    vae.quant_conv.bias[:c] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    # One standard deviation for all channels, because config.json has a single scaling_factor.
    deviation = (latents - mean[:, None, None]).square().mean().sqrt().item()
    vae.config = replace(vae.config, scaling_factor=1 / deviation)


@torch.no_grad()
def decode_clips(vae, latents):
    """Clips (b, t, 3, f h, f w) in [-1, 1] from scaled latents (b, t, c, h, w)."""
    z = (latents / vae.config.scaling_factor).to(next(vae.parameters()).dtype)  # b t c h w
    return vae.decode(z).clamp(-1, 1)
