"""File formats of weights: every valid form is read, damaged and hostile ones are refused."""

import json
import os
import struct
import sys
import zipfile

import pytest
import torch
from checkpoint_files import WEIGHTS, A, B, holds_weights, save

from checkpoints.containers import find_weights, read_checkpoint
from files import save_safetensors

# Forms


def test_reads_safetensors(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", WEIGHTS)
    assert holds_weights(tmp_path / "x.safetensors")


def test_reads_a_torch_file(tmp_path):
    assert holds_weights(save(tmp_path / "x.ckpt"))


def test_reads_a_torch_file_older_than_1_6(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert holds_weights(tmp_path / "x.bin")


def test_reads_a_torch_file_that_was_compressed(tmp_path):
    with (
        zipfile.ZipFile(save(tmp_path / "x.ckpt")) as stored,
        zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    assert holds_weights(tmp_path / "y.ckpt")


def test_the_format_is_known_by_the_content_not_by_the_suffix(tmp_path):
    save_safetensors(tmp_path / "x.ckpt", WEIGHTS)
    assert holds_weights(tmp_path / "x.ckpt")
    assert holds_weights(save(tmp_path / "y.safetensors"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"state_dict": x, "epoch": 3, "global_step": torch.tensor(7)},
        lambda x: {"state_dict": {"state_dict": x}},
        lambda x: {**x, "epoch": 3, "names": ["a"], 5: A},
        lambda x: {"state_dict": {name: torch.nn.Parameter(y) for name, y in x.items()}},
    ],
    ids=["Lightning", "twice", "bare, with others", "parameters"],
)
def test_only_the_tensors_of_a_checkpoint_are_read(tmp_path, wrap):
    assert holds_weights(save(tmp_path / "x.ckpt", wrap(WEIGHTS)))


def test_tensors_need_no_gradient(tmp_path):
    path = save(tmp_path / "x.ckpt", {"a": torch.nn.Parameter(A)})
    assert not read_checkpoint(path)["a"].requires_grad


def test_a_dict_that_holds_itself_ends(tmp_path):
    endless = dict(WEIGHTS)
    endless["state_dict"] = endless
    assert holds_weights(save(tmp_path / "x.ckpt", endless))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_reading_maps_the_file_instead_of_copying_it(tmp_path, name):
    large = {"a": torch.ones(8 * 2**20)}  # 32 MiB
    (save if name == "x.ckpt" else save_safetensors)(tmp_path / name, large)
    before = resident()
    read = read_checkpoint(tmp_path / name)
    assert resident() - before < 8 * 2**20
    assert read["a"][-1] == 1


def test_writing_into_a_read_tensor_leaves_the_file_alone(tmp_path):
    path = save(tmp_path / "x.ckpt")
    read_checkpoint(path)["a"].zero_()
    assert holds_weights(path)


# Files that are not checkpoints


def first_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def zipped(path, name):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"text")


def without_record(path):
    with zipfile.ZipFile(save(path.with_name("whole"))) as whole, zipfile.ZipFile(path, "w") as cut:
        for name in whole.namelist():
            if not name.endswith("data/0"):
                cut.writestr(name, whole.read(name))


def legacy(path):
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    first_half(path)


def header(shape, end):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


REFUSED = {
    "empty": (lambda p: p.touch(), "neither .* begins with b''"),
    "git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
                "git lfs pull"),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), "a web page"),
    "text": (lambda p: p.write_text("Not Found"), r"neither .* begins with b'Not Found'"),
    "zeros": (lambda p: p.write_bytes(bytes(99)), "neither"),
    "half a zip": (lambda p: first_half(save(p)), "is it complete"),
    "half a legacy file": (legacy, "is it complete"),
    "two bytes of a pickle": (lambda p: p.write_bytes(b"\x80\x02"), "is it complete"),
    "half a safetensors": (lambda p: (save_safetensors(p, WEIGHTS), first_half(p)), "not a whole"),
    "other zip": (lambda p: zipped(p, "a/readme.txt"), "torch cannot read it"),
    "garbage in a zip": (lambda p: zipped(p, "a/data.pkl"), "torch cannot read it"),
    "no record": (without_record, "failed locating file data/0"),
    "no dict": (lambda p: save(p, [A]), "needs a dict of tensors, got list"),
    "no tensor": (lambda p: save(p, {"epoch": 1, "state_dict": 2}), "needs tensors, got .*'epoch'"),
    "empty dict": (lambda p: save(p, {"state_dict": {}}), "needs tensors"),
    "sparse": (lambda p: save(p, {"a": A.to_sparse()}), "'a' is nested, quantized, sparse"),
    "meta": (lambda p: save(p, {"a": A.to("meta")}), "'a' is .* without values"),
    "header outside": (lambda p: p.write_bytes(header([2], 800)), "does not fit"),
    "product past 2**64": (lambda p: p.write_bytes(header([2**32, 2**32], 0)), "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(tmp_path, kind):
    make, message = REFUSED[kind]
    make(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "x.ckpt")
    assert str(caught.value).startswith(str(tmp_path / "x.ckpt: "))
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_a_short_file_named_safetensors_is_refused_as_one(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_checkpoint(tmp_path / "x.safetensors")


# Shards


def sharded(folder, weight_map, name="model.safetensors.index.json"):
    save_safetensors(folder / "model-00001-of-00002.safetensors", {"a": A})
    save_safetensors(folder / "model-00002-of-00002.safetensors", {"b": B})
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_reads_shards_by_their_index(tmp_path):
    assert holds_weights(sharded(tmp_path, {"a": FIRST, "b": SECOND}))


def test_reads_a_folder_of_shards(tmp_path):
    sharded(tmp_path, {"a": FIRST, "b": SECOND})
    assert holds_weights(tmp_path)


def test_reads_shards_of_pickles(tmp_path):
    for name in WEIGHTS:
        save(tmp_path / f"{name}.bin", {name: WEIGHTS[name]})
    assert holds_weights(sharded(tmp_path, {"a": "a.bin", "b": "b.bin"}))


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": FIRST, "b": "model-3.safetensors"}, "beside the index, got 'model-3.safetensors'"),
        ({"a": FIRST, "b": FIRST}, "lists 'b' in model-00001.*, but no listed shard holds it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "lists 'c' in model-00002.*, but no listed shard"),
        ({"a": FIRST}, None),
        ({"b": SECOND, "c": FIRST}, "lists 'a' in no shard, but model-00001.* holds it"),
        ({"a": "../outside.bin"}, "beside the index, got '../outside.bin'"),
        ({"a": "/etc/passwd"}, "beside the index"),
        ({"a": "..\\outside.bin"}, "beside the index"),
        ({"a": "C:outside.bin"}, "beside the index"),
        ({"a": ".."}, "beside the index"),
        ({"a": "."}, "beside the index"),
        ({"a": ""}, "beside the index"),
        ({"a": "nul\0"}, "beside the index"),
        ({"a": 5}, "needs a weight_map"),
        ([FIRST], "needs a weight_map"),
        (None, "needs a weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, weight_map, message):
    (tmp_path / "part").mkdir()
    save(tmp_path / "outside.bin", {"a": A})
    path = sharded(tmp_path / "part", weight_map)
    if message is None:  # an index may list less than the folder holds
        assert list(read_checkpoint(path)) == ["a"]
        return
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))


def test_an_index_that_is_its_own_shard_ends(tmp_path):
    with pytest.raises(ValueError, match="neither safetensors"):
        read_checkpoint(sharded(tmp_path, {"a": "model.safetensors.index.json"}))


# Which file of a folder

IN_ORDER = [
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.non_ema.bin",
]


@pytest.mark.parametrize("missing", range(len(IN_ORDER)))
def test_the_best_file_of_a_folder_is_chosen(tmp_path, missing):
    for name in IN_ORDER[missing:]:
        (tmp_path / name).touch()
    assert find_weights(tmp_path).name == IN_ORDER[missing]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors.index.json",
     "model.safetensors.index.fp16.json", "pytorch_model.fp16.bin"],
)
def test_the_names_of_transformers_are_known(tmp_path, name):
    for other in ("config.json", FIRST, "model.fp16-00001-of-00002.safetensors",
                  "model-00001-of-00002.fp16.safetensors", "flax_model.msgpack",
                  "openvino_model.bin", "pytorch_lora_weights.safetensors"):
        (tmp_path / other).touch()
    (tmp_path / name).touch()
    assert find_weights(tmp_path).name == name


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="holds no weights; needs diffusion_pytorch") as caught:
        read_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
