"""config.json files: ours come back, Stable Diffusion's are read to the letter."""

import json

import pytest
import torch

from checkpoints import configs
import model
import text
import vae
from diffusion import Diffusion


@pytest.mark.parametrize("preset", model.PRESETS)
def test_the_configuration_of_every_unet_comes_back(preset):
    config = model.PRESETS[preset]
    values = json.loads(json.dumps(configs.unet_to_json(config)))
    assert configs.unet_from_json(values, "here") == config


@pytest.mark.parametrize("preset", vae.PRESETS)
def test_the_configuration_of_every_autoencoder_comes_back(preset):
    config = vae.PRESETS[preset]
    values = json.loads(json.dumps(configs.vae_to_json(config)))
    assert configs.vae_from_json(values, "here") == config


@pytest.mark.parametrize("preset", text.PRESETS)
def test_the_configuration_of_every_text_encoder_comes_back(preset):
    config = text.PRESETS[preset]
    values = json.loads(json.dumps(configs.text_to_json(config)))
    assert configs.text_from_json(values, "here") == config


def test_a_text_encoder_names_the_ends_of_its_texts():
    """Of CLIP's 49,408 tokens the last two."""
    values = configs.text_to_json(text.PRESETS["sd1"])
    assert (values["bos_token_id"], values["eos_token_id"]) == (49406, 49407)


def test_a_list_of_betas_comes_back():
    betas = tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    diffusion = Diffusion(trained_betas=betas)
    values = json.loads(json.dumps(configs.diffusion_to_json(diffusion)))
    assert configs.diffusion_from_json(values, "here") == diffusion


def test_the_unet_config_of_stable_diffusion_1_5_is_read():
    """As its repository has it, unet/config.json, to the letter."""
    values = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 768, "down_block_types":
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types":
        ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    assert configs.unet_from_json(values, "here") == model.PRESETS["sd1"]


DOWN, UP = (
    ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)


def test_the_unet_config_of_stable_diffusion_2_1_is_read():
    values = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "act_fn":
        "silu", "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 1024, "down_block_types": DOWN,
        "downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True,
        "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": None,
        "only_cross_attention": False, "out_channels": 4, "sample_size": 96, "up_block_types": UP,
        "upcast_attention": True, "use_linear_projection": True,
    }
    assert configs.unet_from_json(values, "here") == model.PRESETS["sd2"]


def test_a_unet_config_with_every_field_of_todays_diffusers_is_read():
    values = configs.unet_to_json(model.PRESETS["sd1"]) | {
        "addition_embed_type": None, "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None, "attention_type": "default",
        "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "cross_attention_norm": None, "dropout": 0.0, "encoder_hid_dim": None,
        "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
        "num_attention_heads": None, "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None, "sample_size": None,
        "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
        "time_embedding_type": "positional", "timestep_post_act": None,
        "transformer_layers_per_block": 1, "upcast_attention": None,
    }
    assert configs.unet_from_json(values, "here") == model.PRESETS["sd1"]


def test_an_absent_field_or_null_has_the_default_of_diffusers():
    values = {"down_block_types": DOWN, "up_block_types": UP}
    for absent in ({}, {"cross_attention_dim": None}):
        assert configs.unet_from_json(values | absent, "here").cross_attention_dim == 1280
    for absent in ({}, {"block_out_channels": None, "layers_per_block": None}):
        autoencoder = configs.vae_from_json(absent, "here")
        assert (autoencoder.block_out_channels, autoencoder.layers_per_block) == ((64,), 1)


@pytest.mark.parametrize("more", [
    {"_diffusers_version": "0.2.2"},
    {"_name_or_path": "CompVis/stable-diffusion-v1-4", "norm_num_groups": 32},
    {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
     "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True,
     "mid_block_add_attention": True},
], ids=["1.4", "1.5", "today"])
def test_the_autoencoder_configs_of_stable_diffusion_are_read(more):
    """Those of 1.x and 2.x have no scaling_factor: it is 0.18215."""
    values = {
        "_class_name": "AutoencoderKL", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4,
        "layers_per_block": 2, "out_channels": 3, "sample_size": 512, "up_block_types":
        ["UpDecoderBlock2D"] * 4,
    }
    assert configs.vae_from_json(values | more, "here") == vae.PRESETS["sd"]


@pytest.mark.parametrize("name, shape", [
    ("sd1", {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
             "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}),
    ("sd2", {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}),
])
def test_the_text_encoder_configs_of_stable_diffusion_are_read(name, shape):
    values = shape | {
        "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "initializer_factor": 1.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "pad_token_id": 1,
        "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
    }
    assert configs.text_from_json(values, "here") == text.PRESETS[name]


@pytest.mark.parametrize("more, prediction_type", [
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "epsilon"),
    ({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}, "epsilon"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear",
      "use_karras_sigmas": False}, "epsilon"),
])
def test_the_schedules_of_stable_diffusion_are_read(more, prediction_type):
    """Whatever steps the class takes, the noise is what the model has learnt from."""
    values = {
        "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None,
    }
    expected = Diffusion(prediction_type=prediction_type)
    assert configs.diffusion_from_json(values | more, "here") == expected


def test_a_schedule_that_says_nothing_is_diffusers_default():
    """With the offset of 1 that StableDiffusionPipeline sets where the config has none."""
    assert configs.diffusion_from_json({}, "here") == Diffusion(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading", prediction_type="epsilon",
    )


@pytest.mark.parametrize("side, block", [
    ("down_block_types", "AttnDownEncoderBlock2D"), ("up_block_types", "AttnUpDecoderBlock2D"),
])
def test_an_autoencoder_of_other_blocks_on_either_side_is_refused_by_name(side, block):
    values = configs.vae_to_json(vae.PRESETS["tiny"])
    values[side] = values[side][1:] + [block]
    with pytest.raises(ValueError, match=f"here: .*{block}.* is not built here"):
        configs.vae_from_json(values, "here")
