"""What an autoencoder leaves of clips whose truth is known: fidelity, flicker, recognition."""

import torch

import vae
from evaluate import agreement, rates
from metrics import mean_over_clips, psnr, ssim


def reconstruct(autoencoder, clip):
    """Frames (t, 3, h, w) in [-1, 1] of a clip of that shape, through its latents."""
    latents = vae.encode_clip(autoencoder, (clip + 1) * 127.5)
    return vae.decode_clips(autoencoder, latents[None])[0, : len(clip)]


def moving_psnr(real, coded):
    """PSNR in dB of what moves in clips (n, t, 3, h, w): (n,).

    As in the loss of train.py, these are the pixels that differ from their frame's median colour.
    """
    background = real.flatten(3).median(dim=3).values[..., None, None]  # n t c 1 1
    differs = (real - background).abs().amax(dim=2, keepdim=True) > 0.1
    weight = differs.expand_as(real).double()
    error = ((real - coded).double().square() * weight).sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4))
    return 10 * torch.log10(2**2 / error)


def flicker(real, coded):
    """Mean squared difference of the frame-to-frame changes of clips (n, t, 3, h, w): (n,)."""
    return (coded.diff(dim=1) - real.diff(dim=1)).square().mean((1, 2, 3, 4))


def fidelity(autoencoder, real, prompts):
    """(clips, row of `compare`): what an autoencoder leaves of clips (n, t, 3, h, w)."""
    coded = torch.stack([reconstruct(autoencoder, clip) for clip in real])
    latents = vae.encode_clip(autoencoder, (real[0] + 1) * 127.5).numel()
    return coded, {
        "latents a clip": latents,
        "PSNR": round(mean_over_clips(psnr, real, coded), 2),
        "PSNR, moving": round(moving_psnr(real, coded).mean().item(), 2),
        "SSIM": round(mean_over_clips(ssim, real, coded), 4),
        "flicker, 1e-4": round(1e4 * flicker(real, coded).mean().item(), 1),
        "recognised, %": rates(agreement(coded, prompts))["all"],
    }
