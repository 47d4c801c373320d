"""Both sides of a job give the same numbers, here at a small size."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from studies import beside_diffusers  # noqa: E402

SMALL = {
    "unet": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
    "vae": {"block_out_channels": (32, 32, 32, 64), "layers_per_block": 1},
    "text_encoder": {"num_hidden_layers": 1, "intermediate_size": 256},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for part, (network, config, *rest) in beside_diffusers.PARTS.items():
        config = dataclasses.replace(config, **SMALL[part])
        monkeypatch.setitem(beside_diffusers.PARTS, part, (network, config, *rest))


@pytest.mark.parametrize("make_sides", [
    lambda device: beside_diffusers.unet_job(device, b=2, t=1),
    lambda device: beside_diffusers.unet_job(device, b=1, t=2, training=True),
    beside_diffusers.decode_job, beside_diffusers.image_job,
], ids=["frames", "training", "decode", "image"])
def test_both_sides_of_a_job_give_the_same_numbers(make_sides, monkeypatch):
    monkeypatch.setattr(beside_diffusers, "FRAMES", 2)
    torch.manual_seed(0)
    ours, theirs = make_sides(torch.device("cpu"))
    a, b = ours().detach(), theirs().detach()
    assert b.std() > 0 and (a - b).abs().max() < 1e-4 * b.abs().max()


def test_both_sides_load_the_same_weights(tmp_path):
    beside_diffusers.write_checkpoint(tmp_path)
    *_, ours = beside_diffusers.load(tmp_path, "ours")  # the sum of all weights
    *_, theirs = beside_diffusers.load(tmp_path, "theirs")
    assert ours == pytest.approx(theirs)
