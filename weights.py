"""A model as a folder: the layout of the diffusers library, written and read without it.

    model_index.json        which class each part is
    unet/                   config.json, diffusion_pytorch_model.safetensors
    vae/                    likewise
    text_encoder/           config.json, model.safetensors
    tokenizer/              vocab.json, merges.txt, tokenizer_config.json
    scheduler/              scheduler_config.json
    sampling.json           ours: frames, steps and guidance that suit the model

Our configs have the field names of diffusers, so a config.json is a dataclass and some constants. A
constant of another value means an architecture that is not built here, and is refused by name.
"""

import dataclasses
from pathlib import Path

import torch

from diffusion import Diffusion
from files import load_safetensors, read_json, save_safetensors, write_json
from model import UNet, UNetConfig
from pipeline import Pipeline, Sampling
from text import CLIPTextModel, CLIPTokenizer, TextConfig
from vae import AutoencoderKL, VAEConfig

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"

# What diffusers lets one choose and this project has one choice for. Other keys of a config.json
# that are neither here nor a field of ours have to be null, false or absent.
UNET_CONSTANTS = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "mid_block_type":
    "UNetMidBlock2DCrossAttn", "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "norm_eps": 1e-5, "transformer_layers_per_block": 1,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "time_embedding_type": "positional",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "dropout": 0.0, "attention_type":
    "default",
}  # fmt: skip
VAE_CONSTANTS = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
VAE_IGNORED = ("force_upcast", "use_quant_conv", "use_post_quant_conv")
TEXT_CONSTANTS = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
COMMENTS = ("_diffusers_version", "_name_or_path")


def _from_config(cls, values, constants, where):
    """An instance of a config dataclass from the values of a config.json (lists become tuples)."""
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    for name, value in values.items():
        known = name in names or name in COMMENTS
        if not known and value not in ([constants[name]] if name in constants else [None, False]):
            raise ValueError(f"{where}: {name}={value!r} is not built here")
    chosen = {name: value for name, value in values.items() if name in names}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    try:
        return cls(**chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def unet_to_json(config):
    """The config.json of a U-Net, as diffusers writes it, and our temporal fields."""
    values = dataclasses.asdict(config)
    levels = values.pop("attention_levels")
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in levels]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(levels)]
    values |= {"down_block_types": down, "up_block_types": up}
    if config.class_embed_type is not None:  # the text's last hidden state
        values["projection_class_embeddings_input_dim"] = config.cross_attention_dim
    return UNET_CONSTANTS | values


def unet_from_json(values, where):
    """A UNetConfig from a U-Net's config.json. Raises ValueError for what we do not build."""
    values = dict(values)
    down, up = values.pop("down_block_types", []), values.pop("up_block_types", [])
    levels = [name == "CrossAttnDownBlock2D" for name in down]
    expected = [
        "CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(levels)
    ]
    if not down or up != expected or set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        raise ValueError(f"{where}: down_block_types={down}, up_block_types={up} is not built here")
    width = values.pop("projection_class_embeddings_input_dim", None)
    if values.get("class_embed_type") and width != values.get("cross_attention_dim"):
        raise ValueError(
            f"{where}: projection_class_embeddings_input_dim={width} is not built here"
        )
    values["attention_levels"] = levels
    return _from_config(UNetConfig, values, UNET_CONSTANTS, where)


def vae_to_json(config):
    """The config.json of an autoencoder, as diffusers writes it."""
    levels = len(config.block_out_channels)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return VAE_CONSTANTS | dataclasses.asdict(config) | blocks


def vae_from_json(values, where):
    """A VAEConfig from an autoencoder's config.json."""
    values = {k: v for k, v in values.items() if k not in VAE_IGNORED}
    down, up = values.pop("down_block_types", []), values.pop("up_block_types", [])
    if set(down) - {"DownEncoderBlock2D"} or set(up) - {"UpDecoderBlock2D"}:
        raise ValueError(f"{where}: down_block_types={down}, up_block_types={up} is not built here")
    return _from_config(VAEConfig, values, VAE_CONSTANTS, where)


def text_to_json(config):
    """The config.json of a text encoder, as transformers writes it."""
    ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    return TEXT_CONSTANTS | dataclasses.asdict(config) | ends


def text_from_json(values, where):
    """A TextConfig from a text encoder's config.json; what shapes no network is ignored."""
    names = {field.name for field in dataclasses.fields(TextConfig)}
    return _from_config(TextConfig, {k: v for k, v in values.items() if k in names}, {}, where)


def diffusion_to_json(diffusion):
    """The scheduler_config.json of a schedule."""
    values = {f.name: getattr(diffusion, f.name) for f in dataclasses.fields(diffusion) if f.init}
    return {"_class_name": "DDIMScheduler", **values, "clip_sample": False}


