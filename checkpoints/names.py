"""Parameter names: from single files of Stable Diffusion 1.x (CompVis) and 2.x (Stability) to ours.

    model.diffusion_model.    the U-Net               model_ema.   its moving average, names dotless
    first_stage_model.        the autoencoder
    cond_stage_model.         the text encoder, CLIP (1.x: transformer.) or OpenCLIP (2.x: model.)

Such a file does not say what it is. configs.py infers the config of each network from its tensors;
then each of our parameters is looked up under its name in the file.

Sources: the code of CompVis/stable-diffusion, Stability-AI/stablediffusion, open_clip.
"""

import re
from collections import Counter
from dataclasses import dataclass

from checkpoints.configs import TEXT, UNET, VAE, clip_prefix, has, openclip

PARTS = {UNET: "U-Net", VAE: "autoencoder", TEXT: "text encoder"}

FOREIGN = {  # files that a single name identifies
    r"lora[_.]|hada_w|lokr_w": "a LoRA, an addition to a model; merge it into a model first",
    r"^string_to_|^emb_params$|^<.+>$": "a textual inversion, the embedding of one token",
    r"^control_model\.|controlnet_cond_embedding|input_hint_block": "a ControlNet",
    r"conditioner\.embedders\.|add_embedding\.": "Stable Diffusion XL",
    r"(^|\.)joint_blocks\.": "Stable Diffusion 3",
    r"(^|\.)double_blocks\.": "Flux",
    r"motion_modules\.": "AnimateDiff",
}
CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix", 5: "a depth model", 7: "an upscaler"}
ALONE = {  # single parts of a model, in either naming
    r"^(down_blocks|input_blocks)\.": "a U-Net alone",
    r"^(encoder|decoder)\.(down|up|down_blocks|up_blocks)\.": "an autoencoder alone",
    r"^(text_model\.|embeddings\.token_|token_embedding\.)": "a text encoder alone",
}
EMA = r"^model_ema\."
UNUSED = {  # tensors that sampling does not need, and why
    EMA: "EMA weights (ema=True or --ema uses them)",
    r"^(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+|"
    r"lvlb_weights|logvar)$": "the noise schedule, which is computed",
    r"position_ids$": "numbers of positions",
    r"^cond_stage_model\.(.*\.)?(logit_scale|text_projection(\.weight)?|attn_mask)$":
        "parts of CLIP that Stable Diffusion does not use",
    r"^(first_stage_model\.)?loss\.": "the autoencoder's training loss",
    r"^safety_checker\.": "the safety checker",
    r"^embedding_manager\.": "the training of a textual inversion",
}

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}
VAE_WORDS = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}
OPENCLIP_WORDS = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Report:
    """How many of a checkpoint's tensors were used, and {reason: how many} were ignored."""

    used: int
    ignored: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self):
        ignored = [f"{count} ignored: {reason}" for reason, count in self.ignored.items()]
        return "\n".join([f"{self.used} tensors used", *ignored, *self.notes])


def check_known(tensors, where):
    """Raise ValueError for a file that is not a whole Stable Diffusion 1.x or 2.x, naming its kind.

    check_together checks the U-Net's input channels, once its config is known.
    """
    missing = {prefix: part for prefix, part in PARTS.items() if not has(tensors, prefix)}
    kinds = FOREIGN if len(missing) < len(PARTS) else FOREIGN | ALONE
    for pattern, kind in kinds.items():
        if any(re.search(pattern, name) for name in tensors):
            raise ValueError(f"{where}: needs a whole Stable Diffusion 1.x or 2.x, got {kind}")
    if missing:
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise ValueError(f"{where}: has no {' and no '.join(missing.values())} "
                         f"({', '.join(missing)}*), got {some}; is it complete?")


def check_together(unet, vae, text, where):
    """Raise ValueError if three networks, given by their configs, do not fit together."""
    # A U-Net for known frames (papers/) has more channels, and is told numbers.
    if unet.in_channels != vae.latent_channels and not unet.num_conditions:
        kind = CHANNELS.get(unet.in_channels, "another model")
        raise ValueError(f"{where}: holds {kind}: its U-Net needs {unet.in_channels} channels, its "
                         f"autoencoder has {vae.latent_channels}")
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(f"{where}: its U-Net needs texts of width {unet.cross_attention_dim}, its "
                         f"text encoder has width {text.hidden_size}")


def replace_words(name, words):
    """The name with each key of `words` replaced where it is bounded by dots."""
    for ours, theirs in words.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.|$)", theirs, name)
    return name


def unet_name(name, config):
    """The single file's name of a parameter of our U-Net, without its prefix."""
    kind, *words = name.split(".")
    if kind == "mid_block":
        layer, i, *rest = words
        block = f"middle_block.{2 * int(i) if layer == 'resnets' else 1}"
    elif kind in ("down_blocks", "up_blocks"):
        level, layer, i, *rest = words
        per_level = config.layers_per_block + 1
        number = int(level) * per_level + int(i)  # counted across levels
        if layer == "downsamplers":
            return f"input_blocks.{number + per_level}.0.op.{rest[1]}"
        if layer == "upsamplers":  # in the level's last block, after the transformer if it has one
            index = 2 if config.attention_levels[::-1][int(level)] else 1
            return f"output_blocks.{number + per_level - 1}.{index}.conv.{rest[1]}"
        block = f"input_blocks.{number + 1}" if kind == "down_blocks" else f"output_blocks.{number}"
        block += ".0" if layer == "resnets" else ".1"
    else:
        return replace_words(name, UNET_ENDS)
    return f"{block}.{replace_words('.'.join(rest), RESNET if layer == 'resnets' else {})}"


