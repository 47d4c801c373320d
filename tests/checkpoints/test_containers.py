"""File formats of weights: every valid form is read, and any other file is refused in one line."""

import json

import pytest
import torch
from checkpoint_files import WEIGHTS, A, holds_weights, save

from checkpoints.containers import find_weights, read_checkpoint
from checkpoints.safetensors_file import save_safetensors


def test_the_format_is_known_by_the_content_not_by_the_suffix(tmp_path):
    for name in ("x.safetensors", "x.ckpt"):
        save_safetensors(tmp_path / name, WEIGHTS)
        assert holds_weights(tmp_path / name)
        assert holds_weights(save(tmp_path / name))
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=False)  # before 1.6
        assert holds_weights(tmp_path / name)


def test_a_header_of_128_bytes_is_not_taken_for_a_pickle(tmp_path):
    """Both begin with the byte 0x80."""
    header = b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'.ljust(128)
    (tmp_path / "x.ckpt").write_bytes(b"\x80" + bytes(7) + header + b"\5")
    assert read_checkpoint(tmp_path / "x.ckpt")["x"].tolist() == [5]


@pytest.mark.parametrize("wrap", [
    lambda x: {"state_dict": {"state_dict": x}, "epoch": 3, "global_step": torch.tensor(7)},
    lambda x: {**{name: torch.nn.Parameter(y) for name, y in x.items()}, "epoch": 3, 5: A},
], ids=["inside state_dict", "beside others"])
def test_only_the_tensors_of_a_checkpoint_are_read(tmp_path, wrap):
    path = save(tmp_path / "x.ckpt", wrap(WEIGHTS))
    assert holds_weights(path)
    assert not any(tensor.requires_grad for tensor in read_checkpoint(path).values())


@pytest.mark.parametrize("data, message", [
    (b"\n<!DOCTYPE html><html>", "not a whole safetensors file; a web page"),
    (b"PK\3\4 and no more", r"torch cannot read it \(.*\); is it complete"),
    (b"\x80\x02X\1", ".*is it complete"),
], ids=["a web page", "half a zip", "half a pickle"])
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(tmp_path, data, message):
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.ckpt: {message}") as caught:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


def sharded(folder, weight_map, suffix=".safetensors"):
    """The index of shards a and b, which hold a tensor each."""
    for name, tensor in WEIGHTS.items():
        (save if suffix == ".bin" else save_safetensors)(folder / (name + suffix), {name: tensor})
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_reads_shards_by_their_index(tmp_path):
    for suffix in (".safetensors", ".bin"):
        assert holds_weights(sharded(tmp_path, {"a": "a" + suffix, "b": "b" + suffix}, suffix))


def test_a_shard_is_never_read_from_outside_the_folder(tmp_path):
    save(tmp_path / "a.safetensors", {"a": A + 1})
    (tmp_path / "part").mkdir()
    names = {"a": "../a.safetensors", "b": "/etc/b.safetensors"}
    assert holds_weights(sharded(tmp_path / "part", names))


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "a.safetensors", "c": "a.safetensors"}, "disagree about 1 tensors: c"),
    (["a.safetensors"], "not an index of shards"),
    ({"a": "model.safetensors.index.json"}, "not a whole safetensors file"),
])
def test_a_wrong_index_is_refused(tmp_path, weight_map, message):
    with pytest.raises(ValueError, match="model.safetensors.index.json: .*" + message):
        read_checkpoint(sharded(tmp_path, weight_map))


IN_ORDER = [
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.non_ema.bin",
]


def test_the_best_file_of_a_folder_is_chosen(tmp_path):
    for name in reversed(IN_ORDER):
        (tmp_path / name).touch()
        assert find_weights(tmp_path).name == name


def test_the_names_of_transformers_are_known_and_others_are_not(tmp_path):
    for other in ("config.json", "model-00001-of-00002.safetensors", "flax_model.msgpack",
                  "model.fp16-00001-of-00002.safetensors", "openvino_model.bin"):
        (tmp_path / other).touch()
    with pytest.raises(ValueError, match="holds no weights; needs diffusion_pytorch"):
        find_weights(tmp_path)
    for name in ("pytorch_model.fp16.bin", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert find_weights(tmp_path).name == name  # each is better than those before
