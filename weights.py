"""A model from disk and onto it: a run's folder, a diffusers folder, a single file.

    model_index.json        which class each part is
    unet/                   config.json, diffusion_pytorch_model.safetensors
    vae/                    likewise
    text_encoder/           config.json, model.safetensors
    tokenizer/              vocab.json, merges.txt, tokenizer_config.json
    scheduler/              scheduler_config.json
    sampling.json           ours: frames, steps and guidance that suit the model

Single files of Stable Diffusion 1.x and 2.x are read (checkpoints/), never written. Nothing is
loaded in part: a tensor is used, or ignored for a reason that the report gives, or an error.

Files stay mapped. But a folder's tensors that do not begin at a multiple of 64 bytes are copied,
because the kernels' sums depend on where a tensor begins: so a run gives the same bits before it is
saved and after it is loaded. Single files are too large for that; their last digits may differ.

    python weights.py v1-5-pruned.safetensors                     # what is it?
    python weights.py v2-1_768-ema-pruned.ckpt --merges bpe.txt.gz --convert models/sd21
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from checkpoints import configs, names
from checkpoints.containers import find_weights, read_checkpoint
from checkpoints.tokenizers import load_tokenizer, save_tokenizer, tokenizer_from_merges
from cli import run_main
from diffusion import Diffusion
from files import read_json, save_safetensors, write_json
from model import UNet
from pipeline import Pipeline, Sampling
from text import CLIPTextModel
from tokenizer import CLIPTokenizer
from vae import AutoencoderKL

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
ASSUMED = ("prediction type: v_prediction, which no file of Stable Diffusion 2 says; 2-base needs "
           "prediction_type='epsilon' (--prediction-type epsilon)")

# Of each network: how its config.json is written and read, and the name of its weights' file.
FORMS = {
    UNet: (configs.unet_to_json, configs.unet_from_json, UNET_WEIGHTS),
    AutoencoderKL: (configs.vae_to_json, configs.vae_from_json, UNET_WEIGHTS),
    CLIPTextModel: (configs.text_to_json, configs.text_from_json, TEXT_WEIGHTS),
}


def save_network(folder, network):
    """Write a network's config.json and its weights."""
    to_json, _, weights = FORMS[type(network)]
    write_json(Path(folder) / "config.json", to_json(network.config))
    save_safetensors(Path(folder) / weights, network.state_dict())


def fill(network, tensors, dtype, align, where):
    """Give a network on the meta device its tensors, emptying the dict.

    Tensors of another dtype are cast one by one, so that a model is never in memory twice. `align`
    copies those that do not begin at a multiple of 64 bytes.
    """
    state = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} needs floats, got {tensor.dtype}")
        tensor = tensor.to(dtype)
        state[name] = tensor.clone() if align and tensor.data_ptr() % 64 else tensor
    network.load_state_dict(state, assign=True)
    return network


def build(kind, config, where):
    """A network on the meta device, where a tensor is a shape without memory."""
    layers = getattr(config, "layers_per_block", 0) or config.num_hidden_layers
    levels = len(getattr(config, "block_out_channels", ()))
    if layers > 100 or levels > 10:  # damage, which would take minutes to build
        raise ValueError(f"{where}: needs at most 100 layers and 10 levels, got {layers} and "
                         f"{levels}")
    try:
        with torch.device("meta"):
            return kind(config)
    except (TypeError, RuntimeError) as error:  # the latter for tensors of more than 2**63 bytes
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: describes no network that is built here ({reason})") from None


def load_config(folder, kind):
    """The configuration of the network of that class in a folder."""
    where = Path(folder) / "config.json"
    if not where.is_file():
        raise ValueError(f"{folder}: has no config.json; is the folder half written or incomplete?")
    _, from_json, _ = FORMS[kind]
    return from_json(read_json(where), where)


def load_network(folder, kind, temporal=None, dtype=torch.float32):
    """(the network of that class in a folder, how many tensors were ignored).

    temporal: the temporal variant of a U-Net, in place of the one that its config.json names.
    """
    config = load_config(folder, kind)
    if temporal is not None:
        config = dataclasses.replace(config, temporal=temporal)
    return fill_from(folder, build(kind, config, Path(folder) / "config.json"), dtype)


def fill_from(folder, network, dtype=torch.float32):
    """(a network on the meta device with the weights in a folder, how many were ignored)."""
    path = find_weights(folder)
    tensors, ignored = names.current_names(read_checkpoint(path))
    expected, found = ({name: tensor.shape for name, tensor in each.items()}
                       for each in (network.state_dict(), tensors))
    names.check_fit(expected, found, found.keys() - expected.keys(),
                    f"{path}: does not fit its config.json")
    return fill(network, tensors, dtype, True, path), ignored


