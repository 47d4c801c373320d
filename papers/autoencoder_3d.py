"""LVDM's 3-D autoencoder: clips to latents with fewer frames, and back.

The 2-D autoencoder of vae.py spends the same number of latents on every frame, whether it moves or
not. Here `time_factor` frames share one latent frame:

    encode    each frame to a small map (vae.py's levels) -> the maps of 4 frames side by side as
              channels -> convolutions over space and, separately, over time -> latents
    decode    the same way back; channels become frames again

Convolutions over time are in the middle, where frames are small and few, so they cost least there.
The middle holds the channels of 4 frames side by side, so the weights of a trained 2-D autoencoder
fit there as blocks, and `inflate` starts the 3-D one as the 2-D one, applied to each frame.

LVDM, He et al. 2022, section 3.1. docs/papers.md lists the differences from the paper.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import vae
from checkpoints import weights
from checkpoints.configs import from_config
from layers import GroupNorm, per_frame
from support.files import read_json

WINDOW = 8  # latent frames that go through the network at once, so long clips need no more memory
REACH = 2  # latent frames that a network sees on each side, one per convolution over time


@dataclass(frozen=True)
class VideoAutoencoderConfig(vae.VAEConfig):
    """The shape of a 2-D autoencoder, without attention as in LVDM, and frames per latent frame."""

    mid_block_add_attention: bool = False
    time_factor: int = 4


class TimeConvolution(nn.Conv2d):
    """Convolution over three latent frames at each position, initialised to copy the middle one."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1), padding=(1, 0), padding_mode="replicate")
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        y = super().forward(x.flatten(3).transpose(1, 2))  # b t c h w -> b c t (h w)
        return y.transpose(1, 2).unflatten(3, x.shape[3:])


def middle(config):
    """The blocks that see `time_factor` frames side by side, with convolutions over time."""
    k, channels = config.time_factor, config.block_out_channels[-1]
    block = vae.MidBlock(k * channels, k * config.norm_num_groups, attention=False)
    for resnet in block.resnets:
        resnet.temporal1 = TimeConvolution(k * channels)
    return block


