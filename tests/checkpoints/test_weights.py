"""A model's folder: what was saved comes back, in every form; another folder is refused by name."""

import dataclasses
import shutil

import pytest
import torch
from helpers import call, change, fresh_pipeline

import model
import vae
from checkpoints import __main__ as command
from checkpoints import configs, weights
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
    """Whether a network has exactly these tensors, in this order."""
    state = network.state_dict()
    return list(state) == list(tensors) and all(
        torch.equal(state[name], tensor) for name, tensor in tensors.items())


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
    """Bit for bit, because no tensor begins elsewhere than in PyTorch's own memory."""
    sampling = Sampling(num_frames=2, image_size=16, num_steps=2)
    *_, a = fresh_pipeline().sample(["a red square"], [3], sampling)
    loaded = load_pipeline(saved)
    *_, b = loaded.sample(["a red square"], [3], sampling)
    assert torch.equal(a, b)
    assert not any(p.data_ptr() % 64 for p in loaded.unet.parameters())


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    save_pipeline(load_pipeline(saved), tmp_path / "again")
    for file in saved.rglob("*.*"):
        assert (tmp_path / "again" / file.relative_to(saved)).read_bytes() == file.read_bytes()


def test_arguments_override_what_a_folder_says(saved):
    loaded = load_pipeline(saved, temporal="shift", dtype=torch.bfloat16)
    assert loaded.unet.config == dataclasses.replace(fresh_pipeline().unet.config, temporal="shift")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    assert weights.load_unet(saved / "unet", "shift").config == loaded.unet.config
    with pytest.raises(ValueError, match="cannot start from zero terminal SNR"):
        load_pipeline(saved, prediction_type="epsilon")


def test_a_network_that_is_given_replaces_the_folders(folder):
    shutil.rmtree(folder / "unet")
    unet = model.UNet(dataclasses.replace(model.PRESETS["tiny"], in_channels=13))
    assert weights.load_folder(folder, unet=unet).unet is unet


def test_a_subclass_is_saved_under_its_name_and_never_loaded_as_its_base(tmp_path):
    class OtherUNet(model.UNet):
        pass

    network, where = OtherUNet(model.PRESETS["tiny"]), tmp_path / "config.json"
    weights.save_network(tmp_path, network)
    with pytest.raises(ValueError, match="config.json: _class_name='OtherUNet' is not built here"):
        weights.load_unet(tmp_path)
    config = configs.from_config(model.UNetConfig, read_json(where), {}, where)
    loaded, _ = weights.fill_from(tmp_path, weights.build(OtherUNet, config, where))
    assert config == network.config and holds(loaded, network.state_dict())


# Folders of other programs


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin"])
def test_weights_under_other_names_and_in_halves_become_float32(folder, name):
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    tensors = {name: tensor.half() for name, tensor in load_safetensors(path).items()}
    (torch.save if name.endswith(".bin") else lambda x, y: save_safetensors(y, x))(
        tensors, path.with_name(name))
    path.unlink()
    loaded = load_pipeline(folder).text_encoder
    assert holds(loaded, {name: tensor.float() for name, tensor in tensors.items()})


def test_a_text_encoder_without_the_prefix_is_the_same(folder):
    """As transformers 5 writes it; older versions also wrote position ids."""
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    tensors = load_safetensors(path)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_safetensors(path, bare | {"embeddings.position_ids": torch.arange(9)[None]})
    pipeline = load_pipeline(folder)
    assert holds(pipeline.text_encoder, tensors)
    assert pipeline.report.ignored == {"position ids": 1}


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_old_names_of_the_autoencoders_attention_are_known(tmp_path, convolutions):
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
    ("unet/config.json", "unet: has no config.json; is the run's image stage finished"),
    (f"vae/{weights.UNET_WEIGHTS}", "vae: holds no weights"),
    ("tokenizer/merges.txt", "No such file .*tokenizer/merges.txt"),
    ("tokenizer/tokenizer_config.json", "tokens and texts of 77, the text encoder .* at most 9"),
    ("scheduler/scheduler_config.json", "No such file .*scheduler_config.json"),
])
def test_a_missing_file_is_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises((ValueError, OSError), match=message):
        load_pipeline(folder)


@pytest.mark.parametrize("file, values, message", [
    ("unet/config.json", {"block_out_channels": [48, 64]},
     f"{weights.UNET_WEIGHTS}: does not fit the network: size mismatch for "),
    ("unet/config.json", {"down_block_types": 2}, "'int' object is not iterable"),
    ("unet/config.json", {"cross_attention_dim": 2**62}, ""),  # more bytes than torch can count
    ("unet/config.json", {"temporal": "telepathy"}, "temporal needs one of"),
    ("text_encoder/config.json", {"num_attention_heads": 7}, "multiple of num_attention_heads"),
    ("text_encoder/config.json", {"num_attention_heads": 0}, ""),
    ("scheduler/scheduler_config.json", {"trained_betas": [[]]}, "trained_betas needs tuple"),
    ("sampling.json", {"sampler": "euler"}, "sampler needs .* got 'euler'"),
    ("sampling.json", {"speed": 3}, "speed=3 is not built here"),
])
def test_a_wrong_value_is_one_line_that_names_the_file(folder, file, values, message):
    change(folder / file, **values)
    named = folder / file if "size mismatch" not in message else folder / "unet"
    with pytest.raises(ValueError, match=f"^{named}.*{message}") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_an_inpainting_model_is_refused_by_name(folder):
    unet = dataclasses.replace(fresh_pipeline().unet.config, in_channels=9)
    weights.save_network(folder / "unet", model.UNet(unet))
    with pytest.raises(ValueError, match=r"model: the U-Net needs 9 .* inpainting \(9 channels\)"):
        load_pipeline(folder)


def test_weights_of_whole_numbers_are_refused(folder):
    path = folder / "vae" / weights.UNET_WEIGHTS
    save_safetensors(path, {name: x.int() for name, x in load_safetensors(path).items()})
    with pytest.raises(ValueError, match=f"{path}: does not fit the network"):
        load_pipeline(folder)


def test_ema_weights_are_not_looked_for_in_a_folder(saved):
    with pytest.raises(ValueError, match="model: only single files hold EMA weights"):
        load_pipeline(saved, ema=True)


# The command


def test_the_command_says_what_a_folder_is_and_converts_it(saved, tmp_path, capsys):
    call(command.main, saved, "--convert", tmp_path / "new", "--dtype", "bfloat16")
    told = capsys.readouterr().out
    for fact in ("this project's own", "predicts v_prediction", "block_out_channels=(32, 64)",
                 "latent_channels=4", "hidden_size=64", "bfloat16", "tensors used"):
        assert fact in told
    expected = fresh_pipeline().unet.state_dict()
    assert holds(load_pipeline(tmp_path / "new", dtype=None).unet,
                 {name: tensor.bfloat16() for name, tensor in expected.items()})


@pytest.mark.parametrize("is_file", [False, True])
def test_the_command_overwrites_nothing(saved, tmp_path, is_file):
    (tmp_path / "precious").touch()
    target = tmp_path / "precious" if is_file else tmp_path
    with pytest.raises(ValueError, match="--convert .*: exists already; name a new folder"):
        call(command.main, saved, "--convert", target)
