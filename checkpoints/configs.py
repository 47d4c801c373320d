"""Convert config.json files to and from the configs of our networks, and read schedules.

Our configs have the field names of diffusers and transformers. A config.json also holds options
for which this project has only one value. Another value means an architecture that this project
lacks, so it is refused by name. An absent or null field gets the default of diffusers' class.
"""

import dataclasses
import inspect
import math
import re
import types
import typing

from diffusion import Diffusion
from model import UNetConfig
from support.files import from_json
from text import TextConfig
from vae import VAEConfig

# Options of diffusers for which this project has only one value
UNET_CONSTANTS = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5, "dropout": 0.0,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "attention_type": "default",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "time_embedding_type": "positional",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "transformer_layers_per_block": 1
}
VAE_CONSTANTS = {"_class_name": "AutoencoderKL", "act_fn": "silu", "use_quant_conv": True,
                 "use_post_quant_conv": True}
TEXT_CONSTANTS = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
# Options that do not change the network. Upcasting prevents overflows of SD 2.1 in float16; there
# this project keeps autoencoders in float32, and PyTorch's fused attention adds up in float32.
# The last ones are EMAModel's.
IGNORED = ("upcast_attention", "force_upcast", "addition_embed_type_num_heads", "_class_name",
           "_diffusers_version", "_name_or_path", "decay", "min_decay", "inv_gamma", "power",
           "optimization_step", "update_after_step", "use_ema_warmup")

# Defaults of diffusers' classes that differ from ours
UNET_ABSENT = {"cross_attention_dim": 1280}
VAE_ABSENT = {"block_out_channels": [64], "layers_per_block": 1}
SCHEDULE_ABSENT = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                   "set_alpha_to_one": True}  # of DDIMScheduler
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ASSUMED = ("assumed to predict v, because the file does not say it; Stable Diffusion 2-base needs "
           "prediction_type='epsilon' (--prediction-type epsilon)")


def from_config(cls, values, constants, where, absent=()):
    """A config dataclass from the values of a JSON file.

    A key that is not a field must have its value in `constants`, be null or false, or be in
    IGNORED. `absent` has those defaults of diffusers that differ from ours.

    Raises ValueError naming the file `where` and the key.
    """
    values = dict(absent) | {k: v for k, v in values.items() if v is not None}
    constants = {name: values.get(name) for name in IGNORED} | constants
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name, value in values.items():
        if name not in fields:
            fits = value == constants.get(name, False)
            problem = f"{name}={value!r:.60} is not supported"
        else:
            kind, about = fields[name].type, fields[name].metadata
            low, high = about.get("low", 0), about.get("high", math.inf)
            choices = about.get("choices")
            fits = value in choices if choices else has_type(value, kind, low, high)
            needed = choices or f"{inspect.formatannotation(kind)} in [{low}, {high}]"
            problem = f"{name} needs {needed}, got {value!r:.60}"
        if not fits:
            raise ValueError(f"{where}: {problem}")
    return from_json(cls, {k: v for k, v in values.items() if k in fields}, where)


