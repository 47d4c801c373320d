"""A model's folder: what was saved comes back, and what does not fit is refused by name."""

import dataclasses
import shutil

import pytest
import torch
from conftest import call

import model
import vae
import weights
from diffusion import Diffusion
from files import load_safetensors, read_json, save_safetensors, write_json
from pipeline import Pipeline, Sampling
from text import CLIPTextModel, CLIPTokenizer, TextConfig
from weights import load_pipeline, save_pipeline


def fresh_pipeline():
    """An untrained model whose every setting differs from its default."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(["a red circle", "a blue square"], 20, max_length=9)
    config = TextConfig(tokenizer.vocab_size, 64, 96, 1, 2, 9, "gelu", 1e-4)
    unet = dataclasses.replace(model.PRESETS["tiny"], temporal="none", shift_before="conv2")
    autoencoder = dataclasses.replace(vae.PRESETS["tiny"], scaling_factor=0.7)
    return Pipeline(
        model.UNet(unet), vae.AutoencoderKL(autoencoder), CLIPTextModel(config), tokenizer,
        Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True,
                  timestep_spacing="trailing"),
        Sampling(5, 40, 12.0, 7, 3.0, "ddpm", 0.5, 0.25),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline(fresh_pipeline(), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a model's folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def change(path, **values):
    """Change a JSON file; None removes a key."""
    new = read_json(path) | values
    write_json(path, {name: value for name, value in new.items() if value is not None})


def refuse(folder, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


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
    weights.save_vae(tmp_path, vae.AutoencoderKL(config))
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


# The command


def test_the_command_says_what_a_folder_is(saved, capsys):
    call(weights.main, saved)
    told = capsys.readouterr().out
    for fact in ("family       this project's own", "prediction   v_prediction", "32, 64 channels",
                 "1/4 of the size", "1 layers of width 64", "float32", "tensors used"):  # fmt: skip
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


# What is refused


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refuse(folder, f"model: has no {part}/; train one with")


def test_a_missing_folder_is_named(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere: is no folder with a model")


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "text_encoder/config.json"]
)
def test_a_part_half_written_is_named(folder, file):
    part, name = file.split("/")
    (folder / file).unlink()
    refuse(folder, f"{part}: has no {name}; is the folder half written")


@pytest.mark.parametrize("file", [
    "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
])  # fmt: skip
def test_a_missing_file_of_the_other_parts_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(OSError, match=file):
        load_pipeline(folder)


def test_a_part_without_weights_is_named(folder):
    (folder / "vae" / weights.UNET_WEIGHTS).unlink()
    refuse(folder, "vae: holds no weights")


def test_a_model_without_our_settings_draws_a_picture_of_its_size(folder):
    (folder / "sampling.json").unlink()
    change(folder / "unet/config.json", sample_size=10)
    assert load_pipeline(folder).sampling == Sampling(num_frames=1, image_size=40)


def test_ema_weights_are_not_looked_for_in_a_folder(saved):
    with pytest.raises(ValueError, match="model: a folder holds one set of weights"):
        load_pipeline(saved, ema=True)


def test_an_inpainting_model_is_refused_by_name(folder):
    unet = dataclasses.replace(fresh_pipeline().unet.config, in_channels=9)
    weights.save_unet(folder / "unet", model.UNet(unet))
    refuse(folder, "model: holds an inpainting model: its U-Net takes 9 channels")


@pytest.mark.parametrize("file", [
    "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
    "sampling.json", "tokenizer/vocab.json",
])  # fmt: skip
@pytest.mark.parametrize("damage", ["", "{", "[]"], ids=["empty", "cut", "a list"])
def test_a_file_that_is_no_json_object_is_named(folder, file, damage):
    (folder / file).write_text(damage)
    refuse(folder, f"{file}: (not a JSON file|needs a JSON object)")


def test_weights_of_another_width_are_refused_by_the_names_of_tensors(folder):
    change(folder / "unet/config.json", block_out_channels=[48, 64])
    refuse(folder, r"does not fit its config.json \(\d+ of another shape: class_embedding")


def test_weights_that_are_missing_are_named(folder):
    path = folder / "vae" / weights.UNET_WEIGHTS
    tensors = load_safetensors(path)
    del tensors["decoder.conv_in.bias"]
    save_safetensors(path, tensors)
    refuse(folder, r"does not fit its config.json \(1 missing: decoder.conv_in.bias\)")


def test_weights_too_many_are_named(folder):
    path = folder / "text_encoder" / weights.TEXT_WEIGHTS
    save_safetensors(path, load_safetensors(path) | {"text_projection": torch.ones(1)})
    refuse(folder, r"does not fit its config.json \(1 unexpected: text_projection\)")


def test_truncated_weights_are_named(folder):
    path = folder / "unet" / weights.UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    refuse(folder, "unet/.*safetensors: .* does not fit into the file")


@pytest.mark.parametrize("part, values, message", [
    ("unet", {"act_fn": "gelu"}, "act_fn='gelu' is not built here"),
    ("unet", {"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel'"),
    ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos=False is not built here"),
    ("unet", {"mid_block_type": False}, "mid_block_type=False is not built here"),
    ("unet", {"freq_shift": 1}, "freq_shift=1 is not built here"),
    ("unet", {"norm_eps": 1e-6}, "norm_eps=1e-06 is not built here"),
    ("unet", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block=.* is not"),
    ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time' is not built"),
    ("unet", {"dual_cross_attention": True}, "dual_cross_attention=True is not built here"),
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type needs one of"),
    ("unet", {"projection_class_embeddings_input_dim": 7}, "embeddings_input_dim=7 is not built"),
    ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D.* is not"),
    ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types=.* is not built here"),
    ("unet", {"attention_head_dim": 5}, "unet/config.json: block_out_channels needs .* heads 5"),
    ("unet", {"temporal": "telepathy"}, "temporal needs one of"),
    ("unet", {"layers_per_block": [1, 2]}, "unet/config.json: "),
    ("unet", {"block_out_channels": "wide"}, "unet/config.json: "),
    ("unet", {"in_channels": "four"}, "unet/config.json: describes no network"),
    ("vae", {"act_fn": "relu"}, "act_fn='relu' is not built here"),
    ("vae", {"_class_name": "VQModel"}, "_class_name='VQModel' is not built here"),
    ("vae", {"use_quant_conv": False}, "use_quant_conv=False is not built here"),
    ("vae", {"shift_factor": 0.06}, "shift_factor=0.06 is not built here"),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "AttnDownEncoderBlock2D"),
    ("vae", {"norm_num_groups": 5}, "vae/config.json: block_out_channels needs multiples"),
    ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, "WithProjection.* is not"),
    ("text_encoder", {"model_type": "t5"}, "model_type='t5' is not built here"),
    ("text_encoder", {"hidden_act": "relu"}, "hidden_act needs one of"),
    ("text_encoder", {"hidden_size": None}, "text_encoder/config.json: .*hidden_size"),
    ("text_encoder", {"num_attention_heads": 7}, "num_attention_heads needs to divide"),
    ("text_encoder", {"num_hidden_layers": "two"}, "text_encoder/config.json: "),
])  # fmt: skip
def test_an_architecture_that_is_not_built_here_is_refused_by_name(folder, part, values, message):
    change(folder / part / "config.json", **values)
    refuse(folder, message)


@pytest.mark.parametrize("values, message", [
    ({"clip_sample": True}, "clip_sample and thresholding are not built here"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatch.* is not built"),
    ({"beta_schedule": "sigmoid"}, "scheduler_config.json: beta_schedule needs one of"),
    ({"prediction_type": "sample"}, "scheduler_config.json: prediction_type needs one of"),
    ({"num_train_timesteps": "many"}, "scheduler_config.json: "),
])  # fmt: skip
def test_a_schedule_that_is_not_built_here_is_refused_by_name(folder, values, message):
    change(folder / "scheduler/scheduler_config.json", **values)
    refuse(folder, message)


@pytest.mark.parametrize("values, message", [
    ({"speed": 3}, "sampling.json: speed=3 is not built here"),
    ({"num_frames": 0}, "sampling.json: num_frames needs >= 1, got 0"),
    ({"num_frames": "8"}, "sampling.json: "),
])  # fmt: skip
def test_settings_that_are_impossible_are_refused_by_name(folder, values, message):
    change(folder / "sampling.json", **values)
    refuse(folder, message)
