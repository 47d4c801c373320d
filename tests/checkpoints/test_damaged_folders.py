"""Folders that miss a part, are damaged or hold another architecture: refused by name."""

import dataclasses
import shutil

import pytest
import torch
from helpers import change, fresh_pipeline

import model
import weights
from files import load_safetensors, save_safetensors
from weights import load_pipeline, save_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline(fresh_pipeline(), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A model's folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def refuse(folder, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refuse(folder, f"model: has no {part}/; needs a run with a finished image stage or a diffusers")


def test_a_missing_folder_is_named(tmp_path):
    message = "nowhere: no such file or folder; check the path"
    refuse(tmp_path / "nowhere", message)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_half_written_is_named(folder, part):
    (folder / part / "config.json").unlink()
    refuse(folder, f"{part}: has no config.json; is the folder half written")


@pytest.mark.parametrize("file", [
    "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
])
def test_a_missing_file_of_the_other_parts_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(OSError, match=file):
        load_pipeline(folder)


def test_a_part_without_weights_is_named(folder):
    (folder / "vae" / weights.UNET_WEIGHTS).unlink()
    refuse(folder, "vae: holds no weights")


def test_ema_weights_are_not_looked_for_in_a_folder(folder):
    with pytest.raises(ValueError, match="model: a folder holds one set of weights"):
        load_pipeline(folder, ema=True)


def test_an_inpainting_model_is_refused_by_name(folder):
    unet = dataclasses.replace(fresh_pipeline().unet.config, in_channels=9)
    weights.save_network(folder / "unet", model.UNet(unet))
    refuse(folder, "model: holds an inpainting model: its U-Net needs 9 channels")


@pytest.mark.parametrize("file", [
    "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
    "sampling.json", "tokenizer/vocab.json",
])
@pytest.mark.parametrize("damage", ["", "{", "[]"], ids=["empty", "cut", "a list"])
def test_a_file_that_is_no_json_object_is_named(folder, file, damage):
    (folder / file).write_text(damage)
    refuse(folder, f"{file}: (not a JSON file|needs a JSON object)")


def test_weights_of_another_width_are_refused_by_the_names_of_tensors(folder):
    change(folder / "unet/config.json", block_out_channels=[48, 64])
    refuse(folder, r"does not fit its config.json \(\d+ of another shape: class_embedding")


def test_weights_that_are_missing_are_named(folder):
    path = folder / "vae" / weights.UNET_WEIGHTS
    tensors = load_safetensors(path)
    del tensors["decoder.conv_in.bias"]
    save_safetensors(path, tensors)
    refuse(folder, r"does not fit its config.json \(1 missing: decoder.conv_in.bias\)")


def test_weights_too_many_are_named(folder):
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    save_safetensors(path, load_safetensors(path) | {"text_projection": torch.ones(1)})
    refuse(folder, r"does not fit its config.json \(1 unexpected: text_projection\)")


def test_truncated_weights_are_named(folder):
    path = folder / "unet" / weights.UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    refuse(folder, "unet/.*safetensors: .* does not fit into the file")


@pytest.mark.parametrize("part, values, message", [
    ("unet", {"act_fn": "gelu"}, "act_fn='gelu' is not built here"),
    ("unet", {"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel'"),
    ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos=False is not built here"),
    ("unet", {"mid_block_type": False}, "mid_block_type=False is not built here"),
    ("unet", {"freq_shift": 1}, "freq_shift=1 is not built here"),
    ("unet", {"norm_eps": 1e-6}, "norm_eps=1e-06 is not built here"),
    ("unet", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block=.* is not"),
    ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time' is not built"),
    ("unet", {"dual_cross_attention": True}, "dual_cross_attention=True is not built here"),
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type needs one of"),
    ("unet", {"projection_class_embeddings_input_dim": 7}, "embeddings_input_dim=7 is not built"),
    ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D.* is not"),
    ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types=.* is not built here"),
    ("unet", {"attention_head_dim": 5}, r"unet/config.json: block_out_channels .* heads \(?5"),
    ("unet", {"temporal": "telepathy"}, "temporal needs one of"),
    ("unet", {"layers_per_block": [1, 2]}, "unet/config.json: "),
    ("unet", {"block_out_channels": "wide"}, "unet/config.json: "),
    ("unet", {"in_channels": "four"}, "unet/config.json: in_channels needs int.* got 'four'"),
    ("unet", {"down_block_types": 2}, "unet/config.json: down_block_types needs a list of names"),
    ("unet", {"up_block_types": [[]]}, r"up_block_types=\[\[\]\] is not built here"),
    ("vae", {"down_block_types": [2]}, "vae/config.json: down_block_types needs a list of names"),
    ("unet", {"layers_per_block": 2**63}, "layers_per_block needs int, .* at most 1,000,000"),
    ("unet", {"layers_per_block": 1000}, "needs at most 100 layers and 10 levels, got 1000 and 2"),
    ("vae", {"block_out_channels": [8] * 11}, "at most 100 layers and 10 levels, got 1 and 11"),
    ("unet", {"block_out_channels": [10**9] * 2}, "block_out_channels needs tuple.* at most"),
    ("unet", {"shift_causal": 1}, "shift_causal needs bool, .*got 1"),
    ("vae", {"scaling_factor": float("nan")}, "scaling_factor needs float, .*got nan"),
    ("vae", {"scaling_factor": float("inf")}, "scaling_factor needs float, .*got inf"),
    ("unet", {"_class_name": {}}, "_class_name={} is not built here"),
    ("vae", {"act_fn": "relu"}, "act_fn='relu' is not built here"),
    ("vae", {"_class_name": "VQModel"}, "_class_name='VQModel' is not built here"),
    ("vae", {"use_quant_conv": False}, "use_quant_conv=False is not built here"),
    ("vae", {"shift_factor": 0.06}, "shift_factor=0.06 is not built here"),
    ("vae", {"norm_num_groups": 5}, "vae/config.json: block_out_channels needs multiples"),
    ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, "WithProjection.* is not"),
    ("text_encoder", {"model_type": "t5"}, "model_type='t5' is not built here"),
    ("text_encoder", {"hidden_act": "relu"}, "hidden_act needs one of"),
    ("text_encoder", {"hidden_size": None}, "text_encoder/config.json: .*hidden_size"),
    ("text_encoder", {"num_attention_heads": 7}, "num_attention_heads needs to divide"),
    ("text_encoder", {"num_hidden_layers": "two"}, "text_encoder/config.json: "),
])
def test_an_architecture_that_is_not_built_here_is_refused_by_name(folder, part, values, message):
    change(folder / part / "config.json", **values)
    refuse(folder, message)


@pytest.mark.parametrize("values, message", [
    ({"clip_sample": True}, "scheduler_config.json: clip_sample=True is not built here"),
    ({"thresholding": True}, "scheduler_config.json: thresholding=True is not built here"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatch.* is not built"),
    ({"beta_schedule": "sigmoid"}, "scheduler_config.json: beta_schedule needs one of"),
    ({"prediction_type": "sample"}, "scheduler_config.json: prediction_type needs one of"),
    ({"num_train_timesteps": "many"}, "scheduler_config.json: num_train_timesteps needs int"),
    ({"trained_betas": [[]]}, r"scheduler_config.json: trained_betas needs tuple.* got \[\[\]\]"),
])
def test_a_schedule_that_is_not_built_here_is_refused_by_name(folder, values, message):
    change(folder / "scheduler/scheduler_config.json", **values)
    refuse(folder, message)


@pytest.mark.parametrize("values, message", [
    ({"speed": 3}, "sampling.json: speed=3 is not built here"),
    ({"num_frames": 0}, "sampling.json: num_frames needs >= 1, got 0"),
    ({"num_frames": "8"}, "sampling.json: num_frames needs int, .* got '8'"),
    ({"guidance_scale": ""}, "sampling.json: guidance_scale needs float, .* got ''"),
    ({"sampler": "euler"}, "sampling.json: sampler needs one of .* got 'euler'"),
])
def test_settings_that_are_impossible_are_refused_by_name(folder, values, message):
    change(folder / "sampling.json", **values)
    refuse(folder, message)


@pytest.mark.parametrize("length, message", [
    (10**30, "tokenizer_config.json: model_max_length needs a whole number from 2 to 65536"),
    (9.0, "tokenizer_config.json: model_max_length needs a whole number"),
    (10, "tokenizer: model_max_length needs to be <= 9, the text encoder's positions, got 10"),
])
def test_a_length_that_does_not_fit_the_text_encoder_is_refused(folder, length, message):
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    refuse(folder, message)


def test_a_tokenizer_without_its_settings_is_refused_when_it_is_loaded(folder):
    (folder / "tokenizer/tokenizer_config.json").unlink()
    refuse(folder, "tokenizer: model_max_length needs to be <= 9, .* got 77")


def test_damaged_merges_are_named(folder):
    path = folder / "tokenizer/merges.txt"
    path.write_text(path.read_text() + "xyz zyx\n")
    refuse(folder, "tokenizer/merges.txt: merges need two known symbols")
