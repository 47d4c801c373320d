"""Fidelity of clips by hand, and of an autoencoder that loses nothing."""

import math

import pytest
import torch

import papers.fidelity
from evaluate import choose_prompts
from metrics import real_clips
from papers.fidelity import fidelity, flicker, moving_psnr
from vae import PRESETS, AutoencoderKL


def test_flicker_by_hand():
    real = torch.zeros(1, 3, 1, 1, 2)
    coded = torch.tensor([0.0, 3.0, 3.0])[None, :, None, None, None].expand_as(real)
    assert flicker(real, coded).tolist() == [4.5]  # (3 - 0)^2 and 0^2, their mean
    assert flicker(real, real + 7).tolist() == [0]  # a constant error does not flicker


def test_psnr_of_what_moves_ignores_the_background():
    real = torch.full((1, 2, 3, 4, 4), -1.0)
    real[..., 0, 0] = 1
    coded = real.clone()
    coded[..., 0, 0] -= 0.2
    coded[..., 3, 3] += 1.5  # of the background
    assert moving_psnr(real, coded).item() == pytest.approx(20 * math.log10(2 / 0.2), abs=1e-4)


def test_an_autoencoder_that_loses_nothing_has_perfect_numbers(monkeypatch):
    prompts = choose_prompts(4)
    real = real_clips(4, 8, 32, 1000, prompts)
    monkeypatch.setattr(papers.fidelity, "reconstruct", lambda _, clip: clip + 1e-3)
    _, row = fidelity(AutoencoderKL(PRESETS["tiny"]), real, prompts)
    assert row["PSNR"] == row["PSNR, moving"] == pytest.approx(66.02, abs=0.01)
    assert row["flicker, 1e-4"] == 0 and row["latents a clip"] == 2048
    assert row["recognised, %"] == 100
