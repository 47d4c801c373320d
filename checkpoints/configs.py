"""Configs of networks: from and to config.json, or inferred from the tensors of a single file.

Our configs use the field names of diffusers, so a config.json is a dataclass plus constants. A
constant with another value means an architecture that is not built here, and is refused by name. A
field that is absent or null gets the default of diffusers' class.

A single file holds only tensors. What their shapes do not determine is fixed for each version of
Stable Diffusion: groups of 32, heads, the text encoder's activation, the scaling factor 0.18215.
"""

import dataclasses

from diffusion import Diffusion
from files import from_json
from model import UNetConfig
from text import TextConfig
from vae import VAEConfig

# Prefixes of the three networks in a single file.
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."

# Options of diffusers that have one value here. Any other key of a config.json that is not a field
# of ours has to be null, false or absent.
UNET_CONSTANTS = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5, "dropout": 0.0,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "attention_type": "default",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "time_embedding_type": "positional",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "transformer_layers_per_block": 1
}
VAE_CONSTANTS = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
TEXT_CONSTANTS = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
# These do not change the network. Upcasting computes in float32 where SD 2.1 overflows in float16;
# this project computes in float32 or bfloat16, which do not overflow there.
IGNORED = ("upcast_attention", "force_upcast", "addition_embed_type_num_heads",
           "_diffusers_version", "_name_or_path")

MOST = 10**6  # of any number; larger ones are damage, and the sizes of tensors would overflow

# Defaults of diffusers' classes that differ from ours.
UNET_ABSENT = {"cross_attention_dim": 1280}
VAE_ABSENT = {"block_out_channels": [64], "layers_per_block": 1}
# Defaults of DDIMScheduler, without two that StableDiffusionPipeline replaces: an absent
# steps_offset becomes 1, our default, and an absent clip_sample becomes false.
SCHEDULE_ABSENT = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                   "set_alpha_to_one": True}


def from_config(cls, values, constants, where):
    """A config dataclass from the values of a config.json. Lists become tuples."""
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    for name, value in values.items():
        known = name in names or name in IGNORED
        if not known and value not in ([constants[name]] if name in constants else [None, False]):
            raise ValueError(f"{where}: {name}={value!r} is not built here")
    chosen = {k: v for k, v in values.items() if k in names and v is not None}
    return from_json(cls, chosen, where, MOST)


def without_null(values):
    """The values of a config.json that are set: null stands for the default, as an absent one."""
    return {k: v for k, v in values.items() if v is not None}


def block_types(values, name, where):
    """The types of a network's blocks, a list of str, taken out of the values of a config.json."""
    kinds = values.get(name) or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"{where}: {name} needs a list of names, got {kinds!r:.60}")
    return kinds


def unet_blocks(levels):
    """The types of a U-Net's blocks, from which of its levels have attention."""
    kinds = ["CrossAttn" if attention else "" for attention in levels]
    return {"down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)]}


def unet_to_json(config):
    """The config.json of a U-Net as diffusers writes it, plus our temporal fields."""
    values = dataclasses.asdict(config)
    values |= unet_blocks(values.pop("attention_levels"))
    if config.class_embed_type is not None:  # projects the text's last hidden state
        values["projection_class_embeddings_input_dim"] = config.cross_attention_dim
    return UNET_CONSTANTS | values


def unet_from_json(values, where):
    """A UNetConfig from config.json. Raises ValueError for an architecture not built here."""
    values = UNET_ABSENT | without_null(values)
    levels = [kind == "CrossAttnDownBlock2D"
              for kind in block_types(values, "down_block_types", where)]
    dim = values.pop("projection_class_embeddings_input_dim", None)
    if values.get("class_embed_type") and dim != values.get("cross_attention_dim"):
        raise ValueError(f"{where}: projection_class_embeddings_input_dim={dim} is not built here")
    constants = UNET_CONSTANTS | unet_blocks(levels)
    return from_config(UNetConfig, values | {"attention_levels": levels}, constants, where)


def vae_to_json(config):
    """The config.json of an autoencoder, as diffusers writes it, plus our temporal fields."""
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels,
              "up_block_types": ["UpDecoderBlock2D"] * levels}
    values = dataclasses.asdict(config)
    if config.temporal == "none":  # a file that diffusers' own class reads without a remark
        del values["temporal"], values["max_frames"]
    return VAE_CONSTANTS | values | blocks


def vae_from_json(values, where):
    """A VAEConfig from an autoencoder's config.json."""
    values = VAE_ABSENT | without_null(values)
    blocks = {kind for name in ("down_block_types", "up_block_types")
              for kind in block_types(values, name, where)}
    values = {k: v for k, v in values.items() if not k.endswith("_block_types")}
    if others := blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(f"{where}: {' and '.join(sorted(others))} is not built here")
    constants = VAE_CONSTANTS | {"use_quant_conv": True, "use_post_quant_conv": True}
    return from_config(VAEConfig, values, constants, where)