def load_unet(folder, temporal=None):
    """The U-Net in a folder, float32 on the CPU, with its own or another temporal variant."""
    return load_network(folder, UNet, temporal)[0]


def load_vae(folder):
    """The autoencoder in a folder, float32 on the CPU."""
    return load_network(folder, AutoencoderKL)[0]


def use_decoder(pipeline, path, decoder=None):
    """Let a loaded model decode with the autoencoder in another folder, `decoder`.

    By default it is the video_decoder/ that a run's folder may hold (papers/video_decoder.py).
    Returns lines that say what is used, none if it is the model's own. Raises ValueError if the
    other autoencoder has latents of another form.
    """
    folder = Path(decoder or Path(path) / "video_decoder")
    if decoder is None and not (folder / UNET_WEIGHTS).exists():
        return ()
    own, new = pipeline.vae.config, load_vae(folder)
    for name in ("latent_channels", "downscale", "scaling_factor"):
        if getattr(new.config, name) != getattr(own, name):
            raise ValueError(f"{folder}: has {name}={getattr(new.config, name)}, the model has "
                             f"{getattr(own, name)}; --decoder needs one for the model's latents")
    pipeline.vae = new
    return f"decoder: {folder}, temporal layers: {new.config.temporal}",


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
    """Write a whole model as a folder that diffusers opens, too."""
    save_network(Path(folder) / "unet", pipeline.unet)
    save_network(Path(folder) / "vae", pipeline.vae)
    save_text(folder, pipeline.text_encoder, pipeline.tokenizer)
    has_tokenizer = pipeline.tokenizer is not None
    save_schedule(folder, pipeline.diffusion, pipeline.sampling, has_tokenizer)


