"""Files that are whole or absent; safetensors files, valid and damaged."""

import json
import struct

import pytest
import torch

from files import (DTYPES, atomic, load_safetensors, read_json, save_safetensors, write_json,
                   write_text)


def write(path, header, data=b"", length=None):
    """A safetensors file, byte by byte as the specification says, valid or not."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


# The format


def test_reads_a_file_written_by_hand(path):
    header = (
        b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},'
        b'"a":{"dtype":"I16","shape":[3,1],"data_offsets":[0,6]}}'
    )
    data = b"\x01\x00\x00\x01\xff\xff" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    path.write_bytes(bytes([len(header), 0, 0, 0, 0, 0, 0, 0]) + header + data)
    read = {name: (x.dtype, x.tolist()) for name, x in load_safetensors(path).items()}
    assert read == {
        "a": (torch.int16, [[1], [256], [-1]]),
        "b": (torch.float32, [1.0, -2.0]),
    }


def test_writes_the_bytes_of_the_specification(path):
    save_safetensors(path, {"x": torch.tensor([1, 256], dtype=torch.int16)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert header == {"x": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}
    assert raw[8 + length :] == b"\x01\x00\x00\x01"


@pytest.mark.parametrize("length", [1, 8, 37, 64])
def test_the_data_begins_at_a_multiple_of_64_bytes(path, length):
    save_safetensors(path, {"a" * length: torch.ones(1)})
    assert (path.stat().st_size - 4) % 64 == 0


def test_tensors_of_whole_64_bytes_begin_at_multiples_of_64(path):
    tensors = {"a": torch.arange(3.0), "b": torch.arange(32.0), "c": torch.zeros(0),
               "d": torch.arange(5, dtype=torch.uint8), "e": torch.arange(16.0)}
    save_safetensors(path, tensors)
    loaded = load_safetensors(path)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert [loaded[name].data_ptr() % 64 for name in "be"] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back(path, dtype):
    x = torch.tensor([[0, 1, 5], [7, 100, 127]]).to(dtype)
    save_safetensors(path, {"x": x})
    loaded = load_safetensors(path)["x"]
    assert loaded.dtype == dtype and torch.equal(loaded, x)


ODD = {
    "a single number": lambda: torch.tensor(2.5),
    "no number": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "one number repeated": lambda: torch.tensor([1.5]).expand(2, 3),
    "every second": lambda: torch.arange(6)[::2],
    "a parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "infinite": lambda: torch.tensor([float("inf"), -0.0]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_come_back(path, kind):
    x = ODD[kind]()
    save_safetensors(path, {"before": torch.ones(3, dtype=torch.uint8), "x": x, "after": x})
    loaded = load_safetensors(path)
    assert torch.equal(loaded["x"], x) and torch.equal(loaded["after"], x)
    assert loaded["x"].shape == x.shape


def test_metadata_is_no_tensor(path):
    write(path, {"__metadata__": {"from": "here"}, "x": entry()}, EIGHT)
    assert list(load_safetensors(path)) == ["x"]


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(path):
    save_safetensors(path, {"x": torch.ones(3)})
    load_safetensors(path)["x"].zero_()
    assert torch.equal(load_safetensors(path)["x"], torch.ones(3))


def test_a_loaded_tensor_outlives_the_file_it_came_from(path):
    save_safetensors(path, {"x": torch.ones(3)})
    loaded = load_safetensors(path)["x"]
    save_safetensors(path, {"x": torch.zeros(3)})
    assert torch.equal(loaded, torch.ones(3))


# Damaged files


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
DAMAGED = {
    "empty": (lambda p: p.write_bytes(b""), "not a whole"),
    "cut in the length": (lambda p: p.write_bytes(b"\x01\x00"), "not a whole"),
    "cut in the header": (lambda p: write(p, {}, length=999), "not a whole"),
    "length of 2**63": (lambda p: write(p, {}, EIGHT, length=2**63), "not a whole"),
    "git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
                "git lfs pull"),
    "no JSON": (lambda p: write(p, b"{'a'}"), "header is damaged"),
    "no UTF-8": (lambda p: write(p, b'{"\xff": 1}'), "header is damaged"),
    "a list": (lambda p: write(p, []), "header is damaged"),
    "nested too deep": (lambda p: write(p, b"[" * 100_000), "header is damaged"),
    "a name twice": (lambda p: write(p, b'{"a": 1, "a": 1}'), "a name occurs twice"),
    "an entry that is none": (lambda p: write(p, {"a": 3}), "'a' is damaged"),
    "no shape": (lambda p: write(p, {"a": {"dtype": "F32"}}, EIGHT), "'a' is damaged"),
    "unknown dtype": (lambda p: write(p, {"a": entry("F4")}, EIGHT), "'a' is damaged"),
    "dtype that is none": (lambda p: write(p, {"a": entry(["F32"])}, EIGHT), "'a' is damaged"),
    "negative shape": (lambda p: write(p, {"a": entry(shape=[-1, -2])}, EIGHT), "'a' is damaged"),
    "shape of fractions": (lambda p: write(p, {"a": entry(shape=[2.0])}, EIGHT), "'a' is damaged"),
    "shape that is none": (lambda p: write(p, {"a": entry("F64", {})}, EIGHT), "'a' is damaged"),
    "endless shape": (lambda p: write(p, {"a": entry(shape=[0, 2**63], offsets=(0, 0))}, EIGHT),
                      "'a' is damaged"),
    "three offsets": (lambda p: write(p, {"a": entry(offsets=(0, 4, 8))}, EIGHT), "'a' is damaged"),
    "negative offset": (lambda p: write(p, {"a": entry(offsets=(-8, 0))}, EIGHT), "'a' is damaged"),
    "offsets swapped": (lambda p: write(p, {"a": entry(offsets=(8, 0))}, EIGHT), "does not fit"),
    "outside the file": (lambda p: write(p, {"a": entry(offsets=(1, 9))}, EIGHT), "does not fit"),
    "cut in the data": (lambda p: write(p, {"a": entry()}, EIGHT[:-1]), "does not fit"),
    "too few bytes": (lambda p: write(p, {"a": entry(shape=[3])}, EIGHT), "does not fit"),
    "shared bytes": (lambda p: write(p, {"a": entry(), "b": entry("U8", (2,), (7, 9))}, bytes(9)),
                     "share bytes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name(path, damage):
    make, message = DAMAGED[damage]
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_safetensors(path)
    assert str(path) in str(caught.value)


# Atomic writes


@pytest.fixture
def interrupted(path):
    """A file whose second writing breaks off in the middle."""
    path.write_bytes(b"the old text")
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:
        file.write(b"the new te")
        file.flush()
        raise KeyboardInterrupt
    return path


def test_an_interrupted_write_leaves_the_old_file(interrupted):
    assert interrupted.read_bytes() == b"the old text"


def test_an_interrupted_write_leaves_nothing_beside_the_file(interrupted):
    assert list(interrupted.parent.iterdir()) == [interrupted]


def test_a_file_is_not_visible_before_it_is_whole(path):
    path.write_bytes(b"old")
    with atomic(path) as file:
        file.write(b"new")
        file.flush()
        while_writing = path.read_bytes()
    assert (while_writing, path.read_bytes()) == (b"old", b"new")


def test_a_tensor_that_cannot_be_written_leaves_the_old_file(path):
    save_safetensors(path, {"x": torch.ones(3)})
    with pytest.raises(NotImplementedError):  # a shape without memory
        save_safetensors(path, {"x": torch.ones(2), "y": torch.ones(2, device="meta")})
    assert torch.equal(load_safetensors(path)["x"], torch.ones(3))


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


# JSON


def test_json_comes_back(tmp_path):
    value = {"width": [1, 2.5, None], "name": "赤い丸"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("text, message", [
    (b"", "not a JSON file"), (b"{'a': 1}", "not a JSON file"), (b'{"\xff": 1}', "not a JSON file"),
    (b"[1]", "needs a JSON object, got list"), (b"null", "needs a JSON object, got NoneType"),
])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
