"""LVDM's 3-D autoencoder: clips to latents that are fewer in time, too, and back.

The 2-D autoencoder of vae.py spends the same number of latents on every frame, whether it moves or
not. Here `time_factor` frames share one latent frame:

    encode    each frame to a small map (vae.py's levels) -> the maps of 4 frames side by side as
              channels -> convolutions over space and, apart from them, over time -> latents
    decode    the same way back: channels become frames again

Convolutions over time cost least where frames are small and few, so they are there, in the middle.
LVDM has 3 x 3 x 3 kernels at every level; a kernel over space and one over time are cheaper.

In the middle the channels of 4 frames lie side by side, so the weights of a trained 2-D autoencoder
fit there as blocks: `inflate` starts the 3-D one as the 2-D one, applied to each frame.

LVDM, He et al. 2022, section 3.1. The paper adds a perceptual loss, which needs a pretrained
network, and an adversarial one; both are left out here. Different are also a small KL term, kernels
of 3 where LVDM has 4, zeros around frames (and replicas in time only), and a mean for each channel.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import vae
import weights
from checkpoints.configs import from_config
from files import read_json, save_safetensors, write_json
from layers import GroupNorm, per_frame

WINDOW = 8  # latent frames of a long clip that are computed at once


@dataclass(frozen=True)
class VideoVAEConfig(vae.VAEConfig):
    """The shape of a 3-D autoencoder: that of the 2-D one, and how many frames share a latent one.

    There is no attention, as in LVDM.
    """

    mid_block_add_attention: bool = False
    time_factor: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.time_factor < 1 or self.mid_block_add_attention or self.temporal != "none":
            raise ValueError("a 3-D autoencoder needs time_factor >= 1, no attention and no other "
                             f"temporal layers, got {self.time_factor}, "
                             f"{self.mid_block_add_attention} and {self.temporal}")


# With the widths of LVDM's public configuration, 1/4 of the frames and 1/8 of the size. The middle,
# with channels of 4 frames side by side, is four times as wide as anything in LVDM.
LVDM = VideoVAEConfig(block_out_channels=(32, 64, 128, 256), layers_per_block=1,
                      scaling_factor=1.0, sample_size=256)


class TimeConvolution(nn.Conv2d):
    """A convolution over three latent frames at each place, initialised to copy the middle one.

    The first and the last frame are repeated at the ends (replicate padding).
    """

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1), padding=(1, 0), padding_mode="replicate")
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        y = super().forward(x.flatten(3).transpose(1, 2))  # b t c h w -> b c t (h w)
        return y.transpose(1, 2).unflatten(3, x.shape[3:])


def middle(config):
    """The blocks of the middle: `time_factor` frames side by side, convolutions over time."""
    k, channels = config.time_factor, config.block_out_channels[-1]
    block = vae.MidBlock(k * channels, k * config.norm_num_groups, attention=False)
    for resnet in block.resnets:
        resnet.temporal_after1 = TimeConvolution(k * channels)
    return block


class Encoder(vae.Encoder):
    """Clips (b, k t, 3, h, w) to (b, t, 2 * latent_channels, h/f, w/f): mean and logvar."""

    def __init__(self, config):
        super().__init__(config)
        self.time_factor = k = config.time_factor
        width, groups = k * config.block_out_channels[-1], k * config.norm_num_groups
        self.mid_block = middle(config)
        self.conv_norm_out = GroupNorm(groups, width, vae.EPS)
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
        self.time_factor = k = config.time_factor
        width = k * config.block_out_channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid_block = middle(config)

    def forward(self, z):
        x = self.mid_block(per_frame(self.conv_in, z))  # b t 4 h w -> b t (k c) h w
        x = x.unflatten(2, (self.time_factor, -1)).flatten(1, 2)  # b t (k c) -> b (t k) c
        x = F.silu(per_frame(self.conv_norm_out, self.up_blocks(x)))
        return per_frame(self.conv_out, x)


class VideoAutoencoder(vae.AutoencoderKL):
    """AutoencoderKL over time: `encode` takes the frames of one clip and `decode` returns them.

    So encode_clip, decode_clips and standardise of vae.py serve it, too.
    """

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

        If t is no multiple of k, as for an image, the last frame is repeated: cut what `decode`
        returns to t frames. Raises ValueError as AutoencoderKL.encode does.
        """
        f, k, c = self.config.downscale, self.config.time_factor, self.config.in_channels
        if x.ndim != 4 or not len(x) or x.shape[1] != c or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"encode needs a clip (t, {c}, h, w) with t >= 1 and h and w "
                             f"multiples of {f}, got {tuple(x.shape)}")

        def moments(part):  # t k 3 h w -> t 2c h/f w/f
            return self.quant_conv(self.encoder(part.flatten(0, 1)[None])[0])

        x = torch.cat([x, x[-1:].expand(-len(x) % k, -1, -1, -1)])
        whole = in_windows(moments, x.unflatten(0, (-1, k)), reach(self.encoder))
        return vae.DiagonalGaussian(*whole.chunk(2, dim=1))

    def decode(self, z):
        """Frames (k t, 3, f h, f w), about in [-1, 1], of a clip's unscaled latents z (t, c, h, w).

        Or of clips, with one dimension more in front.
        """
        if z.ndim == 5:
            return torch.stack([self.decode(clip) for clip in z])

        def frames(part):  # t c h w -> t k 3 fh fw
            return self.decoder(self.post_quant_conv(part)[None])[0].unflatten(0, (len(part), -1))

        return in_windows(frames, z, reach(self.decoder)).flatten(0, 1)