class Encoder(vae.Encoder):
    """Clips (b, k t, 3, h, w) to (b, t, 2 * latent_channels, h/f, w/f): mean and logvar."""

    def __init__(self, config):
        super().__init__(config)
        self.time_factor = k = config.time_factor
        width = k * config.block_out_channels[-1]
        self.mid_block = middle(config)
        self.conv_norm_out = GroupNorm(k * config.norm_num_groups, width, vae.EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.down_blocks(per_frame(self.conv_in, x))  # b kt 3 h w -> b kt c h/f w/f
        x = x.unflatten(1, (-1, self.time_factor)).flatten(2, 3)  # b (t k) c -> b t (k c)
        x = F.silu(per_frame(self.conv_norm_out, self.mid_block(x)))
        return per_frame(self.conv_out, x)


class Decoder(vae.Decoder):
    """Latents (b, t, latent_channels, h, w) to clips (b, k t, 3, f h, f w)."""

    def __init__(self, config):
        super().__init__(config)
        self.time_factor = config.time_factor
        width = config.time_factor * config.block_out_channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid_block = middle(config)

    def forward(self, z):
        x = self.mid_block(per_frame(self.conv_in, z))  # b t 4 h w -> b t (k c) h w
        x = x.unflatten(2, (self.time_factor, -1)).flatten(1, 2)  # b t (k c) -> b (t k) c
        x = F.silu(per_frame(self.conv_norm_out, self.up_blocks(x)))
        return per_frame(self.conv_out, x)


class VideoAutoencoder(vae.AutoencoderKL):
    """AutoencoderKL over time, which encode_clip, decode_clips and standardise of vae.py accept."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, x, noise):
        """(reconstruction, Gaussian) of clips x (b, k t, 3, h, w), noise (b, t, c, h/f, w/f)."""
        moments = per_frame(self.quant_conv, self.encoder(x))
        gaussian = vae.DiagonalGaussian(*moments.chunk(2, dim=2))
        return self.decoder(per_frame(self.post_quant_conv, gaussian.sample(noise))), gaussian

    def encode(self, x):
        """The Gaussian over latents (ceil(t / k), c, h/f, w/f) of one clip x (t, 3, h, w).

        The last frame is repeated up to a multiple of k.
        """
        def moments(part):  # t k 3 h w -> t 2c h/f w/f
            return self.quant_conv(self.encoder(part.flatten(0, 1)[None])[0])

        k = self.config.time_factor
        x = torch.cat([x, x[-1:].expand(-len(x) % k, -1, -1, -1)])
        whole = in_windows(moments, x.unflatten(0, (-1, k)))
        return vae.DiagonalGaussian(*whole.chunk(2, dim=1))

    def decode(self, z):
        """Clips (b, k t, 3, f h, f w), about in [-1, 1], of unscaled latents z (b, t, c, h, w)."""
        def frames(part):  # t c h w -> t k 3 fh fw
            return self.decoder(self.post_quant_conv(part)[None])[0].unflatten(0, (len(part), -1))

        return torch.stack([in_windows(frames, clip).flatten(0, 1) for clip in z])


def in_windows(network, x):
    """network(x) of latent frames x (t, ...), WINDOW of them at a time.

    Each window is computed with REACH more frames on each side, which are then cut off. Up to
    rounding, this gives the result of the whole clip, because no norm looks beyond a latent frame.
    """
    parts = []
    for begin in range(0, len(x), WINDOW):
        low, end = max(0, begin - REACH), begin + WINDOW
        parts.append(network(x[low : end + REACH])[begin - low : end - low])
    return torch.cat(parts)


def inflate(image_model, latent_channels, time_factor):
    """A VideoAutoencoder that starts as a trained AutoencoderKL.

    With time_factor times its latent channels it gives the same frames. With equal latent channels,
    a latent frame starts as the mean of its frames' latents, and each frame is decoded from it.
    Raises ValueError for other numbers, or if the AutoencoderKL has attention.
    """
    old, c, k = image_model.config, image_model.config.latent_channels, time_factor
    if old.mid_block_add_attention or latent_channels not in (c, k * c):
        raise ValueError("--init needs a 2-D autoencoder without attention, and with this one "
                         f"--latent-channels needs {c} or {k * c}, got {latent_channels}")
    values = dataclasses.asdict(old)
    values |= {"latent_channels": latent_channels, "scaling_factor": 1.0}  # not measured yet
    network = VideoAutoencoder(VideoAutoencoderConfig(**values, time_factor=k))
    state = network.state_dict()
    # The encoder's last two layers have channels for mean and logvar, which are spread separately.
    halves = {"encoder.conv_out": (2, 1), "quant_conv": (2, 2)}
    for name, value in image_model.state_dict().items():
        state[name] = spread(value, state[name].shape, *halves.get(name.rpartition(".")[0], (1, 1)))
    network.load_state_dict(state)
    return network


def spread(value, shape, halves_out=1, halves_in=1):
    """A 2-D layer's parameter for a layer whose channels are the channels of several frames.

    Each frame gets its own copy of the weights (blocks on the diagonal). Several frames that become
    one are averaged; one that becomes several is copied.
    """
    out = shape[0] // value.shape[0]
    if value.ndim == 1:
        return value.view(halves_out, 1, -1).expand(-1, out, -1).reshape(shape)
    enters = shape[1] // value.shape[1]
    mix = torch.eye(out) if out == enters else torch.full((out, enters), 1 / enters)
    value = value.unflatten(1, (halves_in, -1)).unflatten(0, (halves_out, -1))
    return torch.einsum("aobixy,jk->ajobkixy", value, mix).reshape(shape)


def load_autoencoder(folder):
    """The VideoAutoencoder in a folder. Raises ValueError if the folder has another network."""
    where, name = folder / "config.json", {"_class_name": "VideoAutoencoder"}
    config = from_config(VideoAutoencoderConfig, read_json(where), name, where)
    return weights.fill_from(folder, weights.build(VideoAutoencoder, config, where))[0]
