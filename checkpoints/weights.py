"""Read and write models: a run's folder, a diffusers folder, a single file.

    model_index.json        which class each part is
    unet/                   config.json, diffusion_pytorch_model.safetensors
    vae/                    likewise
    text_encoder/           config.json, model.safetensors
    tokenizer/              vocab.json, merges.txt, tokenizer_config.json
    scheduler/              scheduler_config.json
    sampling.json           ours: frames, steps and guidance that suit the model

Loading is strict: every tensor is used, ignored with a reason in the report, or an error.
Single files of Stable Diffusion 1.x and 2.x are read, never written.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import configs, containers
from checkpoints.errors import naming
from checkpoints.safetensors_file import read_metadata, save_safetensors
from checkpoints.tokenizers import load_tokenizer, save_tokenizer, tokenizer_for
from model import UNet
from pipeline import Pipeline, Sampling
from support.files import read_json, write_json
from text import CLIPTextModel
from vae import AutoencoderKL

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"  # also for the autoencoder
TEXT_WEIGHTS = "model.safetensors"

PARTS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
# For each network: the functions that write and read its config.json, and its weights' file name
FORMS = {
    UNet: (configs.unet_to_json, configs.unet_from_json, UNET_WEIGHTS),
    AutoencoderKL: (configs.vae_to_json, configs.vae_from_json, UNET_WEIGHTS),
    CLIPTextModel: (configs.text_to_json, configs.text_from_json, TEXT_WEIGHTS),
}


class Report(NamedTuple):
    """{(part, our name): the file's} of the tensors used, and {reason: how many} were ignored."""

    used: dict[tuple[str, str], str]
    ignored: dict[str, int]
    notes: tuple[str, ...] = ()


def save_network(folder, network):
    """Write a network's config.json and its weights.

    A class that FORMS lacks, such as a subclass in papers/, is written with its name and its
    config's fields; read it with configs.from_config, build and fill_from.
    """
    to_json, _, weights = FORMS.get(type(network), (None, None, UNET_WEIGHTS))
    plain = {"_class_name": type(network).__name__} | dataclasses.asdict(network.config)
    write_json(Path(folder) / "config.json", to_json(network.config) if to_json else plain)
    save_safetensors(Path(folder) / weights, network.state_dict())


def build(kind, config, where):
    """A network on the meta device, where a tensor is a shape without memory."""
    with naming(where), torch.device("meta"):
        return kind(config)


def fill(network, tensors, dtype, where):
    """Give a network on the meta device its tensors, emptying the dict; returns the network."""
    state = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # cast one by one, so that a model is never in memory twice
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        # The sums of CPU kernels depend on where a tensor begins. PyTorch's own begin at multiples
        # of 64 bytes, and loading must not change a bit of a model's output.
        state[name] = tensor.clone() if tensor.data_ptr() % 64 else tensor
    with naming(where, "does not fit the network"):
        network.load_state_dict(state, assign=True)
    return network


def fill_from(folder, network, dtype=torch.float32):
    """(a network on the meta device with the weights in a folder, how many were ignored)."""
    path = containers.find_weights(folder)
    tensors, ignored = containers.current_names(containers.read_checkpoint(path))
    return fill(network, tensors, dtype, path), ignored


def load_network(folder, kind, temporal=None, dtype=torch.float32):
    """(the network of that class in a folder, how many tensors were ignored).

    temporal: replaces a U-Net's temporal variant by one with the same parameters.
    """
    where = Path(folder) / "config.json"
    if not where.is_file():
        raise ValueError(f"{folder}: has no config.json; name a model's file, a folder in "
                         "diffusers' layout, or a run whose image stage is finished")
    _, from_json, _ = FORMS[kind]
    with naming(where):
        config = from_json(read_json(where), where)
        if temporal is not None:
            config = dataclasses.replace(config, temporal=temporal)
    return fill_from(folder, build(kind, config, where), dtype)


def load_unet(folder, temporal=None):
    """The U-Net in a folder, float32 on the CPU, with its own or another temporal variant."""
    return load_network(folder, UNet, temporal)[0]


def load_vae(folder):
    """The autoencoder in a folder, float32 on the CPU."""
    return load_network(folder, AutoencoderKL)[0]


def save_text(folder, text_encoder, tokenizer):
    """Write text_encoder/ and, if there is one, tokenizer/ into a folder."""
    save_network(Path(folder) / "text_encoder", text_encoder)
    if tokenizer is not None:
        save_tokenizer(Path(folder) / "tokenizer", tokenizer)


def save_schedule(folder, diffusion, sampling, has_tokenizer=True):
    """Write what surrounds the networks: scheduler/, sampling.json and model_index.json."""
    folder = Path(folder)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.diffusion_to_json(diffusion))
    write_json(folder / "sampling.json", dataclasses.asdict(sampling))
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"] if has_tokenizer else [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False,
    })


def save_pipeline(pipeline, folder):
    """Write a whole model as a folder that diffusers can also open."""
    save_network(Path(folder) / "unet", pipeline.unet)
    save_network(Path(folder) / "vae", pipeline.vae)
    save_text(folder, pipeline.text_encoder, pipeline.tokenizer)
    save_schedule(folder, pipeline.diffusion, pipeline.sampling, pipeline.tokenizer is not None)


