"""The safetensors format: bytes of the specification, alignment, damaged files."""

import json
import random
import struct

import pytest
import torch
from checkpoint_files import same

from checkpoints.safetensors_file import DTYPES, load_safetensors, read_metadata, save_safetensors


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
    assert read_metadata(path) == {"from": "here"}


def test_writes_the_bytes_of_the_specification(path):
    save_safetensors(path, {"x": torch.tensor([1, 256], dtype=torch.int16)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert header == {"x": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}
    assert raw[8 + length :] == b"\x01\x00\x00\x01"


def test_every_dtype_comes_back_in_the_order_given(path):
    x = torch.tensor([[0, 1, 5], [7, 100, 127]])
    tensors = {name: x.to(dtype) for name, dtype in DTYPES.items()}
    save_safetensors(path, tensors)
    loaded = load_safetensors(path)
    assert list(loaded) == list(tensors) and same(loaded, tensors)


def test_tensors_that_are_not_plain_come_back(path):
    tensors = {"odd size": torch.ones(3, dtype=torch.uint8), "one number": torch.tensor(2.5),
               "empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).reshape(2, 3).T,
               "repeated": torch.tensor([1.5]).expand(2, 3),
               "parameter": torch.nn.Parameter(torch.arange(3.0))}
    save_safetensors(path, tensors)
    assert same(load_safetensors(path), tensors)


def test_neither_the_file_nor_a_loaded_tensor_changes_with_the_other(path):
    save_safetensors(path, {"x": torch.ones(3)})
    first = load_safetensors(path)["x"]
    load_safetensors(path)["x"].zero_()
    assert torch.equal(load_safetensors(path)["x"], torch.ones(3))
    save_safetensors(path, {"x": torch.zeros(3)})
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize("header, data", [
    ({"a": entry([2], 0, 8)}, bytes(7)),
    ({"a": entry([2], 0, 8)}, bytes(9)),
    ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(16)),
    ({"a": entry([0, 2**63], 0, 0)}, b""),
], ids=["cut in the data", "more data than tensors", "shared bytes", "a shape too large"])
def test_a_header_that_does_not_fit_the_data_is_refused(path, header, data):
    write(path, header, data)
    with pytest.raises(ValueError, match="weights.safetensors: not a whole safetensors file"):
        load_safetensors(path)


def test_a_randomly_damaged_header_gives_a_value_error_or_tensors(path):
    save_safetensors(path, {"a": torch.ones(16), "b": torch.ones(3), "c": torch.zeros(0, 2)})
    raw, dice = path.read_bytes(), random.Random(0)
    words = b'{ [ ] , " - 1e999 null 2.0 {} \xff 999999999999999999999999'.split()
    refused = 0
    for _ in range(100):
        data = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            start = dice.randrange(8 + 200)
            data[start : start + dice.randint(0, 3)] = dice.choice(words)
        path.write_bytes(data)
        try:
            load_safetensors(path)
        except ValueError:
            refused += 1
    assert refused > 80
