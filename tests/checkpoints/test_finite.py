"""NaN and infinity are named: the tensors of a model, and the network that gives them."""

import pytest
import torch
from checkpoint_files import UNET, VAE, changed
from helpers import call, fresh_pipeline

from checkpoints import __main__ as command
from checkpoints.finite import decode_finite, require_finite
from checkpoints.weights import load_pipeline, save_pipeline
from pipeline import Sampling

IN_UNET, IN_VAE = UNET + "middle_block.1.norm.weight", VAE + "decoder.norm_out.weight"


def test_the_command_names_every_damaged_tensor_and_converts_nothing(files, tmp_path, capsys):
    path = changed(tmp_path / "x.safetensors", files["sd1"], lambda tensors: tensors | {
        IN_UNET: tensors[IN_UNET] * torch.nan, IN_VAE: tensors[IN_VAE] - torch.inf})
    message = f"x.safetensors: holds NaN or infinity in {IN_UNET}, {IN_VAE}; use another"
    with pytest.raises(ValueError, match=message):
        call(command.main, path, "--convert", tmp_path / "new")
    assert "Stable Diffusion 1.x" in capsys.readouterr().out and not (tmp_path / "new").exists()
    assert load_pipeline(path)  # sampling does not search


@pytest.mark.parametrize("part, named, name", [
    ("text_encoder", "text encoder", "text_model.final_layer_norm.bias"),
    ("unet", "U-Net", "conv_out.bias"), ("vae", "autoencoder", "decoder.conv_norm_out.bias"),
])
def test_the_first_network_whose_output_is_not_finite_is_named(tmp_path, part, named, name):
    pipeline = fresh_pipeline()
    getattr(pipeline, part).get_parameter(name).data[0] = torch.nan
    *_, latents = pipeline.sample(["a"], [0], Sampling(1, 16, num_steps=1))
    with pytest.raises(ValueError, match=f"the {named} gives NaN or infinity; `python -m check"):
        decode_finite(pipeline, ["a"], latents)
    save_pipeline(pipeline, tmp_path)
    with pytest.raises(ValueError, match=f": holds NaN or infinity in {part}/{name};"):
        require_finite(load_pipeline(tmp_path), tmp_path)