def diffusion_from_json(values, where):
    """A Diffusion from a scheduler_config.json; samplers' own settings in it are ignored."""
    if values.get("clip_sample") or values.get("thresholding"):
        raise ValueError(f"{where}: clip_sample and thresholding are not built here")
    names = {field.name for field in dataclasses.fields(Diffusion) if field.init}
    return _from_config(Diffusion, {k: v for k, v in values.items() if k in names}, {}, where)


def save_network(folder, config, network, weights):
    """Write a part's config.json (a dict) and its weights."""
    write_json(Path(folder) / "config.json", config)
    save_safetensors(Path(folder) / weights, network.state_dict())


def load_network(folder, parse, build, weights):
    """The network in a folder: built from its config.json, filled with its weights, strictly.

    It is built on the meta device, where a tensor is a shape without memory, and then takes the
    file's tensors as they are: a weight is never in memory twice.
    """
    folder = Path(folder)
    for name in ("config.json", weights):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}; is the folder half written or incomplete?")
    where = folder / "config.json"
    config = parse(read_json(where), where)
    try:
        with torch.device("meta"):
            network = build(config)
    except TypeError as error:  # a number where a list should be, or the other way round
        raise ValueError(f"{where}: describes no network that is built here ({error})") from None
    tensors, expected = load_safetensors(folder / weights), network.state_dict()
    differences = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "of another shape": {
            name for name in expected.keys() & tensors.keys()
            if expected[name].shape != tensors[name].shape
        },
    }  # fmt: skip
    if any(differences.values()):
        report = "; ".join(
            f"{len(names)} {kind}: {', '.join(sorted(names)[:5])}"
            for kind, names in differences.items() if names
        )  # fmt: skip
        raise ValueError(f"{folder / weights}: does not fit its config.json ({report})")
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return network


def save_unet(folder, unet):
    save_network(folder, unet_to_json(unet.config), unet, UNET_WEIGHTS)


def load_unet(folder, temporal=None):
    """The U-Net in a folder, with its own way through time or with the one that is named."""

    def parse(values, where):
        config = unet_from_json(values, where)
        return config if temporal is None else dataclasses.replace(config, temporal=temporal)

    return load_network(folder, parse, UNet, UNET_WEIGHTS)


def save_vae(folder, vae):
    save_network(folder, vae_to_json(vae.config), vae, UNET_WEIGHTS)


def load_vae(folder):
    return load_network(folder, vae_from_json, AutoencoderKL, UNET_WEIGHTS)


def save_text(folder, text_encoder, tokenizer):
    """Write text_encoder/ and tokenizer/ into a folder."""
    config = text_to_json(text_encoder.config)
    save_network(Path(folder) / "text_encoder", config, text_encoder, TEXT_WEIGHTS)
    tokenizer.save(Path(folder) / "tokenizer")


def load_text(folder):
    """(text encoder, tokenizer) of a model's folder."""
    folder = Path(folder)
    encoder = load_network(folder / "text_encoder", text_from_json, CLIPTextModel, TEXT_WEIGHTS)
    return encoder, CLIPTokenizer.load(folder / "tokenizer")


def save_schedule(folder, diffusion, sampling):
    """Write what surrounds the networks: scheduler/, sampling.json and model_index.json."""
    folder = Path(folder)
    write_json(folder / "scheduler" / "scheduler_config.json", diffusion_to_json(diffusion))
    write_json(folder / "sampling.json", dataclasses.asdict(sampling))
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    })  # fmt: skip


def load_schedule(folder):
    """(Diffusion, Sampling) of a model's folder; Sampling's defaults if it keeps none."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    diffusion = diffusion_from_json(read_json(path), path)
    path = Path(folder) / "sampling.json"
    values = read_json(path) if path.exists() else {}
    return diffusion, _from_config(Sampling, values, {}, path)


def save_pipeline(pipeline, folder):
    """Write a whole model as a folder that diffusers opens, too."""
    save_unet(Path(folder) / "unet", pipeline.unet)
    save_vae(Path(folder) / "vae", pipeline.vae)
    save_text(folder, pipeline.text_encoder, pipeline.tokenizer)
    save_schedule(folder, pipeline.diffusion, pipeline.sampling)


def load_pipeline(path, temporal=None):
    """Read a whole model from its folder.

    `temporal` overrides the U-Net's own way through time; the weights are the same for each.

    Raises:
        ValueError: naming the part that is absent, incomplete or of an architecture we do not
        build.
    """
    path = Path(path)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (path / part).is_dir():
            what = "has no" if path.is_dir() else "is no folder with a model: no"
            raise ValueError(f"{path}: {what} {part}/; train one with `python train.py {path}`")
    encoder, tokenizer = load_text(path)
    diffusion, sampling = load_schedule(path)
    unet, vae = load_unet(path / "unet", temporal), load_vae(path / "vae")
    return Pipeline(unet, vae, encoder, tokenizer, diffusion, sampling)
