"""A model's folder: a saved model comes back in every form; other folders are refused by name."""

import dataclasses
import shutil

import pytest
import torch
from checkpoint_files import same
from helpers import call, change, fresh_pipeline

import vae
from checkpoints import __main__ as command
from checkpoints import weights
from checkpoints.safetensors_file import load_safetensors, save_safetensors
from checkpoints.weights import load_pipeline, save_pipeline
from pipeline import Sampling
from support.files import read_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline(fresh_pipeline(), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a model's folder, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")


def holds(network, tensors):
    return same(network.state_dict(), tensors)


# What comes back


def test_a_saved_model_comes_back_bit_for_bit(saved):
    loaded, expected = load_pipeline(saved), fresh_pipeline()
    for part in weights.PARTS:
        assert holds(getattr(loaded, part), getattr(expected, part).state_dict())
        assert getattr(loaded, part).config == getattr(expected, part).config
    assert loaded.diffusion == expected.diffusion and loaded.sampling == expected.sampling
    texts = ["a red square", "ein Kreis, größer!"]
    assert torch.equal(loaded.tokenizer(texts), expected.tokenizer(texts))


def test_a_loaded_model_draws_the_same_clip(saved):
    """Bit for bit, because loaded tensors are aligned in memory as PyTorch's own are."""
    sampling = Sampling(num_frames=2, image_size=16, num_steps=2)
    *_, a = fresh_pipeline().sample(["a red square"], [3], sampling)
    loaded = load_pipeline(saved)
    *_, b = loaded.sample(["a red square"], [3], sampling)
    assert torch.equal(a, b)
    networks = loaded.unet, loaded.vae, loaded.text_encoder
    assert not any(p.data_ptr() % 64 for network in networks for p in network.parameters())


def test_arguments_override_what_a_folder_says(saved, folder):
    loaded = load_pipeline(saved, temporal="shift", dtype=torch.bfloat16)
    assert loaded.unet.config == dataclasses.replace(fresh_pipeline().unet.config, temporal="shift")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    change(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=False)
    assert load_pipeline(folder, zero_terminal_snr=True).diffusion == loaded.diffusion
    with pytest.raises(ValueError, match="config.json: .*cannot start from zero terminal SNR"):
        load_pipeline(saved, prediction_type="epsilon")


# Folders of other programs


def test_a_text_encoder_without_the_prefix_is_the_same(folder):
    """Transformers 5 writes no prefix; older versions also wrote position ids."""
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    tensors = load_safetensors(path)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_safetensors(path, bare | {"embeddings.position_ids": torch.arange(9)[None]})
    pipeline = load_pipeline(folder)
    assert holds(pipeline.text_encoder, tensors)
    assert pipeline.report.ignored == {"position ids": 1}


def test_the_old_names_of_the_autoencoders_attention_are_known(tmp_path):
    """Some files hold these matrices as 1x1 convolutions."""
    config = vae.VAEConfig(block_out_channels=(32,), layers_per_block=1)
    weights.save_network(tmp_path, vae.AutoencoderKL(config))
    path = tmp_path / weights.UNET_WEIGHTS
    old, tensors = {}, load_safetensors(path)
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in tensors.items():
        for new, word in words.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, word)
                tensor = tensor[..., None, None] if word == "key" and tensor.ndim == 2 else tensor
        old[name] = tensor
    save_safetensors(path, old)
    assert old.keys() != tensors.keys() and holds(weights.load_vae(tmp_path), tensors)


def test_a_model_without_a_tokenizer_comes_back_without_and_can_be_given_one(folder, tmp_path):
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    pipeline = load_pipeline(folder)
    assert pipeline.tokenizer is None
    save_pipeline(pipeline, tmp_path / "again")
    assert read_json(tmp_path / "again/model_index.json")["tokenizer"] == [None, None]
    loaded = load_pipeline(tmp_path / "again", merges=tmp_path / "elsewhere").tokenizer
    # Padding is id 0, because the text encoder has OpenCLIP's activation.
    assert loaded.vocab_size == fresh_pipeline().tokenizer.vocab_size and loaded.pad_id == 0


def test_a_model_without_our_settings_draws_an_image_of_its_size(folder):
    (folder / "sampling.json").unlink()
    change(folder / "unet/config.json", sample_size=10)
    assert load_pipeline(folder).sampling == Sampling(num_frames=1, image_size=40)


# Folders that are refused


@pytest.mark.parametrize("file, message", [
    ("unet/config.json", "unet: has no config.json; name a model's file, a folder"),
    (f"vae/{weights.UNET_WEIGHTS}", "vae: holds no weights"),
    ("tokenizer/merges.txt", "No such file .*tokenizer/merges.txt"),
])
def test_a_missing_file_is_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises((ValueError, OSError), match=message):
        load_pipeline(folder)


@pytest.mark.parametrize("name, parts", [
    ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIPTextModel"]}),
    ("StableVideoDiffusionPipeline", {"text_encoder": None}),
    ("StableUnCLIPPipeline", {"image_normalizer": ["diffusers", "Normalizer"]}),
    ("AnimateDiffPipeline", {"motion_adapter": ["diffusers", "MotionAdapter"]}),
])
def test_a_folder_of_another_model_is_named(folder, name, parts):
    change(folder / "model_index.json", _class_name=name, **parts)
    with pytest.raises(ValueError, match=f"model: needs Stable Diffusion 1 or 2, got {name}$"):
        load_pipeline(folder)


TEXTS = "model: the tokenizer has .* texts of .*, the text encoder .* at most 9"


@pytest.mark.parametrize("file, values, message", [
    ("unet/config.json", {"block_out_channels": [48, 64]},
     f"unet/{weights.UNET_WEIGHTS}: does not fit the network .*size mismatch for "),
    ("unet/config.json", {"cross_attention_dim": 2**62}, "unet/config.json: "),  # torch overflows
    ("text_encoder/config.json", {"num_attention_heads": 0}, "text_encoder/config.json: "),
    ("sampling.json", {"sampler": "euler"}, "sampling.json: sampler needs .* got 'euler'"),
    ("sampling.json", {"num_frames": 0}, r"num_frames needs int in \[1, inf\], got 0"),
    ("sampling.json", {"speed": 3}, "sampling.json: speed=3 is not supported"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, TEXTS),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 0}, TEXTS),
])
def test_a_wrong_value_is_one_line_that_names_the_file(folder, file, values, message):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=f"^{folder.parent}.*{message}") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_ema_weights_are_not_looked_for_in_a_folder(saved):
    with pytest.raises(ValueError, match="model: only single files hold EMA weights"):
        load_pipeline(saved, ema=True)


# The command


def test_the_command_says_what_a_folder_is_and_writes_the_same_bytes(saved, tmp_path, capsys):
    call(command.main, saved, "--convert", tmp_path / "new")
    told = capsys.readouterr().out
    for fact in ("this project's own", "predicts v_prediction", "block_out_channels=(32, 64)",
                 "latent_channels=4", "hidden_size=64", "torch.float32", "tensors used"):
        assert fact in told
    for file in saved.rglob("*.*"):
        assert (tmp_path / "new" / file.relative_to(saved)).read_bytes() == file.read_bytes()


def test_the_command_overwrites_nothing(saved, tmp_path):
    (tmp_path / "precious").touch()
    for target in (tmp_path, tmp_path / "precious"):
        with pytest.raises(ValueError, match="--convert .*: exists already; name a new folder"):
            call(command.main, saved, "--convert", target)