def has_type(value, kind, low, high):
    """Whether a JSON value fits a field's type and range; a list fits a tuple, an int a float."""
    if isinstance(kind, types.UnionType):
        return any(has_type(value, one, low, high) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(has_type(x, item, low, high) for x in value)
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    return is_kind and (kind is str or low <= value <= high)


def unet_blocks(levels):
    """The types of a U-Net's blocks, given which levels have attention."""
    kinds = ["CrossAttn" if attention else "" for attention in levels]
    return {"down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)]}


def unet_to_json(config):
    """The config.json of a U-Net as diffusers writes it, plus our temporal fields."""
    values = dataclasses.asdict(config)
    values |= unet_blocks(values.pop("attention_levels"))
    if config.class_embed_type is not None:  # its input is a hidden state of the text
        values["projection_class_embeddings_input_dim"] = config.cross_attention_dim
    return UNET_CONSTANTS | values


def unet_from_json(values, where):
    """A UNetConfig from the values of a config.json."""
    levels = [kind == "CrossAttnDownBlock2D" for kind in values.get("down_block_types") or ()]
    constants = UNET_CONSTANTS | unet_blocks(levels)
    constants |= {"projection_class_embeddings_input_dim": values.get("cross_attention_dim")}
    values = values | {"attention_levels": levels}
    return from_config(UNetConfig, values, constants, where, UNET_ABSENT)


def vae_blocks(widths):
    """The types of an autoencoder's blocks, given the width of each level."""
    return {"down_block_types": ["DownEncoderBlock2D"] * len(widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(widths)}


def vae_to_json(config):
    """The config.json of an autoencoder as diffusers writes it."""
    return VAE_CONSTANTS | dataclasses.asdict(config) | vae_blocks(config.block_out_channels)


def vae_from_json(values, where):
    """A VAEConfig from the values of a config.json."""
    constants = VAE_CONSTANTS | vae_blocks(values.get("block_out_channels") or ())
    return from_config(VAEConfig, values, constants, where, VAE_ABSENT)


def text_to_json(config):
    """The config.json of a text encoder as transformers writes it."""
    ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    return TEXT_CONSTANTS | dataclasses.asdict(config) | ends


def text_from_json(values, where):
    """A TextConfig from the values of a config.json; most of its keys only concern training."""
    names = {*TEXT_CONSTANTS, *(field.name for field in dataclasses.fields(TextConfig))}
    values = {k: v for k, v in values.items() if k in names}
    return from_config(TextConfig, values, TEXT_CONSTANTS, where)


def diffusion_to_json(diffusion):
    """The scheduler_config.json of a schedule."""
    values = {f.name: getattr(diffusion, f.name) for f in dataclasses.fields(diffusion) if f.init}
    return {"_class_name": "DDIMScheduler", **values, "clip_sample": False}


def diffusion_from_json(values, where):
    """A Diffusion from the scheduler_config.json of any scheduler that adds noise as DDPM does.

    Options of the scheduler's sampler are ignored: the model depends only on the noise. So are
    steps_offset and clip_sample, which StableDiffusionPipeline always sets to 1 and false.
    """
    names = {"thresholding", *(f.name for f in dataclasses.fields(Diffusion))} - {"steps_offset"}
    if str(values.get("_class_name")).startswith(("FlowMatch", "EDM")):  # their noise differs
        names.add("_class_name")
    values = {k: v for k, v in values.items() if k in names}
    return from_config(Diffusion, values, {"_class_name": None}, where, SCHEDULE_ABSENT)


def diffusion_from_file(tensors, metadata, is_sd2, given):
    """(Diffusion, image size, notes) of a single file; `given` overrides fields of the schedule."""
    # sd-scripts and ComfyUI write metadata, ComfyUI also the empty tensors v_pred and ztsnr.
    said = {key.removeprefix("modelspec."): text.lower() for key, text in metadata.items()}
    kind = "v" if "v_pred" in tensors else said.get("prediction_type") or said.get("predict_key")
    kind = "v_prediction" if kind == "v" else kind
    values = {"prediction_type": kind or ("v_prediction" if is_sd2 else "epsilon")}
    values |= (ZERO_TERMINAL_SNR if "ztsnr" in tensors else {}) | given
    told = kind, "zero terminal SNR" if "ztsnr" in tensors else None, said.get("resolution")
    notes = [f"the file says: {fact}" for fact in told if fact]
    if is_sd2 and not kind and "prediction_type" not in given:
        notes.append(ASSUMED)
    sizes = [int(number) for number in re.findall(r"\d+", told[2] or "")]  # width and height
    default = 768 if is_sd2 and values["prediction_type"] == "v_prediction" else 512
    return Diffusion(**values), min(sizes, default=0) // 64 * 64 or default, tuple(notes)
