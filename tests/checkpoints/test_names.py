"""Single files of Stable Diffusion 1 and 2: read as diffusers reads them, or refused by name."""

import re

import pytest
import torch
from checkpoint_files import RECORDED, TEXT, UNET, VAE, add, changed, write_files
from recorded.rule import normal, probe

from checkpoints.tokenizers import save_tokenizer
from checkpoints.weights import load_pipeline
from pipeline import Sampling
from tokenizer import CLIPTokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


# Values


@torch.no_grad()
def outputs(pipeline, name):
    """What a pipeline computes from the inputs that were recorded."""
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
    """The error against diffusers and transformers, relative to the largest value."""
    expected = torch.tensor(RECORDED[family][name], dtype=torch.float64)
    return (probe(outputs(pipeline, name)) - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("name", ["unet", "mean", "decoded", "text", "latents", "picture"])
@pytest.mark.parametrize("family", RECORDED)
def test_a_single_file_gives_what_it_gives_in_diffusers(files, family, name):
    """latents and picture: the whole path, 20 DDIM steps with guidance from the same noise."""
    pipeline = load_pipeline(files[family], temporal="none", merges=files["merges"])
    assert distance(pipeline, family, name) < TOLERANCE


# The text


@pytest.mark.parametrize("family, padding", [("sd1", 533), ("sd2", 0)])
def test_the_family_determines_how_a_text_is_padded(files, family, padding):
    """The tokenizer folder is padded with the end token, as in SD 1."""
    for merges in (files["merges"], files["merges"].parent):
        ids = load_pipeline(files[family], merges=merges).tokenizer(["a red circle"])
        assert ids.shape == (1, 12) and ids[0, 0] == 532 and ids[0, -1] == padding and 533 in ids


def test_a_tokenizer_of_another_vocabulary_is_refused(files, tmp_path):
    save_tokenizer(tmp_path, CLIPTokenizer.train(["a red circle"], 3))
    for merges in (tmp_path, tmp_path / "merges.txt"):
        with pytest.raises(ValueError, match="tokenizer has 517 tokens .* text encoder 534"):
            load_pipeline(files["sd1"], merges=merges)


# Other files


def only(*prefixes, new=None):
    """A change that keeps the tensors with these prefixes, which `new` replaces."""
    return lambda tensors: {
        re.sub(f"^{prefix}", new, name) if new is not None else name: tensor
        for prefix in prefixes for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("change, message", [
    (add("conditioner.embedders.0.x", 1), "got Stable Diffusion XL"),
    (lambda _: {"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, "got a LoRA"),
    (lambda _: {"unet.a.to_q.lora_A.weight": torch.zeros(2, 2)}, "got a LoRA"),
    (lambda _: {"<a-cat>": torch.zeros(64)}, "got a textual inversion"),
    (only(UNET, new=""), "got a U-Net alone"), (only(VAE, new=""), "got an autoencoder alone"),
    (only(TEXT + "transformer.", new=""), "got a text encoder alone"),
    (only(UNET), "has no autoencoder and no text encoder, got model.diffusion_model"),
    (only(UNET, VAE), "has no text encoder"),
    (lambda _: {}, "has no U-Net and no autoencoder and no text encoder, got no tensors"),
    (add(UNET + "input_blocks.0.0.weight", 32, 9, 3, 3), r"9 channels, .* inpainting \(9 channels"),
    (lambda tensors: {k: v for k, v in tensors.items() if k != UNET + "out.2.weight"},
     "no tensor whose name ends in 'out.2.weight'"),
    (add(UNET + "out.2.weight", 5), "does not fit the network: size mismatch for conv_out.weight"),
    (add(UNET + "input_blocks.1.0.in_layers.2.weight"), "is not Stable Diffusion"),
    (add("surprise", 1), "1 tensors are not part of Stable Diffusion: surprise"),
    (lambda tensors: {k: v for k, v in tensors.items() if "attn_1" not in k or "encoder" in k},
     r'Missing key\(s\) in state_dict: "decoder.mid_block.attentions.0'),
])
def test_another_file_is_refused_by_name(files, tmp_path, change, message):
    path = changed(tmp_path / "file.safetensors", files["sd1"], change)
    with pytest.raises(ValueError, match="file.safetensors: .*" + message):
        load_pipeline(path)


@pytest.mark.parametrize("shape", [(), (388,)])  # chunk(3) cuts 388 into 130, 130, 128
def test_queries_keys_and_values_that_are_not_three_thirds_are_refused(files, tmp_path, shape):
    name = TEXT + "model.transformer.resblocks.1.attn.in_proj_bias"
    path = changed(tmp_path / "x.safetensors", files["sd2"], add(name, *shape))
    with pytest.raises(ValueError, match="size mismatch for .*layers.1.self_attn.q_proj.bias"):
        load_pipeline(path)