def load_pipeline(path, temporal=None, merges=None, prediction_type=None, ema=False,
                  dtype=torch.float32):
    """Read a whole model: a run's folder, a diffusers folder or a single file.

    temporal: overrides the U-Net's temporal variant; a model that names none gets the shift.
    merges: a merges file (plain or .gz) or a tokenizer folder, for a model without a tokenizer.
    prediction_type: overrides what the model says, or what is assumed for a single file.
    ema: take the average of the U-Net's weights that a single file holds beside them.
    dtype: of the networks; None leaves each tensor as the file has it.

    Its `report` says what was used and what was ignored. `tokenizer` is None if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        pipeline = _load_file(path, temporal, prediction_type, ema, dtype)
    elif ema:
        raise ValueError(f"{path}: a folder holds one set of weights; only single files have EMA "
                         "weights beside them")
    else:
        pipeline = load_folder(path, temporal, prediction_type, dtype)
    if merges is not None:
        pipeline.tokenizer = tokenizer_for(merges, pipeline.text_encoder.config)
        check_tokenizer(pipeline.tokenizer, pipeline.text_encoder.config, merges)
    return pipeline


def check_tokenizer(tokenizer, config, where):
    """Raise ValueError if a text encoder has fewer positions, or not as many tokens."""
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the text "
                         f"encoder {config.vocab_size}")
    if tokenizer.max_length > config.max_position_embeddings:
        raise ValueError(f"{where}: model_max_length needs to be <= "
                         f"{config.max_position_embeddings}, the text encoder's positions, got "
                         f"{tokenizer.max_length}; is tokenizer_config.json complete?")


def tokenizer_for(path, config):
    """The tokenizer for a text encoder, from a merges file or a tokenizer folder.

    Whatever the folder says, CLIP (Stable Diffusion 1) is padded with the end token and OpenCLIP
    (2), which its GELU gives away, with 0.
    """
    length, pad_with_end = config.max_position_embeddings, config.hidden_act != "gelu"
    if Path(path).is_dir():
        return CLIPTokenizer(load_tokenizer(path).ranks, length, pad_with_end)
    return tokenizer_from_merges(path, config.vocab_size - 2 * 256 - 2, length, pad_with_end)


def load_folder(path, temporal=None, prediction_type=None, dtype=torch.float32, unet="unet",
                vae=None):
    """load_pipeline for a folder, with the U-Net in the part that `unet` names.

    vae: an autoencoder to use in place of the folder's, which is then not read.
    """
    for part in (unet, "vae", "text_encoder", "scheduler"):
        if not (path / part).is_dir():
            raise ValueError(f"{path}: has no {part}/; needs a run with a finished image stage or "
                             "a diffusers folder")
    where = path / "scheduler" / "scheduler_config.json"
    diffusion = configs.diffusion_from_json(read_json(where), where)
    if prediction_type is not None:
        diffusion = dataclasses.replace(diffusion, prediction_type=prediction_type)
    unet, ignored = load_network(path / unet, UNet, temporal, dtype)
    vae, more = (vae, 0) if vae else load_network(path / "vae", AutoencoderKL, None, dtype)
    text, most = load_network(path / "text_encoder", CLIPTextModel, None, dtype)
    names.check_together(unet.config, vae.config, text.config, path)
    has_tokenizer = (path / "tokenizer").is_dir()
    tokenizer = load_tokenizer(path / "tokenizer") if has_tokenizer else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, text.config, path / "tokenizer")
    where = path / "sampling.json"
    if where.exists():
        sampling = configs.from_config(Sampling, read_json(where), {}, where)
    else:  # not ours: it draws images of the size that it was trained on
        size = unet.config.sample_size * vae.config.downscale
        sampling = Sampling(num_frames=1, image_size=size)
    used = sum(len(network.state_dict()) for network in (unet, vae, text))
    ignored += more + most
    report = names.Report(used, {"numbers of positions": ignored} if ignored else {})
    return Pipeline(unet, vae, text, tokenizer, diffusion, sampling, report)


def _load_file(path, temporal, prediction_type, ema, dtype):
    tensors = read_checkpoint(path)
    names.check_known(tensors, path)
    stability = configs.openclip(tensors)
    assumed = "v_prediction" if stability else "epsilon"
    notes = (ASSUMED,) if stability and prediction_type is None else ()
    diffusion = Diffusion(prediction_type=prediction_type or assumed)
    image_size = 768 if diffusion.prediction_type == "v_prediction" else 512
    unet, vae, text = configs.configs_of(tensors, image_size, path)
    names.check_together(unet, vae, text, path)
    if temporal is not None:
        unet = dataclasses.replace(unet, temporal=temporal)
    networks = {"unet": build(UNet, unet, path), "vae": build(AutoencoderKL, vae, path),
                "text_encoder": build(CLIPTextModel, text, path)}
    parts, report = names.convert(tensors, networks, ema, path)
    tensors.clear()
    for name, network in networks.items():
        fill(network, parts[name], dtype, False, path)
    return Pipeline(**networks, tokenizer=None, diffusion=diffusion,
                    sampling=Sampling(num_frames=1, image_size=image_size),
                    report=dataclasses.replace(report, notes=notes))


def describe(pipeline):
    """What a model is, in lines to read."""
    unet, tokenizer = pipeline.unet.config, pipeline.tokenizer
    ours = unet.class_embed_type or unet.resnet_time_scale_shift != "default"
    form = "2.x" if unet.use_linear_projection else "1.x"
    lines = [
        "this project's own" if ours else f"Stable Diffusion {form}",
        f"predicts {pipeline.diffusion.prediction_type}",
        f"{tokenizer.vocab_size} tokens" if tokenizer else "no tokenizer: --merges PATH names one",
    ]
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        parameters = list(network.parameters())
        millions = sum(p.numel() for p in parameters) / 1e6
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        lines.append(f"{millions:.1f} M parameters, {' and '.join(dtypes)}: {network.config}")
    return "\n".join(lines)


def add_checkpoint_flags(parser):
    """The flags for what a checkpoint may not say, as load_pipeline's arguments are called."""
    parser.add_argument("--merges", type=Path,
                        help="a merges file (plain or .gz) or a tokenizer folder")
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"),
                        help="what the U-Net predicts, where the file does not say")
    parser.add_argument("--ema", action="store_true", help="the average of the U-Net's weights")


def main():
    parser = argparse.ArgumentParser(
        description="Say what a checkpoint is, and convert it.", allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a single file, or a folder")
    add_checkpoint_flags(parser)
    parser.add_argument("--convert", type=Path, metavar="FOLDER",
                        help="write it in the layout of diffusers")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                        help="of the weights (default: as they are)")
    args = parser.parse_args()
    if args.convert and args.convert.exists() and (
        not args.convert.is_dir() or any(args.convert.iterdir())
    ):
        raise ValueError(f"--convert {args.convert}: exists already; name a new folder")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = load_pipeline(args.path, None, args.merges, args.prediction_type, args.ema, dtype)
    print(f"{describe(pipeline)}\n{pipeline.report}")
    if args.convert:
        save_pipeline(pipeline, args.convert)
        print(f"written: {args.convert}")


if __name__ == "__main__":
    run_main(main)