def load_pipeline(path, temporal=None, merges=None, prediction_type=None, ema=False,
                  dtype=torch.float32, zero_terminal_snr=None):
    """Read a whole model: a run's folder, a diffusers folder or a single file.

    temporal: overrides the U-Net's temporal variant; a model that names none gets the shift.
    merges: a merges file (plain or .gz) or a tokenizer folder, for a model without a tokenizer.
    prediction_type, zero_terminal_snr: override what the model says or what is assumed.
    ema: use the averaged U-Net weights, which some single files also hold.
    dtype: of the networks; None leaves each tensor as the file has it.
    """
    path, given = Path(path), {"prediction_type": prediction_type} if prediction_type else {}
    given |= {True: configs.ZERO_TERMINAL_SNR, False: {"rescale_betas_zero_snr": False}}.get(
        zero_terminal_snr, {})
    if not path.is_dir():
        pipeline = _load_file(path, temporal, given, ema, dtype)
    elif ema:
        raise ValueError(f"{path}: only single files hold EMA weights beside the others")
    else:
        pipeline = load_folder(path, temporal, given, dtype)
    if merges is not None:
        pipeline.tokenizer = tokenizer_for(merges, pipeline.text_encoder.config)
    check_together(pipeline, path)
    return pipeline


def check_together(pipeline, where):
    """Raise ValueError if the parts of a model do not fit together."""
    unet, vae, text = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    tokenizer, positions = pipeline.tokenizer, text.max_position_embeddings
    if unet.in_channels != vae.latent_channels:
        raise ValueError(f"{where}: the U-Net needs {unet.in_channels} channels, the autoencoder "
                         f"gives {vae.latent_channels}; models for inpainting (9 channels), "
                         "InstructPix2Pix (8), upscaling (7) and depth (5) are not supported")
    if tokenizer and not (tokenizer.vocab_size == text.vocab_size
                          and 2 < tokenizer.max_length <= positions):
        raise ValueError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens and texts of "
                         f"{tokenizer.max_length}, the text encoder {text.vocab_size} tokens and "
                         f"texts of at most {positions}")


def load_folder(path, temporal=None, given=None, dtype=torch.float32, unet=None, vae=None):
    """load_pipeline for a folder, unchecked; `unet`, `vae` and `given`, fields of the schedule,
    replace the folder's own."""
    path, parts, ignored = Path(path), {"unet": unet, "vae": vae}, 0
    if (where := path / "model_index.json").exists():
        index = read_json(where)
        others = {"text_encoder_2", "image_normalizer", "motion_adapter", "controlnet"}
        if others & index.keys() or not PARTS.keys() <= index.keys():
            raise ValueError(f"{path}: needs Stable Diffusion 1 or 2, got {index['_class_name']}")
    for name, kind in PARTS.items():
        if parts.get(name) is None:
            variant = temporal if name == "unet" else None
            parts[name], count = load_network(path / name, kind, variant, dtype)
            ignored += count
    where = path / "scheduler" / "scheduler_config.json"
    diffusion = configs.diffusion_from_json(read_json(where) | (given or {}), where)
    tokenizer = load_tokenizer(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    where = path / "sampling.json"
    if where.exists():
        sampling = configs.from_config(Sampling, read_json(where), {}, where)
    else:  # not ours: draw images of the size that the model was trained on
        size = parts["unet"].config.sample_size * parts["vae"].config.downscale
        sampling = Sampling(num_frames=1, image_size=size)
    used = {(part, name): f"{part}/{name}" for part, network in parts.items()
            for name in network.state_dict()}
    return Pipeline(**parts, tokenizer=tokenizer, diffusion=diffusion, sampling=sampling,
                    report=Report(used, {"position ids": ignored} if ignored else {}))


def _load_file(path, temporal, given, ema, dtype):
    from checkpoints import names  # imported here, because a training does not need it

    tensors = containers.read_checkpoint(path)
    names.check_known(tensors, path)
    with naming(path):
        diffusion, image_size, notes = configs.diffusion_from_file(
            tensors, read_metadata(path), names.is_openclip(tensors), given)
    with naming(path, "is not Stable Diffusion, or not complete"):
        found = names.configs_of(tensors, image_size)
        if temporal is not None:
            found["unet"] = dataclasses.replace(found["unet"], temporal=temporal)
        parts = {name: build(PARTS[name], config, path) for name, config in found.items()}
        state, used, ignored = names.convert(tensors, parts, ema, path)
    tensors.clear()
    parts = {name: fill(network, state[name], dtype, path) for name, network in parts.items()}
    return Pipeline(**parts, tokenizer=None, diffusion=diffusion,
                    sampling=Sampling(num_frames=1, image_size=image_size),
                    report=Report(used, ignored, notes))


def add_checkpoint_flags(parser):
    """Flags for what a checkpoint may not say, named as load_pipeline's arguments."""
    parser.add_argument("--merges", type=Path,
                        help="a merges file (plain or .gz) or a tokenizer folder")
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"),
                        help="what the U-Net predicts, if the file does not say")
    parser.add_argument("--zero-terminal-snr", action="store_const",
                        const=True, help="the last timestep was pure noise in training")
    parser.add_argument("--ema", action="store_true", help="use the average of the U-Net's weights")
