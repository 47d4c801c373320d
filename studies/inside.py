"""Measurements inside a trained model, by hooks, gradients and counts, for figures.py.

Each function is an example of how to look into a model.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

import layers
from checkpoints.weights import load_pipeline
from diffusion import Diffusion, randn
from evaluate import agreement, choose_prompts, draw
from model import UNet
from pipeline import Pipeline
from shapes import MovingShapes
from shift import temporal_shift
from train import denoising_loss
from training.options import TrainOptions, read_record
from training.run import load_image_model
from vae import encode_clip

JUDGED = 128  # clips or images that `judge` draws


@dataclass(frozen=True)
class Trained:
    """A finished run: its options, its video model, and the image model that it started from."""

    path: Path
    options: TrainOptions
    image: Pipeline
    video: Pipeline

    def clips(self, count):
        """Real clips (count, t, 3, h, w) in [-1, 1] that training has not seen, and captions."""
        options = self.options
        data = MovingShapes(count, options.num_frames, options.image_size, options.seed + 1)
        return torch.stack([frames for frames, _ in data]) / 127.5 - 1, data.captions

    def variant(self, **fields):
        """The video model with other fields of its Sampling."""
        sampling = dataclasses.replace(self.video.sampling, **fields)
        return dataclasses.replace(self.video, sampling=sampling)


def load(path):
    """The Trained of a folder. Raises ValueError if it is not a finished run with the shift."""
    options, finished = read_record(path)
    if "video" not in finished or (options.data, options.temporal) != ("shapes", "shift"):
        raise ValueError(f"{path}: needs a finished video stage with --temporal shift on --data "
                         "shapes; train one with `python train.py NEW_RUN`")
    image = load_image_model(path, "cpu", "fp32")
    return Trained(path, options, image, load_pipeline(path))


def draw_prompt(model, prompt, seed):
    """A clip (t, 3, h, w) in [-1, 1] of a prompt."""
    *_, latents = model.sample([prompt], [seed])
    return model.decode(latents)[0]


def judge(model, num_frames):
    """(clips (JUDGED, num_frames, 3, h, w) of choose_prompts, which of them are right (JUDGED,))"""
    prompts = choose_prompts(JUDGED)
    clips = draw(model, prompts, num_frames, 1000, 16)
    return clips, agreement(clips, prompts)[:, : 2 if num_frames == 1 else 3].all(1)


def with_shifts(unet, shifts):
    """A U-Net with the same weights and 0, 1 or 2 shifts per block."""
    fields = {"temporal": "shift", "shifts": shifts} if shifts else {"temporal": "none"}
    other = UNet(dataclasses.replace(unet.config, **fields))
    other.load_state_dict(unet.state_dict())
    return other


def reach_of(unet, num_frames):
    """How much each layer's middle frame depends on each frame of the input: (layers, frames).

    It is the norm of a gradient, exactly 0 where no path leads from one to the other.
    """
    outputs, generator = [], torch.Generator().manual_seed(0)

    def run(layer, *inputs):
        outputs.append(layer(*inputs))
        return outputs[-1]

    size = 2 * unet.config.downscale  # small, because height and width make no difference here
    x = torch.randn(1, num_frames, unet.config.in_channels, size, size, generator=generator)
    context = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    with torch.enable_grad(), patch.object(unet, "run", run):
        unet(x.requires_grad_(), torch.tensor([500]), context)
        gradients = [torch.autograd.grad(output[:, num_frames // 2].square().sum(), x,
                                         retain_graph=True)[0] for output in outputs]
    return torch.stack([gradient[0].flatten(1).norm(dim=1) for gradient in gradients])


def denoise(model, prompt, seed):
    """[(t, x_t, x0)] of all denoising steps: the sampler's latents and the model's guess."""
    steps, predict = [], Diffusion.predict

    def look(diffusion, output, x_t, t):
        x0, eps = predict(diffusion, output, x_t, t)
        steps.append((t, x_t, x0))
        return x0, eps

    with patch.object(Diffusion, "predict", look):
        draw_prompt(model, prompt, seed)
    return steps


def shift_without(*thirds):
    """A context in which frames keep their own channels in the thirds named "past" or "future"."""
    def shift(x):
        fold, out = x.shape[2] // 3, temporal_shift(x).clone()
        for third in thirds:
            channels = slice(fold) if third == "past" else slice(-fold, None)
            out[:, :, channels] = x[:, :, channels]
        return out

    return patch.object(layers, "temporal_shift", shift)


def losses_of(model, clips, texts, levels, seed):
    """The loss of clips (b, t, 3, h, w) with their texts, at each of some timesteps."""
    x0 = torch.stack([encode_clip(model.vae, 127.5 * (clip + 1)) for clip in clips])
    noise, context = randn(x0.shape, torch.Generator().manual_seed(seed)), model.encode_text(texts)
    return [denoising_loss(model.unet, model.diffusion, x0, noise, level.expand(len(x0)), context)
            for level in levels]
