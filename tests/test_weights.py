"""A model's folder: what was saved comes back, under whatever names it was saved."""

import dataclasses
import shutil

import pytest
import torch
from helpers import call, change, fresh_pipeline

import vae
import weights
from files import load_safetensors, read_json, save_safetensors
from pipeline import Sampling
from weights import load_pipeline, save_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline(fresh_pipeline(), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a model's folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


# What comes back


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_come_back_bit_for_bit(saved, part):
    expected = getattr(fresh_pipeline(), part).state_dict()
    loaded = getattr(load_pipeline(saved), part).state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_settings_come_back(saved):
    loaded, expected = load_pipeline(saved), fresh_pipeline()
    for part in ("unet", "vae", "text_encoder"):
        assert getattr(loaded, part).config == getattr(expected, part).config
    assert loaded.diffusion == expected.diffusion and loaded.sampling == expected.sampling


def test_the_tokenizer_comes_back(saved):
    texts = ["a red square", "ein Kreis, größer!"]
    assert torch.equal(load_pipeline(saved).tokenizer(texts), fresh_pipeline().tokenizer(texts))


def test_a_loaded_model_draws_the_same_clip(saved):
    sampling = Sampling(num_frames=2, image_size=16, num_steps=2)
    *_, a = fresh_pipeline().sample(["a red square"], [3], sampling)
    *_, b = load_pipeline(saved).sample(["a red square"], [3], sampling)
    assert torch.equal(a, b)


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    save_pipeline(load_pipeline(saved), tmp_path / "again")
    for file in saved.rglob("*.*"):
        assert (tmp_path / "again" / file.relative_to(saved)).read_bytes() == file.read_bytes()


def test_the_way_through_time_can_be_chosen_when_loading(saved):
    loaded = load_pipeline(saved, temporal="shift").unet
    assert loaded.config == dataclasses.replace(fresh_pipeline().unet.config, temporal="shift")


def test_half_precision_becomes_float32(folder):
    path = folder / "unet" / weights.UNET_WEIGHTS
    halves = {name: tensor.half() for name, tensor in load_safetensors(path).items()}
    save_safetensors(path, halves)
    loaded = load_pipeline(folder).unet.state_dict()
    assert all(torch.equal(loaded[name], half.float()) for name, half in halves.items())


def test_training_on_does_not_write_into_the_file(folder):
    before = (folder / "unet" / weights.UNET_WEIGHTS).read_bytes()
    load_pipeline(folder).unet.conv_in.weight.data.zero_()
    assert (folder / "unet" / weights.UNET_WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin"])
def test_weights_under_other_names_are_the_same(folder, name):
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    tensors = load_safetensors(path)
    path.unlink()
    if name.endswith(".bin"):
        torch.save(tensors, path.with_name(name))
    else:
        save_safetensors(path.with_name(name), tensors)
    loaded = load_pipeline(folder).text_encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_text_encoder_without_the_prefix_is_the_same(folder):
    """As transformers 5 writes it; older ones wrote the numbers of positions, too."""
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    tensors = load_safetensors(path)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_safetensors(path, bare | {"embeddings.position_ids": torch.arange(9)[None]})
    pipeline = load_pipeline(folder)
    loaded = pipeline.text_encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert pipeline.report.ignored == {"numbers of positions": 1}


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_old_names_of_the_autoencoders_attention_are_known(tmp_path, convolutions):
    torch.manual_seed(1)
    config = vae.VAEConfig(block_out_channels=(32,), layers_per_block=1)
    weights.save_network(tmp_path, vae.AutoencoderKL(config))
    path = tmp_path / weights.UNET_WEIGHTS
    old, tensors = {}, load_safetensors(path)
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in tensors.items():
        for new, word in words.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, word)
                tensor = tensor[..., None, None] if convolutions and tensor.ndim == 2 else tensor
        old[name] = tensor
    save_safetensors(path, old)
    loaded = weights.load_vae(tmp_path).state_dict()
    assert old.keys() != tensors.keys() and len(old) == len(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_what_a_folder_says_can_be_overridden(saved):
    loaded = load_pipeline(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="cannot start from zero terminal SNR"):
        load_pipeline(saved, prediction_type="epsilon")


def test_a_model_without_a_tokenizer_is_saved_and_comes_back_without(saved, tmp_path):
    pipeline = load_pipeline(saved)
    pipeline.tokenizer = None
    save_pipeline(pipeline, tmp_path)
    assert not (tmp_path / "tokenizer").exists() and load_pipeline(tmp_path).tokenizer is None
    assert read_json(tmp_path / "model_index.json")["tokenizer"] == [None, None]


def test_a_tokenizer_can_be_given_to_a_folder(folder, tmp_path):
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    loaded = load_pipeline(folder, merges=tmp_path / "elsewhere").tokenizer
    # Padded with 0, as the text encoder has OpenCLIP's activation.
    assert loaded.vocab_size == fresh_pipeline().tokenizer.vocab_size and loaded.pad_id == 0


def test_a_setting_that_only_older_models_have_is_let_pass_while_it_is_off(folder):
    change(folder / "sampling.json", shared_noise=0.0)
    assert load_pipeline(folder).sampling == fresh_pipeline().sampling
    change(folder / "sampling.json", shared_noise=0.5)
    with pytest.raises(ValueError, match="shared_noise=0.5 is not built here"):
        load_pipeline(folder)


def test_a_model_without_our_settings_draws_a_picture_of_its_size(folder):
    (folder / "sampling.json").unlink()
    change(folder / "unet/config.json", sample_size=10)
    assert load_pipeline(folder).sampling == Sampling(num_frames=1, image_size=40)


# The command


def test_the_command_says_what_a_folder_is(saved, capsys):
    call(weights.main, saved)
    told = capsys.readouterr().out
    for fact in ("this project's own", "predicts v_prediction", "block_out_channels=(32, 64)",
                 "latent_channels=4", "hidden_size=64", "float32", "tensors used"):
        assert fact in told


def test_the_command_converts(saved, tmp_path, capsys):
    call(weights.main, saved, "--convert", tmp_path / "new", "--dtype", "bfloat16")
    loaded = load_pipeline(tmp_path / "new", dtype=None)
    expected = fresh_pipeline().unet.state_dict()
    for name, tensor in loaded.unet.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16())


@pytest.mark.parametrize("is_file", [False, True])
def test_the_command_writes_over_nothing(saved, tmp_path, is_file):
    (tmp_path / "precious").touch()
    target = tmp_path / "precious" if is_file else tmp_path
    with pytest.raises(ValueError, match="--convert .*: exists already; name a new folder"):
        call(weights.main, saved, "--convert", target)
