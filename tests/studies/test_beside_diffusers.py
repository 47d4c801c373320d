"""Both sides give the same numbers, here at a small size."""

import dataclasses

import pytest
import torch
from helpers import call

pytest.importorskip("diffusers")

from studies import beside_diffusers  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(beside_diffusers, "CONFIG", dataclasses.replace(
        beside_diffusers.CONFIG, block_out_channels=(32, 64, 64, 64), layers_per_block=1))


@pytest.mark.parametrize("how", [{"b": 2, "t": 1}, {"b": 1, "t": 2, "training": True}])
def test_both_sides_of_a_job_give_the_same_numbers(how):
    torch.manual_seed(0)
    ours, theirs = beside_diffusers.unet_job(torch.device("cpu"), "auto", **how)
    a, b = ours().detach(), theirs().detach()
    assert b.std() > 0 and (a - b).abs().max() < 1e-4 * b.abs().max()


def test_the_command_has_a_row_for_each_job(capsys):
    call(beside_diffusers.main, "--only", "frame", "--turns", 1, "--device", "cpu")
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[0].startswith("U-Net, one frame") and len(row) == 4 and float(row[-1]) < 1e-4


def test_with_a_precision_only_our_side_computes_in_it():
    torch.manual_seed(0)
    with torch.no_grad():
        ours, theirs = (side() for side in beside_diffusers.unet_job(
            torch.device("cpu"), "bf16", b=2, t=1))
    assert (ours.dtype, theirs.dtype) == (torch.bfloat16, torch.float32)
    assert 1e-5 < (ours - theirs).abs().max() / theirs.abs().max() < 0.1
