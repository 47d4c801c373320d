"""config.json files: ours come back, and each field of Stable Diffusion's is read."""

import json

import pytest

import model
import text
import vae
from checkpoints import configs
from diffusion import Diffusion, schedule_for

SCHEDULE = schedule_for("v_prediction", True, 2.0)  # its betas are a list


@pytest.mark.parametrize("name, presets", [
    ("unet", model.PRESETS), ("vae", vae.PRESETS), ("text", text.PRESETS),
    ("diffusion", {"trained": SCHEDULE}),
])
def test_every_config_comes_back(name, presets):
    for config in presets.values():
        values = json.loads(json.dumps(getattr(configs, f"{name}_to_json")(config)))
        assert getattr(configs, f"{name}_from_json")(values, "here") == config


def test_a_text_encoder_names_the_ends_of_its_texts():
    """The last two of CLIP's 49,408 tokens."""
    values = configs.text_to_json(text.PRESETS["sd1"])
    assert (values["bos_token_id"], values["eos_token_id"]) == (49406, 49407)


DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNET = {  # unet/config.json of the repositories of Stable Diffusion 1.5 and 2.1
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "down_block_types": DOWN,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64, "up_block_types": UP,
}
UNET_2 = UNET | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "num_class_embeds": None,
    "dual_cross_attention": False, "only_cross_attention": False, "sample_size": 96,
    "encoder_hid_dim": None, "upcast_attention": True, "use_linear_projection": True,
}


AVERAGE = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 9,
           "power": 0.7, "update_after_step": 0, "use_ema_warmup": True}


@pytest.mark.parametrize("values, preset", [
    (UNET, "sd1"), (UNET_2, "sd2"), (UNET | AVERAGE, "sd1")], ids=["1.5", "2.1", "unet_ema"])
def test_the_unet_configs_of_stable_diffusion_are_read(values, preset):
    assert configs.unet_from_json(values, "here") == model.PRESETS[preset]


def test_the_autoencoder_config_of_stable_diffusion_is_read():
    """The configs of 1.x and 2.x have no scaling_factor: it is 0.18215."""
    values = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "in_channels": 3, "latent_channels": 4,
        "layers_per_block": 2, "out_channels": 3, "sample_size": 512, "force_upcast": True,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    assert configs.vae_from_json(values, "here") == vae.PRESETS["sd"]


@pytest.mark.parametrize("name, shape", [
    ("sd1", {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
             "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}),
    ("sd2", {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
             "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}),
])
def test_the_text_encoder_configs_of_stable_diffusion_are_read(name, shape):
    values = shape | {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 2, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "pad_token_id": 1, "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
    }
    assert configs.text_from_json(values, "here") == text.PRESETS[name]


@pytest.mark.parametrize("more, prediction_type", [
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "epsilon"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    ({"steps_offset": 0, "clip_sample": True}, "epsilon"),  # StableDiffusionPipeline mends both
])
def test_the_schedules_of_stable_diffusion_are_read(more, prediction_type):
    """The class may be any sampler, because the model depends only on the noise."""
    values = {
        "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None,
    }
    expected = Diffusion(prediction_type=prediction_type)
    assert configs.diffusion_from_json(values | more, "here") == expected


def test_an_absent_field_or_null_gets_the_default_of_diffusers():
    """StableDiffusionPipeline sets an offset of 1 if the schedule has none."""
    values = {"down_block_types": DOWN, "up_block_types": UP, "cross_attention_dim": None}
    assert configs.unet_from_json(values, "here").cross_attention_dim == 1280
    autoencoder = configs.vae_from_json({"block_out_channels": None}, "here")
    assert (autoencoder.block_out_channels, autoencoder.layers_per_block) == ((64,), 1)
    assert configs.diffusion_from_json({}, "here") == Diffusion(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading", prediction_type="epsilon",
    )


@pytest.mark.parametrize("part, values, message", [
    ("unet", {"encoder_hid_dim": 8}, "encoder_hid_dim=8 is not supported"),
    ("unet", {"norm_eps": 1e-6}, "norm_eps=1e-06 is not supported"),
    ("unet", {"attention_head_dim": ["8"]}, r"attention_head_dim needs int \| tuple.* got \['8'\]"),
    ("vae", {"layers_per_block": 2.0}, r"layers_per_block needs int in \[0, inf\], got 2.0"),
    ("vae", {"block_out_channels": [16, -16]}, "block_out_channels needs tuple.* got .16, -16"),
    ("text", {"hidden_size": None}, "hidden_size"),
    ("diffusion", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.* is not supp"),
])
def test_another_architecture_or_a_wrong_value_is_refused_by_name(part, values, message):
    known = {"unet": configs.unet_to_json(model.PRESETS["tiny"]), "diffusion": {},
             "vae": configs.vae_to_json(vae.PRESETS["tiny"]),
             "text": configs.text_to_json(text.PRESETS["tiny"])}
    with pytest.raises(ValueError, match="^here: .*" + message):
        getattr(configs, f"{part}_from_json")(known[part] | values, "here")
