"""From a text to pixels: how the five parts of a latent diffusion model work together.

    text -> tokenizer -> text_encoder -> context (b, n, d)
    noise (b, t, c, h, w), context -> unet, once per step -> latents -> vae -> frames

This is all of text-to-video sampling; sample.py is the command. Latent diffusion, Rombach et al.
2022, section 3; Latent-Shift, An et al. 2023, section 3.1.
"""

from dataclasses import dataclass, field

import torch

from diffusion import Diffusion, classifier_free_guidance, randn, sample_loop
from model import UNet
from support.cli import option
from support.devices import freeze
from text import CLIPTextModel
from tokenizer import CLIPTokenizer
from vae import AutoencoderKL, decode_clips


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn. A run keeps its own in sampling.json; flags override it."""

    num_frames: int = option(16, "frames of a clip; 1 draws an image", low=1)
    image_size: int = option(256, "height and width of a frame, in pixels", low=1)
    frames_per_second: float = option(8.0, "frames per second of the files written", low=0.1,
                                      high=50)  # browsers slow faster GIFs down
    num_steps: int = option(50, "denoising steps", low=1)
    negative_prompt: str = option("", "what to avoid; guidance has it in place of the empty text")
    guidance_scale: float = option(7.5, "weight of the text; 1 switches guidance off")
    guidance_max_snr: float | None = option(
        None, "guide only where the signal-to-noise ratio is at most this")
    timestep_power: float = option(1.0, "below 1, more of the steps are at high noise", low=0.1,
                                   high=10)
    sampler: str = option("ddim", "ddim or ddpm", choices=("ddim", "ddpm"))
    eta: float = option(0.0, "noise of a DDIM step, as a fraction of DDPM's", high=1)


@dataclass
class Pipeline:
    """The parts of a trained model; without a `tokenizer` (None) it cannot take texts."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None
    diffusion: Diffusion
    sampling: Sampling = field(default_factory=Sampling)
    report: object = None  # which tensors of a file were used (checkpoints/weights.py)

    def to(self, device, precision="auto"):
        """Move the networks to a device and set them up for sampling there (support/devices.py)."""
        for network in (self.unet, self.vae, self.text_encoder):
            freeze(network, device, precision)
        return self

    @torch.no_grad()
    def encode_text(self, texts):
        """The context (b, n, d) of texts, on the text encoder's device."""
        if self.tokenizer is None:  # Stable Diffusion's single files have none
            raise ValueError("this model has no tokenizer; name a merges file (--merges PATH), "
                             "which any diffusers folder has in tokenizer/")
        ids = self.tokenizer(texts)  # b n
        return self.text_encoder(ids.to(next(self.text_encoder.parameters()).device))  # b n d

    @torch.no_grad()
    def sample(self, prompts, seeds, sampling=None):
        """Yield latents (b, t, c, h, w) after each denoising step, one clip per prompt and seed.

        `decode` turns the last latents, or any earlier ones, into pixels.
        """
        sampling = sampling or self.sampling
        f = self.vae.config.downscale  # pixels per latent, in each direction
        factor = f * self.unet.config.downscale
        if sampling.image_size % factor:
            raise ValueError(f"image_size needs a multiple of {factor}, got {sampling.image_size}")
        context = self.encode_text(prompts)  # b n d
        guided, scale, max_snr = None, sampling.guidance_scale, sampling.guidance_max_snr
        if scale != 1:
            without = self.encode_text([sampling.negative_prompt])  # 1 n d
            guided = torch.cat([without.expand_as(context), context])  # 2b n d
        elif sampling.negative_prompt:
            raise ValueError("negative_prompt needs guidance, a guidance_scale other than 1")

        def model(x_t, t):  # the U-Net may compute in 16 bits; everything around it is float32
            x = x_t.to(context.dtype)
            timesteps = torch.full((len(x),), t, device=x.device)  # b, all the same
            # The text decides at high noise. Later, guidance would only exaggerate edges, at twice
            # the work per step. Kynkaanniemi et al. 2024.
            if guided is None or (max_snr is not None and self.diffusion.snr(t) > max_snr):
                return self.unet(x, timesteps, context).float()
            # The U-Net predicts twice, without the text and with it, in one batch of 2b clips.
            output = self.unet(torch.cat([x, x]), timesteps.repeat(2), guided).float()
            return classifier_free_guidance(*output.chunk(2), scale)

        size = sampling.image_size // f  # height and width of the latents
        shape = (len(seeds), sampling.num_frames, self.unet.config.in_channels, size, size)
        # A generator per clip, so that a clip does not depend on the others in its batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x_t = randn(shape, generators).to(context.device)  # b t c h w
        yield from sample_loop(self.diffusion, model, x_t, sampling.num_steps, sampling.sampler,
                               sampling.eta, generators, sampling.timestep_power)

    def decode(self, latents):
        """Clips (b, t, 3, h, w) in [-1, 1], on the CPU, of latents (b, t, c, h, w)."""
        return decode_clips(self.vae, latents).float().cpu()
