"""Fidelity of clips, by hand."""

import math

import pytest
import torch

from evaluate import choose_prompts, real_clips
from papers.fidelity import appearance, fidelity, flicker, moving_psnr, reconstruct
from vae import PRESETS, AutoencoderKL, decode_clips, encode_clip


def test_flicker_is_the_mean_square_of_the_error_of_changes():
    real = torch.arange(3.0)[None, :, None, None, None]
    coded = torch.tensor([0.0, 4.0, 5.0])[None, :, None, None, None]
    assert flicker(real, coded).tolist() == [4.5]  # the mean of (4 - 1)^2 and (1 - 1)^2


def test_psnr_of_what_moves_ignores_the_background():
    real = torch.full((1, 2, 3, 4, 4), -1.0)
    real[..., 0, 0] = -0.8  # faint, but it moves
    coded = real.clone()
    coded[..., 0, 0] -= 0.2
    coded[..., 3, 3] += 1.5  # background
    assert moving_psnr(real, coded).item() == pytest.approx(20 * math.log10(2 / 0.2), abs=1e-4)


def test_fidelity_is_in_dB_and_ten_thousandths():
    real = torch.zeros(1, 2, 3, 4, 4)
    real[..., 0] = 1
    coded = real + torch.tensor([0.05, -0.05])[:, None, None, None]  # the change is wrong by 0.1
    decibel = round(20 * math.log10(2 / 0.05), 2)
    assert fidelity(real, coded) == {"PSNR": decibel, "PSNR, moving": decibel,
                                     "flicker, 1e-4": 100}


def test_real_clips_are_recognised_and_crisp():
    prompts = choose_prompts(4)
    row = appearance(real_clips(4, 8, 32, 1000, prompts), prompts)
    assert row["recognised, %"] == 100 and row["crispness"] > 0.95


def test_noise_is_added_to_the_latents_of_each_clip():
    torch.manual_seed(0)
    autoencoder, clips = AutoencoderKL(PRESETS["tiny"]), real_clips(2, 3, 16, 0)
    generator, coded = torch.Generator().manual_seed(0), reconstruct(autoencoder, clips, 0.5)
    for clip, result in zip(clips, coded, strict=True):
        latents = encode_clip(autoencoder, (clip + 1) * 127.5)
        noisy = latents + 0.5 * torch.randn(latents.shape, generator=generator)
        assert torch.equal(result, decode_clips(autoencoder, noisy[None])[0])
