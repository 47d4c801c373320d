"""Measures of clips that went through an autoencoder: fidelity, flicker, recognition."""

import numpy as np
import torch

import vae
from evaluate import agreement, consistency, crispness, mean_over_clips, psnr, rates


def reconstruct(autoencoder, clips, noise_level=0.0):
    """Clips (n, t, 3, h, w) in [-1, 1], encoded to latents and decoded again.

    noise_level is the standard deviation of noise added to the latents, which have variance 1.
    """
    generator, coded = torch.Generator().manual_seed(0), []
    for clip in clips:
        latents = vae.encode_clip(autoencoder, (clip + 1) * 127.5)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        frames = vae.decode_clips(autoencoder, (latents + noise_level * noise)[None])[0]
        coded.append(frames[: len(clip)].float().cpu())
    return torch.stack(coded)


def moving_psnr(real, coded):
    """PSNR in dB of the moving pixels of clips (n, t, 3, h, w): (n,).

    As in train.py's loss, a pixel moves if it differs from its frame's median colour.
    """
    background = real.flatten(3).median(dim=3).values[..., None, None]  # n t c 1 1
    differs = (real - background).abs().amax(dim=2, keepdim=True) > 0.1
    weight = differs.expand_as(real).double()
    error = ((real - coded).double().square() * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))
    return 10 * torch.log10(2**2 / error)


def flicker(real, coded):
    """Mean squared error of the frame-to-frame changes of clips (n, t, 3, h, w): (n,)."""
    return (coded.diff(dim=1) - real.diff(dim=1)).square().mean((1, 2, 3, 4))


def fidelity(real, coded):
    """{measure: value} of an autoencoder's copies of real clips (n, t, 3, h, w)."""
    return {"PSNR": round(mean_over_clips(psnr, real, coded), 2),
            "PSNR, moving": round(moving_psnr(real, coded).mean().item(), 2),
            "flicker, 1e-4": round(1e4 * flicker(real, coded).mean().item(), 1)}


def appearance(clips, prompts):
    """{measure: value} of clips (n, t, 3, h, w) that were drawn for prompts."""
    crisp = [crispness(clip, prompt[1]) for clip, prompt in zip(clips, prompts, strict=True)]
    return {"consistency": round(mean_over_clips(consistency, clips[:, None]), 4),
            "crispness": round(float(np.mean(crisp)), 4),
            "recognised, %": rates(agreement(clips, prompts))["all"]}
