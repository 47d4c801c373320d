"""From a text to pixels: the five parts of a latent diffusion model at work together.

    text -> tokenizer -> text_encoder -> context (b, n, d)
    noise (b, t, c, h, w) -> unet, again and again, told the context -> latents -> vae -> frames

This is all of text-to-video sampling; files are weights.py's job, flags and pictures sample.py's.
Latent diffusion, Rombach et al. 2022, section 3; Latent-Shift, An et al. 2023, section 3.1.
"""

from dataclasses import dataclass, field

import torch

from cli import option
from diffusion import Diffusion, classifier_free_guidance, randn, sample_loop
from model import UNet
from packing import pack
from text import CLIPTextModel, CLIPTokenizer
from vae import AutoencoderKL, decode_clips


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn. A run keeps its own in sampling.json; flags override it."""

    num_frames: int = option(16, "frames of a clip; 1 draws a picture")
    image_size: int = option(256, "height and width of a frame, in pixels")
    frames_per_second: float = option(8.0, "frames per second of the files written")
    num_steps: int = option(50, "denoising steps")
    guidance_scale: float = option(7.5, "weight of the text; 1 switches guidance off")
    sampler: str = option("ddim", "ddim or ddpm", choices=("ddim", "ddpm"))
    eta: float = option(0.0, "part of DDPM's noise that a DDIM step adds")
    shared_noise: float = option(0.0, "part of the noise's variance that frames have in common")

    def __post_init__(self):
        limits = {
            "num_frames": (1, None), "image_size": (1, None), "frames_per_second": (0.1, 50),
            "num_steps": (1, None), "eta": (0, 1), "shared_noise": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value or (high is not None and value > high):
                limit = f">= {low}" if high is None else f"to lie in [{low}, {high}]"
                raise ValueError(f"{name} needs {limit}, got {value}")


@dataclass
class Pipeline:
    """The parts of a trained model; without a `tokenizer` (None) it reads no texts."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer | None
    diffusion: Diffusion
    sampling: Sampling = field(default_factory=Sampling)
    report: object = None  # of a loaded one: what became of the file's tensors (convert.Report)

    def to(self, device):
        """Move the networks to a device, and set them up for sampling there, for good."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(device).eval().requires_grad_(False)
        for network in (self.unet, self.vae):
            if torch.device(device).type == "cpu":
                pack(network)
            else:  # 2-D convolutions are faster with channels innermost
                network.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def encode_text(self, texts):
        """Texts to their context (len(texts), n, d), on the text encoder's device.

        Raises:
            ValueError: if there is no tokenizer: the single files of Stable Diffusion hold none.
        """
        if self.tokenizer is None:
            raise ValueError("this model holds no tokenizer to read a text with; name a merges "
                             "file (--merges PATH), such as any diffusers folder has in tokenizer/"
                             )
        ids = self.tokenizer(list(texts))
        return self.text_encoder(ids.to(next(self.text_encoder.parameters()).device))

    @torch.no_grad()
    def sample(self, prompts, seeds, sampling=None):
        """Yield latents (b, t, c, h, w) after each denoising step, one clip for each prompt.

        seeds are ints, one a prompt: a clip depends on its own seed and prompt, not on its
        neighbours. `decode` turns the last latents, or any before, into pixels.
        """
        sampling = sampling or self.sampling
        f = self.vae.config.downscale
        if sampling.image_size % f:
            raise ValueError(f"image_size needs a multiple of {f}, got {sampling.image_size}")
        context = self.encode_text(prompts)
        guided = sampling.guidance_scale != 1
        if guided:
            context = torch.cat([self.encode_text([""]).expand_as(context), context])
        text = self.unet.read(context)

        def model(x_t, timesteps):
            output = self.unet(x_t, timesteps, text)
            if guided:
                output = classifier_free_guidance(*output.chunk(2), sampling.guidance_scale)
            return output

        size = sampling.image_size // f
        shape = (len(seeds), sampling.num_frames, self.unet.config.in_channels, size, size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shared = sampling.shared_noise if sampling.num_frames > 1 else 0.0
        x_t = randn(shape, generators, shared).to(context)
        yield from sample_loop(
            self.diffusion,
            model,
            x_t,
            sampling.num_steps,
            sampling.sampler,
            sampling.eta,
            generators,
        )

    def decode(self, latents):
        """Clips (b, t, 3, h, w) in [-1, 1], on the CPU, of latents (b, t, c, h, w)."""
        return decode_clips(self.vae, latents).float().cpu()
