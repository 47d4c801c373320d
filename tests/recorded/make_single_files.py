"""Makes single_files.json: what diffusers and transformers make of small single files.

With diffusers 0.42.1, transformers 5.23.0 and torch 2.13.0, in tests/; TOKENIZER is a folder that
write_files of checkpoints/checkpoint_files.py writes:

    PYTHONPATH=. python recorded/make_single_files.py TOKENIZER > recorded/single_files.json
"""

import json
import sys

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recorded.rule import checkpoint, normal, probe

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
MIXED = {".group_norm.": ".norm.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.",
         "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
SHORT = (",", ":")
OPEN = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"}


def listed(x):
    return [float(f"{value:.7g}") for value in x.flatten().tolist()]


def unet_shapes(unet):
    """Shapes under CompVis' names: walk input_blocks, middle_block and output_blocks in their order."""
    shapes = {}

    def put(place, module, words=None):
        for name, value in module.state_dict().items():
            head = ".".join(name.split(".")[:-1])
            shapes[f"model.diffusion_model.{place}." + name.replace(head, (words or {}).get(head, head), 1)] = [*value.shape]

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    put("input_blocks.0.0", unet.conv_in)
    number = 1
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            put(f"input_blocks.{number}.0", resnet, RESNET)
            if hasattr(block, "attentions"):
                put(f"input_blocks.{number}.1", block.attentions[i])
            number += 1
        if block.downsamplers:
            put(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
            number += 1
    put("middle_block.0", unet.mid_block.resnets[0], RESNET)
    put("middle_block.1", unet.mid_block.attentions[0])
    put("middle_block.2", unet.mid_block.resnets[1], RESNET)
    number = 0
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            put(f"output_blocks.{number}.0", resnet, RESNET)
            after = 1
            if hasattr(block, "attentions"):
                put(f"output_blocks.{number}.1", block.attentions[i])
                after = 2
            if block.upsamplers and i == len(block.resnets) - 1:
                put(f"output_blocks.{number}.{after}.conv", block.upsamplers[0].conv)
            number += 1
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return shapes


def vae_shapes(vae):
    shapes, last = {}, len(vae.config.block_out_channels) - 1
    for name, value in vae.state_dict().items():
        shape = [*value.shape]
        for i in range(last + 1):
            for side, down, up in (("encoder", f"down_blocks.{i}", f"down.{i}"), ("decoder", f"up_blocks.{i}", f"up.{last - i}")):
                name = name.replace(f"{side}.{down}.resnets", f"{side}.{up}.block")
                name = name.replace(f"{side}.{down}.downsamplers.0", f"{side}.{up}.downsample")
                name = name.replace(f"{side}.{down}.upsamplers.0", f"{side}.{up}.upsample")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0" in name:
            name, shape = name.replace("mid_block.attentions.0", "mid.attn_1"), shape + [1, 1] * (len(shape) == 2)
        for ours, old in MIXED.items():
            name = name.replace(ours, old)
        shapes["first_stage_model." + name] = shape
    return shapes


def clip_shapes(text):
    prefix = "cond_stage_model.transformer.text_model."
    shapes = {prefix + name: [*value.shape] for name, value in text.state_dict().items()}
    return shapes | {prefix + "embeddings.position_ids": [1, text.config.max_position_embeddings]}


def openclip_shapes(text):
    """With one layer more, which Stable Diffusion 2 skips."""
    config, width = text.config, text.config.hidden_size
    shapes = {"token_embedding.weight": [config.vocab_size, width], "ln_final.weight": [width], "ln_final.bias": [width],
              "positional_embedding": [config.max_position_embeddings, width],
              "text_projection": [width, width], "logit_scale": []}
    for name, value in text.encoder.layers[0].state_dict().items():
        if "k_proj" in name or "v_proj" in name:
            continue
        shape = [*value.shape]
        if "q_proj" in name:
            name, shape = name.replace("q_proj.", "in_proj_"), [3 * width] + shape[1:]
        for ours, old in OPEN.items():
            name = name.replace(ours, old)
        for i in range(config.num_hidden_layers + 1):
            shapes[f"transformer.resblocks.{i}.{name}"] = shape
    return {"cond_stage_model.model." + name: shape for name, shape in shapes.items()}


def networks(family, widths, levels, layers, vae_widths, vae_layers, text, device="cpu", **options):
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(levels)]
    heads = [width // 64 for width in widths] if family == "sd2" else 8
    with torch.device(device):
        unet = UNet2DConditionModel(block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=layers,
                                    attention_head_dim=heads, cross_attention_dim=text["hidden_size"],
                                    use_linear_projection=family == "sd2", **options)
        vae = AutoencoderKL(block_out_channels=vae_widths, layers_per_block=vae_layers, latent_channels=4, sample_size=512,
                            down_block_types=["DownEncoderBlock2D"] * len(vae_widths), up_block_types=["UpDecoderBlock2D"] * len(vae_widths))
        text = CLIPTextModel(CLIPTextConfig(**text, hidden_act="gelu" if family == "sd2" else "quick_gelu",
                                            num_attention_heads=text["hidden_size"] // 64,
                                            bos_token_id=text["vocab_size"] - 2, eos_token_id=text["vocab_size"] - 1))
    return unet.eval(), vae.eval(), text.eval()


def load(family, tensors, unet, vae, text):
    """Fill the networks with a single file's tensors as diffusers converts them."""
    unet.load_state_dict(theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    vae.load_state_dict(theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)))
    if family == "sd1":
        state = theirs.convert_ldm_clip_checkpoint(tensors)
    else:
        skipped = f"resblocks.{text.config.num_hidden_layers}."
        state = theirs.convert_open_clip_checkpoint(text, {k: v for k, v in tensors.items() if skipped not in k})
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    known = text.state_dict().keys()
    assert state.keys() - known <= {"embeddings.position_ids", "text_projection.weight"}
    text.load_state_dict({name: state[name] for name in known})


SMALL = {
    "sd1": dict(widths=(32, 64, 64), levels=(True, True, False), layers=1, vae_widths=(32, 64), vae_layers=1, text=dict(
        hidden_size=128, intermediate_size=160, num_hidden_layers=2, vocab_size=534, max_position_embeddings=12)),
    "sd2": dict(widths=(64, 128), levels=(True, False), layers=2, vae_widths=(32, 32, 64), vae_layers=2, text=dict(
        hidden_size=128, intermediate_size=160, num_hidden_layers=3, vocab_size=534, max_position_embeddings=12)),
}


@torch.no_grad()
def record(family):
    unet, vae, text = networks(family, **SMALL[family])
    shapes = unet_shapes(unet) | vae_shapes(vae) | (clip_shapes if family == "sd1" else openclip_shapes)(text)
    load(family, checkpoint({"": shapes}), unet, vae, text)
    ids = (torch.arange(24).view(2, 12) * 17) % 534
    latents = vae.encode(normal(2, 3, 12, 20)).latent_dist
    recorded = {
        "unet": unet(normal(2, 4, 8, 12), torch.tensor([37, 2]), normal(2, 12, 128, seed=2)).sample,
        "mean": latents.mean, "decoded": vae.decode(normal(2, 4, 3, 4, seed=2)).sample,
        "text": text(ids).last_hidden_state,
    }
    tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1], pad_token="!" if family == "sd2" else "<|endoftext|>")
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1,
                              prediction_type="v_prediction" if family == "sd2" else "epsilon")
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = dict(prompt="a red circle", height=32, width=32, num_inference_steps=20, guidance_scale=7.5)
    for name, kind in (("latents", "latent"), ("picture", "pt")):
        recorded[name] = pipe(**prompt, generator=torch.Generator().manual_seed(3), output_type=kind).images
    recorded["picture"] = recorded["picture"] * 2 - 1
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    nested = {p: {k.removeprefix(p): v for k, v in shapes.items() if k.startswith(p)} for p in prefixes}
    return {"shapes": nested} | {name: listed(probe(value)) for name, value in recorded.items()}


if __name__ == "__main__":
    print("{" + ",\n".join(
        f"{json.dumps(family)}: {{\n" + ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value, separators=SHORT)}" for key, value in record(family).items()) + "\n}"
        for family in SMALL) + "}")
