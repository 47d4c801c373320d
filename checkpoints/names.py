"""Single files of Stable Diffusion 1.x (CompVis) and 2.x (Stability): their names and sizes.

    model.diffusion_model.    the U-Net               model_ema.  its average (names lack dots)
    first_stage_model.        the autoencoder
    cond_stage_model.         the text encoder, CLIP (1.x: transformer.) or OpenCLIP (2.x: model.)

Such a file holds tensors only. The networks' configs follow from shapes, and from constants of
each version (32 groups, heads, the text encoder's activation, the scaling factor 0.18215).
Sources: the code of CompVis/stable-diffusion, Stability-AI/stablediffusion, open_clip.
"""

import re
from collections import Counter

from model import UNetConfig
from text import TextConfig
from vae import VAEConfig

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PARTS = {UNET: "U-Net", VAE: "autoencoder", TEXT: "text encoder"}

OTHER_FILES = {  # patterns of tensor names that only other files have: what these files are
    r"^ip_adapter|^image_proj": "an IP-Adapter, an addition to a model",
    r"lora[_.]|lycoris_|hada_w|lokr_w|oft_": "a LoRA, LyCORIS or OFT; merge it into a model first",
    r"^(320|640|768|1024|1280)$": "a hypernetwork, an addition to a model",
    r"^string_to_|^(emb_.+|<.+>|\*|clip_.)$": "a textual inversion, the embedding of one token",
    r"time_stack\.|time_mixer\.": "Stable Video Diffusion",
    r"^noise_augmentor\.|^embedder\.": "Stable unCLIP",
    r"^scaled_fp8$|\.scale_weight$": "fp8 weights with scales; use the fp16 file",
    r"^control_model\.|controlnet_cond_embedding|input_hint_block": "a ControlNet",
    r"conditioner\.embedders\.|add_embedding\.": "Stable Diffusion XL",
    r"(^|\.)joint_blocks\.": "Stable Diffusion 3",
    r"(^|\.)double_blocks\.": "Flux",
    r"motion_modules\.": "AnimateDiff",
    r"^((encoder|decoder)\.)?(down|up|(down|up|input)_blocks)\.": "a U-Net or an autoencoder alone",
    r"^(text_model\.|embeddings\.token_|token_embedding\.)": "a text encoder alone",
}
UNUSED = {  # patterns of tensor names that sampling does not need: what they are
    r"^model_ema\.": "EMA weights and their counters (ema=True or --ema uses them)",
    r"^(betas|\w*alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar)$": "the noise schedule",
    r"position_ids$": "position ids",
    r"^(v_pred|ztsnr)$": "signs of the noise schedule",
    r"^cond_stage_model\.(.*\.)?(logit_scale|text_projection(\.weight)?|attn_mask)$":
        "parts of CLIP that Stable Diffusion does not use",
    r"^(first_stage_model\.)?loss\.": "the autoencoder's training loss",
    r"^safety_checker\.": "the safety checker",
}

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
VAE_WORDS = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
OPENCLIP_WORDS = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def has(names, prefix):
    return any(name.startswith(prefix) for name in names)


def is_openclip(names):
    """Whether the text encoder of a single file is OpenCLIP (SD 2), not CLIP (SD 1)."""
    return has(names, TEXT + "model.")


def check_known(names, where):
    """Raise ValueError for a file that is not a whole model, and name its kind if that is known."""
    known = [kind for pattern, kind in OTHER_FILES.items()
             if any(re.search(pattern, name) for name in names)]
    if missing := [f"no {part}" for prefix, part in PARTS.items() if not has(names, prefix)]:
        known.append(f"{' and '.join(missing)}, only {', '.join(sorted(names)[:3]) or 'nothing'}")
    if known:
        raise ValueError(f"{where}: needs a whole model of Stable Diffusion 1 or 2, got {known[0]}")


def count(names, prefix):
    """How many consecutive numbers, starting at 0, follow the prefix in the names."""
    number = 0
    while has(names, f"{prefix}{number}."):
        number += 1
    return number


def part_of(tensors, prefix):
    """{name: shape} of the tensors whose names begin with a prefix, which is removed."""
    return {name.removeprefix(prefix): tuple(tensor.shape)
            for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_config(tensors, sample_size):
    """The U-Net's config. Files of another architecture raise KeyError and other errors here."""
    shapes = part_of(tensors, UNET)
    blocks = count(shapes, "input_blocks.")
    steps = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes]
    per_level = steps[0] if steps else blocks  # the ResnetBlocks and a downsampler
    firsts = [f"input_blocks.{1 + i * per_level}" for i in range(len(steps) + 1)]
    widths = tuple(shapes[f"{first}.0.in_layers.2.weight"][0] for first in firsts)
    # SD 1 has 8 heads at every level. SD 2, which has linear projections, has heads of width 64.
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1], out_channels=shapes["out.2.weight"][0],
        block_out_channels=widths, layers_per_block=per_level - 1,
        attention_levels=tuple(f"{first}.1.proj_in.weight" in shapes for first in firsts),
        attention_head_dim=tuple(width // 64 for width in widths) if linear else 8,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear_projection=linear, sample_size=sample_size,
    )


