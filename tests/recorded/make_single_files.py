"""Writes single_files.json: what diffusers and transformers compute from small single files.

With diffusers 0.42.1, transformers 5.23.0 and torch 2.13.0, in tests/. FOLDER/tokenizer is written
first, in this project's environment:

    PYTHONPATH=.. python -c "import sys, pathlib; sys.path.append('checkpoints'); \
        import checkpoint_files; checkpoint_files.write_files(pathlib.Path('FOLDER'))"
    PYTHONPATH=. python recorded/make_single_files.py FOLDER/tokenizer > recorded/single_files.json
"""

import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recorded.make_diffusers import SD1, SD2, build_unet, build_vae, listed, print_json
from recorded.rule import checkpoint, normal, probe

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."

# {diffusers' word: the word of CompVis or Stability}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}
VAE_WORDS = {".group_norm.": ".norm.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
             ".to_out.0.": ".proj_out.", "conv_shortcut": "nin_shortcut",
             "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
             "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1"}
OPENCLIP_WORDS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
                  "self_attn": "attn"}

SMALL = {
    "sd1": dict(widths=(32, 64, 64), levels=(True, True, False), layers=1, vae_widths=(32, 64),
                vae_layers=1, text_layers=2),
    "sd2": dict(widths=(64, 128), levels=(True, False), layers=2, vae_widths=(32, 32, 64),
                vae_layers=2, text_layers=3),
}


def replace(name, words):
    for word, other in words.items():
        name = name.replace(word, other)
    return name


def shapes_of(module, block, words=None):
    """{CompVis' name: shape} of a module of the U-Net, given the name of its block there."""
    shapes = {}
    for name, value in module.state_dict().items():
        layer, _, kind = name.rpartition(".")
        layer = (words or {}).get(layer, layer)
        shapes[".".join([UNET + block, *filter(None, [layer]), kind])] = [*value.shape]
    return shapes


def unet_shapes(unet):
    """CompVis count the blocks through all levels: input_blocks, middle_block, output_blocks."""
    shapes = shapes_of(unet.time_embedding.linear_1, "time_embed.0")
    shapes |= shapes_of(unet.time_embedding.linear_2, "time_embed.2")
    shapes |= shapes_of(unet.conv_in, "input_blocks.0.0")
    number = 1
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            shapes |= shapes_of(resnet, f"input_blocks.{number}.0", RESNET)
            if hasattr(block, "attentions"):
                shapes |= shapes_of(block.attentions[i], f"input_blocks.{number}.1")
            number += 1
        if block.downsamplers:
            shapes |= shapes_of(block.downsamplers[0].conv, f"input_blocks.{number}.0.op")
            number += 1
    shapes |= shapes_of(unet.mid_block.resnets[0], "middle_block.0", RESNET)
    shapes |= shapes_of(unet.mid_block.attentions[0], "middle_block.1")
    shapes |= shapes_of(unet.mid_block.resnets[1], "middle_block.2", RESNET)
    number = 0
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            shapes |= shapes_of(resnet, f"output_blocks.{number}.0", RESNET)
            after = 1  # the upsampler follows the transformer, if there is one
            if hasattr(block, "attentions"):
                shapes |= shapes_of(block.attentions[i], f"output_blocks.{number}.1")
                after = 2
            if block.upsamplers and i == len(block.resnets) - 1:
                name = f"output_blocks.{number}.{after}.conv"
                shapes |= shapes_of(block.upsamplers[0].conv, name)
            number += 1
    return shapes | shapes_of(unet.conv_norm_out, "out.0") | shapes_of(unet.conv_out, "out.2")


