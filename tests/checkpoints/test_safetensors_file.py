"""The safetensors format: bytes of the specification, alignment, damaged files."""

import json
import random
import struct

import pytest
import torch

from checkpoints.safetensors_file import DTYPES, load_safetensors, save_safetensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def write(path, header, data=b""):
    """A safetensors file, byte by byte as the specification says, valid or not."""
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape, *offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_a_file_written_by_hand(path):
    header = {"__metadata__": {"from": "here"}, "b": entry([2], 6, 14),
              "a": entry([3, 1], 0, 6, dtype="I16")}
    write(path, header, b"\x01\x00\x00\x01\xff\xff" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0")
    read = {name: (x.dtype, x.tolist()) for name, x in load_safetensors(path).items()}
    assert read == {"a": (torch.int16, [[1], [256], [-1]]), "b": (torch.float32, [1.0, -2.0])}


def test_writes_the_bytes_of_the_specification(path):
    save_safetensors(path, {"x": torch.tensor([1, 256], dtype=torch.int16)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert header == {"x": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}
    assert raw[8 + length :] == b"\x01\x00\x00\x01"


@pytest.mark.parametrize("length", [1, 37, 64])
def test_tensors_of_multiples_of_64_bytes_begin_at_multiples_of_64(path, length):
    tensors = {"a" * length: torch.arange(3.0), "b": torch.arange(32.0), "c": torch.zeros(0, 3),
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


@pytest.mark.parametrize("x", [
    torch.tensor(2.5), torch.arange(6.0).reshape(2, 3).T, torch.tensor([1.5]).expand(2, 3),
    torch.arange(6)[::2], torch.nn.Parameter(torch.arange(3.0)),
], ids=["a single number", "transposed", "one number repeated", "every second", "a parameter"])
def test_tensors_that_are_not_plain_come_back(path, x):
    save_safetensors(path, {"before": torch.ones(3, dtype=torch.uint8), "x": x})
    loaded = load_safetensors(path)["x"]
    assert torch.equal(loaded, x) and loaded.shape == x.shape


def test_neither_the_file_nor_a_loaded_tensor_changes_with_the_other(path):
    save_safetensors(path, {"x": torch.ones(3)})
    first = load_safetensors(path)["x"]
    load_safetensors(path)["x"].zero_()
    assert torch.equal(load_safetensors(path)["x"], torch.ones(3))
    save_safetensors(path, {"x": torch.zeros(3)})
    assert torch.equal(first, torch.ones(3))


DAMAGED = {
    "empty": lambda p: p.touch(),
    "cut in the length": lambda p: p.write_bytes(b"\x01\x00"),
    "cut in the header": lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b'{"a": '),
    "no object": lambda p: write(p, ["a"]),
    "unknown dtype": lambda p: write(p, {"a": entry([1], 0, 4, dtype="F4")}, bytes(4)),
    "cut in the data": lambda p: write(p, {"a": entry([2], 0, 8)}, bytes(7)),
    "more data than tensors": lambda p: write(p, {"a": entry([2], 0, 8)}, bytes(9)),
    "another size than the shape's": lambda p: write(p, {"a": entry([3], 0, 8)}, bytes(8)),
    "shared bytes": lambda p: write(p, {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a shape too large": lambda p: write(p, {"a": entry([0, 2**63], 0, 0)}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name(path, damage):
    DAMAGED[damage](path)
    with pytest.raises(ValueError, match="weights.safetensors: not a whole safetensors file"):
        load_safetensors(path)


def test_a_git_lfs_pointer_is_refused_as_one(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="weights.safetensors: .* run `git lfs pull`"):
        load_safetensors(path)


def test_a_randomly_damaged_header_gives_a_value_error_or_tensors(path):
    save_safetensors(path, {"a": torch.ones(16), "b": torch.ones(3), "c": torch.zeros(0, 2)})
    raw, dice = path.read_bytes(), random.Random(0)
    words = b'{ [ ] , " - 1e999 null 2.0 {} \xff 999999999999999999999999'.split()
    refused = 0
    for _ in range(300):
        data = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            start = dice.randrange(8 + 200)
            data[start : start + dice.randint(0, 3)] = dice.choice(words)
        path.write_bytes(data)
        try:
            load_safetensors(path)
        except ValueError:
            refused += 1
    assert refused > 250
