"""Single files of Stable Diffusion 1 and 2: read as diffusers reads them, or refused by name."""

import re

import pytest
import torch
from checkpoint_files import RECORDED, TEXT, UNET, VAE, changed, write_files
from recorded.rule import normal, probe
from torch import nn

import layers
import text
from checkpoints.tokenizers import save_tokenizer
from pipeline import Sampling
from tokenizer import CLIPTokenizer
from weights import load_pipeline

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


# Values


@torch.no_grad()
def outputs(pipeline, name):
    """What a pipeline makes of the inputs that were recorded."""
    if name == "unet":
        inputs = normal(2, 4, 8, 12)[:, None], torch.tensor([37, 2]), normal(2, 12, 128, seed=2)
        return pipeline.unet(*inputs)
    if name == "mean":
        return pipeline.vae.encode(normal(2, 3, 12, 20)).mean
    if name == "decoded":
        return pipeline.vae.decode(normal(2, 4, 3, 4, seed=2))
    if name == "text":
        return pipeline.text_encoder((torch.arange(24).view(2, 12) * 17) % 534)
    *_, latents = pipeline.sample(["a red circle"], [3], Sampling(1, 32, num_steps=20))
    return pipeline.decode(latents) if name == "picture" else latents


def distance(pipeline, family, name):
    """From what diffusers and transformers gave, relative to the largest value."""
    expected = torch.tensor(RECORDED[family][name], dtype=torch.float64)
    return (probe(outputs(pipeline, name)) - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("name", ["unet", "mean", "decoded", "text", "latents", "picture"])
@pytest.mark.parametrize("family", RECORDED)
def test_a_single_file_gives_what_it_gives_in_diffusers(files, family, name):
    """latents and picture: the whole path, 20 DDIM steps with guidance from the same noise."""
    pipeline = load_pipeline(files[family], temporal="none", merges=files["merges"])
    assert distance(pipeline, family, name) < TOLERANCE


def wrong_heads(pipeline):
    for module in pipeline.unet.modules():
        if isinstance(module, layers.Attention):
            module.num_heads = 4


def wrong_heads_of_the_text(pipeline):
    for layer in pipeline.text_encoder.text_model.encoder.layers:
        layer.self_attn.num_heads = 4


def wrong_eps(pipeline):
    for module in pipeline.vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5


def symmetric_padding(pipeline):
    for module in pipeline.vae.modules():
        if isinstance(module, layers.Downsample):
            module.asymmetric, module.conv.padding = False, (1, 1)


def wrong_activation(pipeline):
    act = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[pipeline.text_encoder.config.hidden_act]
    for layer in pipeline.text_encoder.text_model.encoder.layers:
        layer.mlp.activation = text.ACTIVATIONS[act]


def lost_end_token(pipeline):
    tokenizer = pipeline.tokenizer
    pipeline.tokenizer = lambda texts: tokenizer(texts).masked_fill(
        tokenizer(texts) == tokenizer.end_id, tokenizer.pad_id if tokenizer.pad_id == 0 else 5
    )


@pytest.mark.parametrize("mistake, name", [
    (wrong_heads, "unet"), (wrong_heads_of_the_text, "text"), (wrong_eps, "mean"),
    (wrong_eps, "decoded"), (symmetric_padding, "mean"), (wrong_activation, "text"),
    (lost_end_token, "latents"),
])
@pytest.mark.parametrize("family", RECORDED)
def test_the_recorded_numbers_notice_a(mistake, name, family, files):
    pipeline = load_pipeline(files[family], temporal="none", merges=files["merges"])
    mistake(pipeline)
    assert distance(pipeline, family, name) > 3 * TOLERANCE


# The text


def test_without_a_tokenizer_only_reading_a_text_is_refused(files):
    pipeline = load_pipeline(files["sd1"])
    assert pipeline.tokenizer is None
    with pytest.raises(ValueError, match=r"no tokenizer; .*--merges PATH.* in tokenizer/"):
        pipeline.encode_text(["a red circle"])


@pytest.mark.parametrize("family, padding", [("sd1", 533), ("sd2", 0)])
@pytest.mark.parametrize("as_folder", [False, True])
def test_the_family_says_how_a_text_is_padded(files, family, padding, as_folder):
    """The folder is padded with the end token, as of SD 1."""
    merges = files["merges"].parent if as_folder else files["merges"]
    ids = load_pipeline(files[family], merges=merges).tokenizer(["a red circle"])
    assert ids.shape == (1, 12) and ids[0, 0] == 532 and ids[0, -1] == padding and 533 in ids


def test_a_tokenizer_of_another_vocabulary_is_refused(files, tmp_path):
    save_tokenizer(tmp_path, CLIPTokenizer.train(["a red circle"], 3))
    with pytest.raises(ValueError, match="the tokenizer has 517 tokens, the text encoder 534"):
        load_pipeline(files["sd1"], merges=tmp_path)
    with pytest.raises(ValueError, match="merges.txt: needs 20 merges, got 3"):
        load_pipeline(files["sd1"], merges=tmp_path / "merges.txt")


# What is refused


def rename(pattern, new):
    return lambda tensors: {re.sub(pattern, new, name): t for name, t in tensors.items()}


def add(name, *shape):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def only(prefix, new=""):
    return lambda tensors: {
        new + name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }


def input_channels(count):
    return add(UNET + "input_blocks.0.0.weight", 32, count, 3, 3)


@pytest.mark.parametrize("change, message", [
    (rename(TEXT, "conditioner.embedders.0."), "got Stable Diffusion XL"),
    (input_channels(9), "an inpainting model: its U-Net needs 9 channels"),
    (input_channels(8), "InstructPix2Pix"), (input_channels(5), "a depth model"),
    (input_channels(7), "an upscaler"), (input_channels(6), "another model: .* needs 6 channels"),
    (lambda _: {"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, "got a LoRA"),
    (lambda _: {"unet.a.to_q.lora_A.weight": torch.zeros(2, 2)}, "got a LoRA"),
    (lambda _: {"a.to_q_lora.down.weight": torch.zeros(2, 2)}, "got a LoRA"),
    (add("control_model.zero_convs.0.0.weight", 1), "got a ControlNet"),
    (add(UNET + "joint_blocks.0.x", 1), "got Stable Diffusion 3"),
    (lambda _: {"double_blocks.0.img_attn.norm": torch.zeros(2)}, "got Flux"),
    (lambda _: {"a.motion_modules.0.x": torch.zeros(2)}, "got AnimateDiff"),
    (lambda _: {"emb_params": torch.zeros(2, 64)}, "got a textual inversion"),
    (lambda _: {"<a-cat>": torch.zeros(64)}, "got a textual inversion"),
    (only(UNET), "got a U-Net alone"), (only(VAE), "got an autoencoder alone"),
    (only(TEXT + "transformer."), "got a text encoder alone"),
    (only(UNET, UNET), r"has no autoencoder and no text encoder \(first_stage_model\., cond_"),
    (lambda tensors: only(UNET, UNET)(tensors) | only(VAE, VAE)(tensors), "has no text encoder"),
    (lambda _: {"x.y": torch.zeros(1), "x.z": torch.zeros(1)}, "no U-Net .* got x.y, x.z; is"),
    (lambda tensors: tensors.clear(), "got no tensors"),
    (add(UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 64, 64),
     "needs texts of width 64, its text encoder has width 128"),
    (lambda tensors: {k: v for k, v in tensors.items() if k != UNET + "out.2.weight"},
     "no tensor that ends in 'out.2.weight'"),
    (add("surprise", 1), r"is not a whole Stable Diffusion \(1 unexpected: surprise\)"),
    (add(UNET + "out.2.bias", 5), r"\(1 of another shape: model.diffusion_model.out.2.bias\)"),
    (lambda tensors: {k: v for k, v in tensors.items() if "attn_1" not in k or "encoder" in k},
     r"\(10 missing: (first_stage_model.decoder.mid.attn_1.\w+.\w+(, |\))){5}"),
])
def test_another_file_is_refused_by_name(files, tmp_path, change, message):
    path = changed(tmp_path / "file.safetensors", files, "sd1", change)
    with pytest.raises(ValueError, match="file.safetensors: .*" + message):
        load_pipeline(path)


@pytest.mark.parametrize("name, shape", [
    (UNET + "input_blocks.1.0.in_layers.2.weight", (96, 64, 3, 3)),
    (TEXT + "model.token_embedding.weight", (534, 96)),
])
def test_heads_that_would_not_be_64_wide_are_refused(files, tmp_path, name, shape):
    path = changed(tmp_path / "x.safetensors", files, "sd2", add(name, *shape))
    with pytest.raises(ValueError, match="heads are 64 wide in this form, which does not divide"):
        load_pipeline(path)


@pytest.mark.parametrize("shape", [(), (1,), (388,)])  # chunk(3) cuts 388 into 130, 130, 128
def test_queries_keys_and_values_that_are_no_three_thirds_are_refused(files, tmp_path, shape):
    name = TEXT + "model.transformer.resblocks.1.attn.in_proj_bias"
    path = changed(tmp_path / "x.safetensors", files, "sd2", add(name, *shape))
    with pytest.raises(ValueError, match=f"1 of another shape: {name}"):
        load_pipeline(path)


def test_a_file_without_ema_weights_is_refused_when_they_are_requested(files, tmp_path):
    """Files that were stripped of them still hold their counters."""
    path = changed(tmp_path / "x.safetensors", files, "sd1", add("model_ema.decay", 1))
    with pytest.raises(ValueError, match="holds no EMA weights"):
        load_pipeline(path, ema=True)