def text_to_json(config):
    """The config.json of a text encoder, as transformers writes it."""
    ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    return TEXT_CONSTANTS | dataclasses.asdict(config) | ends


def text_from_json(values, where):
    """A TextConfig from config.json; keys that do not change the network are ignored."""
    names = {*TEXT_CONSTANTS, *(field.name for field in dataclasses.fields(TextConfig))}
    values = {k: v for k, v in values.items() if k in names}
    return from_config(TextConfig, values, TEXT_CONSTANTS, where)


def diffusion_to_json(diffusion):
    """The scheduler_config.json of a schedule."""
    values = {f.name: getattr(diffusion, f.name) for f in dataclasses.fields(diffusion) if f.init}
    return {"_class_name": "DDIMScheduler", **values, "clip_sample": False}


def diffusion_from_json(values, where):
    """A Diffusion from the scheduler_config.json of any scheduler that adds noise as DDPM does.

    The options of its sampler are ignored: the model depends only on the noise it was trained with.
    """
    kind = str(values.get("_class_name"))
    if kind.startswith(("FlowMatch", "EDM")):
        raise ValueError(f"{where}: _class_name={kind!r} is not built here")
    names = {"clip_sample", "thresholding", *(f.name for f in dataclasses.fields(Diffusion))}
    known = {k: v for k, v in without_null(values).items() if k in names}
    return from_config(Diffusion, SCHEDULE_ABSENT | known, {}, where)


def has(names, prefix):
    return any(name.startswith(prefix) for name in names)


def count(names, prefix):
    """How many consecutive numbers, from 0, follow the prefix in the names."""
    number = 0
    while has(names, f"{prefix}{number}."):
        number += 1
    return number


def part_of(tensors, prefix):
    """{name: shape} of the tensors with a prefix, which is removed."""
    return {name.removeprefix(prefix): tuple(tensor.shape)
            for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_config(tensors, sample_size):
    """The U-Net's config. Raises KeyError if a tensor that it needs is missing."""
    shapes = part_of(tensors, UNET)
    blocks = count(shapes, "input_blocks.")
    steps = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes]
    per_level = steps[0] if steps else blocks  # the ResnetBlocks and a downsampler
    firsts = [f"input_blocks.{1 + i * per_level}" for i in range(len(steps) + 1)]
    widths = tuple(shapes[f"{first}.0.in_layers.2.weight"][0] for first in firsts)
    # Stable Diffusion 1 has 8 heads at every level; 2, which has linear projections, heads 64 wide.
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    if linear and any(width % 64 for width in widths):
        raise ValueError(f"heads are 64 wide in this form, which does not divide {widths}")
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1], out_channels=shapes["out.2.weight"][0],
        block_out_channels=widths, layers_per_block=per_level - 1,
        attention_levels=tuple(f"{first}.1.proj_in.weight" in shapes for first in firsts),
        attention_head_dim=tuple(width // 64 for width in widths) if linear else 8,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear_projection=linear, sample_size=sample_size,
    )


def vae_config(tensors, image_size):
    """The autoencoder's config. Raises KeyError as unet_config does."""
    shapes = part_of(tensors, VAE)
    levels = range(count(shapes, "encoder.down."))
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels)
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=widths, layers_per_block=count(shapes, "encoder.down.0.block."),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes, sample_size=image_size,
    )


def text_config(tensors):
    """The text encoder's config, without OpenCLIP's last layer. Raises KeyError as above."""
    if openclip(tensors):
        shapes, gelu = part_of(tensors, TEXT + "model."), "gelu"
        tokens, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
        layers = count(shapes, "transformer.resblocks.")
        layers -= layers != 23  # 24; a file converted from a diffusers folder has only 23
        inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    else:
        shapes, gelu = part_of(tensors, clip_prefix(tensors)), "quick_gelu"
        tokens = shapes["embeddings.token_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"]
        layers = count(shapes, "encoder.layers.")
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    if tokens[1] % 64:
        raise ValueError(f"heads are 64 wide in this form, which does not divide {tokens[1]}")
    return TextConfig(*tokens, inner, layers, tokens[1] // 64, positions[0], gelu)


def configs_of(tensors, image_size, where):
    """(UNetConfig, VAEConfig, TextConfig) inferred from the tensors of a single file."""
    try:
        vae = vae_config(tensors, image_size)
        return unet_config(tensors, image_size // vae.downscale), vae, text_config(tensors)
    except KeyError as error:
        raise ValueError(f"{where}: has no tensor that ends in {error}; is it complete?") from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"{where}: is not Stable Diffusion ({error})") from None


def openclip(tensors):
    """Whether the text encoder of a single file is OpenCLIP's (SD 2), not CLIP's (SD 1)."""
    return has(tensors, TEXT + "model.")


def clip_prefix(tensors):
    """The prefix of the names of CLIP's text encoder; some files lack `text_model.`."""
    long = TEXT + "transformer.text_model."
    return long if has(tensors, long) else TEXT + "transformer."