def vae_name(name, config):
    """The single file's name of a parameter of our autoencoder, without its prefix."""
    name = re.sub(r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}", name)
    name = name.replace(".mid_block.attentions.0", ".mid.attn_1")
    last = len(config.block_out_channels) - 1  # the file counts decoder levels from the finest
    name = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up.{last - int(m[1])}", name)
    name = name.replace(".down_blocks.", ".down.").replace(".resnets.", ".block.")
    return replace_words(name, VAE_WORDS)


def openclip_name(name):
    """The single file's name of a text encoder parameter; q, k and v share a tensor there."""
    name = replace_words(name.removeprefix("text_model."), OPENCLIP_WORDS)
    return re.sub(r"[qkv]_proj\.(weight|bias)$", r"in_proj_\1", name)


def names_in_file(part, network, tensors, ema):
    """{our name: the file's name} of a part's parameters."""
    ours = network.state_dict()
    if part == "unet":
        theirs = [UNET + unet_name(name, network.config) for name in ours]
        if ema:  # model.diffusion_model.out.2.bias: model_ema.diffusion_modelout2bias
            theirs = [f"model_ema.{name[len('model.'):].replace('.', '')}" for name in theirs]
    elif part == "vae":
        theirs = [VAE + vae_name(name, network.config) for name in ours]
    elif openclip(tensors):
        theirs = [f"{TEXT}model.{openclip_name(name)}" for name in ours]
    else:
        theirs = [clip_prefix(tensors) + name.removeprefix("text_model.") for name in ours]
    return dict(zip(ours, theirs, strict=True))


def view_of(tensor, ours, theirs, ndim):
    """A file's tensor as our parameter: a third of q, k, v, and 1x1 convolutions as matrices."""
    if ".in_proj_" in theirs and tensor.ndim and len(tensor) % 3 == 0:
        tensor = tensor.chunk(3)["qkv".index(ours.rpartition("_proj.")[0][-1])]
    return tensor.flatten(1) if (tensor.ndim, tensor.shape[2:], ndim) == (4, (1, 1), 2) else tensor


def sort_out(names, num_layers, ema):
    """({reason: how many are ignored for it}, the others) of the names that are not used."""
    unused = UNUSED | {rf"^cond_stage_model\.model\.transformer\.resblocks\.{num_layers}\.":
                       "the text encoder's last layer, which Stable Diffusion 2 skips"}
    if ema:
        del unused[EMA]
        unused[r"^model_ema\.(decay|num_updates)$"] = "counters of the average"
        unused[r"^model\.diffusion_model\."] = "the U-Net's weights beside their average"
    reasons = {name: reason for name in names
               for pattern, reason in unused.items() if re.search(pattern, name)}
    return dict(Counter(reasons.values())), sorted(names - reasons.keys())


def check_fit(expected, found, unexpected, what):
    """Raise ValueError, naming five tensors of each kind, if any is missing, wrong or too many.

    expected and found are {name: shape}; `unexpected` lists names; `what` begins the message.
    """
    wrong = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    kinds = {"missing": expected.keys() - found.keys(), "unexpected": unexpected,
             "of another shape": wrong}
    if lists := [f"{len(names)} {kind}: {', '.join(sorted(names)[:5])}"
                 for kind, names in kinds.items() if names]:
        raise ValueError(f"{what} ({'; '.join(lists)})")


def convert(tensors, networks, ema, where):
    """({part: {our name: tensor}}, Report) of a single file; the tensors are views of the file's.

    networks is {part: our network}. Raises ValueError if a parameter of theirs is missing in the
    file or the file has tensors that are neither used nor known.
    """
    if ema and not has(tensors, "model_ema.diffusion_model"):
        raise ValueError(f"{where}: holds no EMA weights (model_ema.*); load it without --ema")
    parts, expected, found = {part: {} for part in networks}, {}, {}
    for part, network in networks.items():
        state = network.state_dict()
        for name, theirs in names_in_file(part, network, tensors, ema).items():
            expected[theirs] = tuple(state[name].shape)
            if theirs in tensors:
                tensor = view_of(tensors[theirs], name, theirs, state[name].ndim)
                parts[part][name], found[theirs] = tensor, tuple(tensor.shape)
    last = networks["text_encoder"].config.num_hidden_layers
    ignored, unexpected = sort_out(tensors.keys() - expected.keys(), last, ema)
    check_fit(expected, found, unexpected, f"{where}: is not a whole Stable Diffusion")
    return parts, Report(len(found), ignored)


def current_names(tensors):
    """({our name: tensor}, how many are ignored) of a part of a diffusers folder, old or new."""
    bare = "embeddings.token_embedding.weight" in tensors  # transformers 5 writes no "text_model."
    old = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")  # of old autoencoders
    current = {}
    for name, tensor in tensors.items():
        if old.search(name):
            name = old.sub(lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.", name)
            tensor = view_of(tensor, name, name, 2)
        if not name.endswith("position_ids"):
            current["text_model." + name if bare else name] = tensor
    return current, len(tensors) - len(current)