def vae_config(tensors, image_size):
    """The autoencoder's config."""
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
    """The text encoder's config, without OpenCLIP's last layer."""
    tokens, positions, inner = (tensors[text_name(name, tensors)].shape for name in (
        "embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight"))
    layers, act = count(tensors, text_name("encoder.layers.", tensors)), "quick_gelu"
    if is_openclip(tensors):  # 24 layers; a file converted from a diffusers folder has only 23
        layers, act = layers - (layers != 23), "gelu"
    return TextConfig(*tokens, inner[0], layers, tokens[1] // 64, positions[0], act)


def configs_of(tensors, image_size):
    """{part: config} inferred from the tensors of a single file."""
    vae = vae_config(tensors, image_size)
    return {"unet": unet_config(tensors, image_size // vae.downscale), "vae": vae,
            "text_encoder": text_config(tensors)}


def replace_words(name, words):
    """The name with each key of `words` replaced where dots or the name's ends enclose it."""
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
        number = int(level) * per_level + int(i)  # the file counts blocks across levels
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


def text_name(name, names):
    """The single file's name of a parameter of our text encoder, for a file with these names."""
    name = name.removeprefix("text_model.")
    if is_openclip(names):  # q, k and v share a tensor
        name = re.sub(r"[qkv]_proj\.", "in_proj_", replace_words(name, OPENCLIP_WORDS))
        return f"{TEXT}model.{name}"
    long = TEXT + "transformer.text_model."  # some files lack `text_model.`
    return (long if has(names, long) else TEXT + "transformer.") + name


def names_in_file(part, network, names, ema=False):
    """{our name: the file's name} of a part's parameters, for a file that has these names."""
    ours = network.state_dict()
    if part == "unet":
        theirs = [UNET + unet_name(name, network.config) for name in ours]
        if ema:  # model.diffusion_model.out.2.bias: model_ema.diffusion_modelout2bias
            theirs = [f"model_ema.{name[len('model.'):].replace('.', '')}" for name in theirs]
    elif part == "vae":
        theirs = [VAE + vae_name(name, network.config) for name in ours]
    else:
        theirs = [text_name(name, names) for name in ours]
    return dict(zip(ours, theirs, strict=True))


def view_of(tensor, ours, theirs, ndim):
    """A file's tensor as our parameter: one of joint q, k, v; a 1x1 convolution as a matrix."""
    if ".in_proj_" in theirs:
        tensor = tensor.chunk(3)["qkv".index(ours.rpartition("_proj.")[0][-1])]
    return tensor.flatten(1) if (tensor.ndim, tensor.shape[2:], ndim) == (4, (1, 1), 2) else tensor


def convert(tensors, networks, ema, where):
    """({part: {our name: tensor}}, {(part, our name): the file's}, {reason: number ignored}).

    networks is {part: our network}. The tensors are views of the file's tensors; missing ones are
    left out. Raises ValueError if the file has tensors that are neither used nor known.
    """
    if ema and not has(tensors, "model_ema.diffusion_model"):
        raise ValueError(f"{where}: holds no EMA weights (model_ema.*); load it without --ema")
    parts, used = {part: {} for part in networks}, {}
    for part, network in networks.items():
        state = network.state_dict()
        for ours, theirs in names_in_file(part, network, tensors, ema).items():
            if theirs in tensors:
                parts[part][ours] = view_of(tensors[theirs], ours, theirs, state[ours].ndim)
                used[part, ours] = theirs
    last = networks["text_encoder"].config.num_hidden_layers
    unused = UNUSED | {rf"^cond_stage_model\.model\.transformer\.resblocks\.{last}\.":
                       "the text encoder's last layer, which Stable Diffusion 2 skips"}
    if ema:
        unused[r"^model\.diffusion_model\."] = "the U-Net's weights beside their average"
    unused_names = tensors.keys() - set(used.values())
    reasons = {name: reason for name in unused_names
               for pattern, reason in unused.items() if re.search(pattern, name)}
    if unknown := sorted(unused_names - reasons.keys()):
        raise ValueError(f"{where}: {len(unknown)} tensors are not part of Stable Diffusion: "
                         f"{', '.join(unknown[:5])}")
    return parts, used, dict(Counter(reasons.values()))
