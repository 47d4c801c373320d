"""Single files of Stable Diffusion 1 and 2: read as diffusers reads them, or refused by name."""

import pytest
import torch
from checkpoint_files import RECORDED, UNET, VAE, add, changed
from recorded.rule import normal, probe

from checkpoints.weights import load_pipeline
from pipeline import Sampling

TOLERANCE = 1e-4


@torch.no_grad()
def outputs(pipeline):
    """A pipeline's outputs for the recorded inputs."""
    *_, latents = pipeline.sample(["a red circle"], [3], Sampling(1, 32, num_steps=20))
    unet = normal(2, 4, 8, 12)[:, None], torch.tensor([37, 2]), normal(2, 12, 128, seed=2)
    return {
        "unet": pipeline.unet(*unet),
        "mean": pipeline.vae.encode(normal(2, 3, 12, 20)).mean,
        "decoded": pipeline.vae.decode(normal(2, 4, 3, 4, seed=2)),
        "text": pipeline.text_encoder((torch.arange(24).view(2, 12) * 17) % 534),
        "latents": latents, "picture": pipeline.decode(latents),  # the whole path, with guidance
    }


@pytest.mark.parametrize("family", RECORDED)
def test_a_single_file_gives_what_it_gives_in_diffusers(loaded, family):
    """Errors against diffusers and transformers, relative to the largest value."""
    errors = {}
    for name, output in outputs(loaded[family]).items():
        expected = torch.tensor(RECORDED[family][name], dtype=torch.float64)
        errors[name] = (probe(output) - expected).abs().max() / expected.abs().max()
    assert len(errors) == 6 and max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("family, padding", [("sd1", 533), ("sd2", 0)])
def test_the_family_determines_how_a_text_is_padded(files, loaded, family, padding):
    """The tokenizer folder is padded with the end token, as in SD 1."""
    by_folder = load_pipeline(files[family], merges=files["merges"].parent)
    for pipeline in (loaded[family], by_folder):
        ids = pipeline.tokenizer(["a red circle"])
        assert ids.shape == (1, 12) and ids[0, 0] == 532 and ids[0, -1] == padding and 533 in ids


def only(prefix):
    return lambda tensors: {name: x for name, x in tensors.items() if name.startswith(prefix)}


def without(word):
    return lambda tensors: {name: x for name, x in tensors.items() if word not in name}


@pytest.mark.parametrize("change, message", [
    (add("conditioner.embedders.0.x", 1), "got Stable Diffusion XL"),
    (lambda _: {"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, "got a LoRA"),
    *[(add(name, 2), f"got {kind}") for name, kind in {
        "ip_adapter.1.to_k_ip.weight": "an IP-Adapter", "clip_g": "a textual inversion",
        "oft_unet_mid.oft_blocks": "a LoRA, LyCORIS or OFT", "scaled_fp8": "fp8 weights with",
        UNET + "input_blocks.1.0.time_mixer.mix_factor": "Stable Video Diffusion",
        "noise_augmentor.data_mean": "Stable unCLIP"}.items()],
    (lambda x: {name.removeprefix(VAE): y for name, y in only(VAE)(x).items()},
     "got a U-Net or an autoencoder alone"),
    (only(UNET), "got no autoencoder and no text encoder, only model.diff"),
    (lambda _: {}, "got no U-Net and no autoencoder and no text encoder, only nothing"),
    (add(UNET + "input_blocks.0.0.weight", 32, 9, 3, 3), r"9 channels, .* inpainting \(9 channels"),
    (without(UNET + "out.2.weight"), r"not Stable Diffusion, or not complete \(KeyError.'out.2.w"),
    (add("surprise", 1), "1 tensors are not part of Stable Diffusion: surprise"),
    (without("decoder.mid.attn_1"), r'does not fit .*Missing key.*decoder.mid_block.attentions.0'),
])
def test_another_file_is_refused_by_name(files, tmp_path, change, message):
    path = changed(tmp_path / "file.safetensors", files["sd1"], change)
    with pytest.raises(ValueError, match="^.*file.safetensors: .*" + message) as caught:
        load_pipeline(path)
    assert str(caught.value).count("file.safetensors") == 1 and "\n" not in str(caught.value)
