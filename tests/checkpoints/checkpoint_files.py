"""Small checkpoints that several test files write: containers, and single files by the rule."""

import json
from pathlib import Path

import torch
from recorded.rule import checkpoint

from checkpoints.containers import read_checkpoint
from checkpoints.tokenizers import save_tokenizer
from files import load_safetensors, save_safetensors
from tokenizer import CLIPTokenizer

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "single_files.json").read_text())
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def write_files(path):
    """The paths {"sd1", "sd2"} of small single files, weights by the rule, and of a merges file."""
    words = ["a red circle", "a blue square", "a green triangle", "moving left", "moving right"]
    save_tokenizer(path / "tokenizer", CLIPTokenizer.train(words, 20, max_length=12))
    for family in RECORDED:
        save_safetensors(path / family, checkpoint(RECORDED[family]["shapes"]))
    paths = {family: path / family for family in RECORDED}
    return paths | {"merges": path / "tokenizer" / "merges.txt"}


def changed(path, files, family, change):
    """A copy of a single file whose tensors were changed by a function, at a path."""
    tensors = load_safetensors(files[family])
    tensors = change(tensors) or tensors
    save_safetensors(path, tensors)
    return path


A, B = torch.arange(6.0).reshape(2, 3), torch.tensor([1.5, -2.0]).half()
WEIGHTS = {"a": A, "b": B}


def holds_weights(path):
    read = read_checkpoint(path)
    same = {
        name: x.dtype == WEIGHTS[name].dtype and x.equal(WEIGHTS[name]) for name, x in read.items()
    }
    return same == {"a": True, "b": True}


def save(path, value=WEIGHTS):
    torch.save(value, path)
    return path