def vae_shapes(vae):
    """CompVis count the decoder's levels from the finest; their attention is a convolution."""
    shapes, last = {}, len(vae.config.block_out_channels) - 1
    levels = {f"decoder.up_blocks.{i}.": f"decoder.up.{last - i}." for i in range(last + 1)}
    levels |= {"encoder.down_blocks.": "encoder.down.", ".resnets.": ".block.",
               ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample."}
    for name, value in vae.state_dict().items():
        shape = [*value.shape]
        if "mid_block.attentions.0" in name and len(shape) == 2:
            shape += [1, 1]
        shapes[VAE + replace(replace(name, VAE_WORDS), levels)] = shape
    return shapes


def clip_shapes(text):
    prefix = TEXT + "transformer.text_model."
    shapes = {prefix + name: [*value.shape] for name, value in text.state_dict().items()}
    return shapes | {prefix + "embeddings.position_ids": [1, text.config.max_position_embeddings]}


def openclip_shapes(text):
    """With one more layer, which Stable Diffusion 2 skips."""
    config, width = text.config, text.config.hidden_size
    shapes = {"token_embedding.weight": [config.vocab_size, width], "ln_final.weight": [width],
              "ln_final.bias": [width],
              "positional_embedding": [config.max_position_embeddings, width],
              "text_projection": [width, width], "logit_scale": []}
    for name, value in text.encoder.layers[0].state_dict().items():
        if "k_proj" in name or "v_proj" in name:  # in one matrix with q_proj
            continue
        shape = [*value.shape]
        if "q_proj" in name:
            name, shape = name.replace("q_proj.", "in_proj_"), [3 * width] + shape[1:]
        for i in range(config.num_hidden_layers + 1):
            shapes[f"transformer.resblocks.{i}.{replace(name, OPENCLIP_WORDS)}"] = shape
    return {f"{TEXT}model.{name}": shape for name, shape in shapes.items()}


def networks(family, widths, levels, layers, vae_widths, vae_layers, text_layers):
    """The U-Net, the autoencoder and the text encoder, as diffusers and transformers build them."""
    sd2 = family == "sd2"
    heads = [width // 64 for width in widths] if sd2 else 8
    unet = build_unet(levels, block_out_channels=widths, layers_per_block=layers,
                      attention_head_dim=heads, cross_attention_dim=128, use_linear_projection=sd2)
    vae = build_vae(vae_widths, layers_per_block=vae_layers, latent_channels=4, sample_size=512)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=534, hidden_size=128, intermediate_size=160, num_hidden_layers=text_layers,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=532, eos_token_id=533,
        hidden_act="gelu" if sd2 else "quick_gelu",
    ))
    return unet, vae, text.eval()


def load(family, tensors, unet, vae, text):
    """Fill the networks with a single file's tensors as diffusers converts them."""
    utils = single_file_utils
    unet.load_state_dict(utils.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    vae.load_state_dict(utils.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)))
    if family == "sd1":
        state = utils.convert_ldm_clip_checkpoint(tensors)
    else:
        skipped = f"resblocks.{text.config.num_hidden_layers}."
        used = {name: value for name, value in tensors.items() if skipped not in name}
        state = utils.convert_open_clip_checkpoint(text, used)
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    known = text.state_dict().keys()
    assert state.keys() - known <= {"embeddings.position_ids", "text_projection.weight"}
    text.load_state_dict({name: state[name] for name in known})


@torch.no_grad()
def record(family, tokenizer):
    unet, vae, text = networks(family, **SMALL[family])
    shapes = unet_shapes(unet) | vae_shapes(vae)
    shapes |= clip_shapes(text) if family == "sd1" else openclip_shapes(text)
    load(family, checkpoint({"": shapes}), unet, vae, text)
    ids = (torch.arange(24).view(2, 12) * 17) % 534
    recorded = {
        "unet": unet(normal(2, 4, 8, 12), torch.tensor([37, 2]), normal(2, 12, 128, seed=2)).sample,
        "mean": vae.encode(normal(2, 3, 12, 20)).latent_dist.mean,
        "decoded": vae.decode(normal(2, 4, 3, 4, seed=2)).sample,
        "text": text(ids).last_hidden_state,
    }
    padding = "!" if family == "sd2" else "<|endoftext|>"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer, pad_token=padding)
    scheduler = DDIMScheduler(**(SD2 if family == "sd2" else SD1))
    pipeline = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                       requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    for name, kind in (("latents", "latent"), ("picture", "pt")):
        recorded[name] = pipeline("a red circle", height=32, width=32, num_inference_steps=20,
                                  guidance_scale=7.5, output_type=kind,
                                  generator=torch.Generator().manual_seed(3)).images
    recorded["picture"] = recorded["picture"] * 2 - 1  # [0, 1] -> [-1, 1]
    nested = {prefix: {name.removeprefix(prefix): shape for name, shape in shapes.items()
                       if name.startswith(prefix)} for prefix in (UNET, VAE, TEXT)}
    return {"shapes": nested} | {name: listed(probe(value)) for name, value in recorded.items()}


if __name__ == "__main__":
    print_json({family: record(family, sys.argv[1]) for family in SMALL}, separators=(",", ":"))
