"""The safetensors format: a JSON header that says where each tensor's bytes are, then the bytes.

    header length (8 bytes, little-endian) | {name: {"dtype", "shape", "data_offsets"}} | bytes

Unlike a pickle, the file holds nothing to execute, and it can be mapped into memory, so that the
system reads a tensor when it is used. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap

import torch

from checkpoints.errors import naming
from support.files import atomic

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, one tensor at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # aligned, so weights.fill() copies less
    with atomic(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():  # copies nothing if contiguous on the CPU
            flat = tensor.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def load_safetensors(path):
    """{name: tensor} of a safetensors file, mapped; writing to a tensor leaves the file unchanged.

    Raises ValueError unless the tensors follow each other without gaps up to the file's end.
    """
    problem = "not a whole safetensors file; a web page, a git-lfs pointer or half a download?"
    with open(path, "rb") as file, naming(path, problem):
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _tensors(data, 8 + int.from_bytes(data[:8], "little"))


def read_metadata(path):
    """{key: text} that a safetensors file holds beside its tensors; {} for a pickle."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # a pickle's first bytes are a huge number
        header = json.loads(file.read(length)) if length < 2**32 else {}
    return header.get("__metadata__") or {}


def _tensors(data, begin):
    """{name: tensor} of a mapped file whose first tensor begins at byte `begin`."""
    entries = json.loads(data[8:begin])
    entries.pop("__metadata__", None)
    tensors, end, fitting = dict.fromkeys(entries), 0, True
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        dtype, shape = DTYPES[entries[name]["dtype"]], entries[name]["shape"]
        count, start = math.prod(shape), end
        end = start + count * dtype.itemsize
        fitting &= entries[name]["data_offsets"] == [start, end]
        flat = (torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start) if count
                else torch.empty(0, dtype=dtype))
        tensors[name] = flat.reshape(shape)
    if not fitting or begin + end != len(data):
        raise ValueError(f"offsets, shapes and the size of {len(data):,} bytes do not fit")
    return tensors
