"""Shared by the tests of checkpoints: names, changed files, and a small container."""

import json
from pathlib import Path

import torch

from checkpoints.containers import read_checkpoint
from checkpoints.safetensors_file import load_safetensors, save_safetensors

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "single_files.json").read_text())
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
A, B = torch.arange(6.0).reshape(2, 3), torch.tensor([1.5, -2.0]).half()
WEIGHTS = {"a": A, "b": B}


def changed(path, file, change):
    """A copy of a single file at a path; `change` is a function of its {name: tensor}."""
    save_safetensors(path, change(load_safetensors(file)))
    return path


def add(name, *shape):
    """A change that adds a tensor of zeros, or replaces a tensor by one."""
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def same(a, b):
    """Whether two {name: tensor} are equal: names, dtypes, values."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def holds_weights(path):
    return same(read_checkpoint(path), WEIGHTS)


def save(path, value=WEIGHTS):
    torch.save(value, path)
    return path