def reach(network):
    """How many latent frames on each side a latent frame sees: one for each convolution in time."""
    return sum(isinstance(layer, TimeConvolution) for layer in network.modules())


def in_windows(network, x, reach):
    """network(x) of x (t, ...), WINDOW of them at a time, so that memory does not grow with t.

    A window is computed with `reach` more on each side, which are then cut off: what remains is
    what the whole would give, up to rounding, because no norm looks beyond a latent frame.
    """
    parts = []
    for begin in range(0, len(x), WINDOW):
        low, end = max(0, begin - reach), begin + WINDOW
        parts.append(network(x[low : end + reach])[begin - low : end - low])
    return torch.cat(parts)


def inflate(image_model, latent_channels, time_factor=4):
    """A VideoAutoencoder that starts as a trained AutoencoderKL.

    With time_factor times its latent channels it gives the same frames. With as many channels it
    starts with the mean of the frames' latents, shown to each of them.

    Raises ValueError for another number of channels, or if the 2-D one has attention.
    """
    old, k = image_model.config, time_factor
    if latent_channels not in (old.latent_channels, k * old.latent_channels):
        raise ValueError(f"latent_channels needs {old.latent_channels} or "
                         f"{k * old.latent_channels} to start from this 2-D autoencoder, got "
                         f"{latent_channels}")
    values = dataclasses.asdict(old)
    values |= {"latent_channels": latent_channels, "scaling_factor": 1.0}  # to be measured anew
    network = VideoAutoencoder(VideoVAEConfig(**values, time_factor=k))
    state = network.state_dict()
    for name, value in image_model.state_dict().items():
        # The encoder's last two layers have channels for mean and logvar: each is spread alone.
        halves = {"encoder.conv_out": (2, 1), "quant_conv": (2, 2)}
        state[name] = spread(value, state[name].shape, *halves.get(name.rpartition(".")[0], (1, 1)))
    network.load_state_dict(state)
    return network


def spread(value, shape, halves_out=1, halves_in=1):
    """A 2-D layer's parameter, for layers whose channels are those of several frames.

    Each frame gets the weights to itself (blocks on the diagonal). From several frames to one their
    mean is taken; from one to several, each gets the same.
    """
    out = shape[0] // value.shape[0]
    if value.ndim == 1:
        return value.view(halves_out, 1, -1).expand(-1, out, -1).reshape(shape)
    enters = shape[1] // value.shape[1]
    mix = torch.eye(out) if out == enters else torch.full((out, enters), 1 / enters)
    value = value.unflatten(1, (halves_in, -1)).unflatten(0, (halves_out, -1))
    return torch.einsum("aobixy,jk->ajobkixy", value, mix).reshape(shape)


def save_autoencoder(folder, network):
    """Write a VideoAutoencoder's config.json and weights."""
    write_json(Path(folder) / "config.json", dataclasses.asdict(network.config))
    save_safetensors(Path(folder) / weights.UNET_WEIGHTS, network.state_dict())


def load_autoencoder(folder):
    """The VideoAutoencoder in a folder. Raises ValueError if there is none, or a damaged one."""
    where = Path(folder) / "config.json"
    if not where.is_file():
        raise ValueError(f"{folder}: has no config.json; needs a trained 3-D autoencoder "
                         "(python -m papers.video_autoencoder train)")
    config = from_config(VideoVAEConfig, read_json(where), {}, where)
    return weights.fill_from(folder, weights.build(VideoAutoencoder, config, where))[0]
