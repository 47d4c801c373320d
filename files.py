"""Files that are whole or absent: atomic writes, and the safetensors format in standard library.

`atomic(path)` opens a temporary file beside `path` and renames it when everything is written. A
rename is atomic, so a kill, a full disk or Ctrl-C at any moment leaves the last good file.

A safetensors file is an unsigned 64-bit little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}} and the raw bytes of the tensors. Unlike a
pickle it holds nothing to execute. Its header may still be wrong, so every offset is checked.
Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import itertools
import json
import math
import mmap
import os
import platform
import shutil
import stat
import struct
import types
import typing
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the reference implementation refuses longer headers, too
MAX_TEXT = 100_000_000  # bytes of JSON, merges, captions and prompts
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # a disk may be shared by several
SWEPT = set()  # folders in which this process has looked for what dead ones left


@contextlib.contextmanager
def atomic(path, size=0):
    """Yield a binary file that becomes `path` if the block ends without an error.

    size are the bytes that are expected, if known: a full disk's message says how many are missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
    try:
        with full_disk(path, temporary, size):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk(path, written_to, size=0):
    """Let a full disk's error name the path whose bytes are written to a file, and what is missing.

    Without a size it is at least one byte.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error  # torch's zip writer raises a RuntimeError over the OSError
        while cause and getattr(cause, "errno", None) not in FULL:
            cause = cause.__context__
        if cause is None:
            raise
        written = written_to.stat().st_size if written_to.exists() else 0
        missing = max(1, size - written)
        raise OSError(f"{path}: {cause.strerror} after {written:,} bytes, at least {missing:,} are "
                      "missing; make room and start again, no old file has changed") from None


def _sweep(folder):
    """Remove the temporary files that dead processes of this machine left in a folder."""
    if folder.absolute() in SWEPT or os.name == "nt":  # there os.kill ends a process
        return
    SWEPT.add(folder.absolute())
    for path in folder.glob(f".*.{HOST}.*.tmp"):
        number = path.suffixes[-2][1:]
        if number.isdecimal():
            try:
                os.kill(int(number), 0)  # signal 0 only asks whether the process exists
            except (ProcessLookupError, OverflowError):
                path.unlink(missing_ok=True)
            except PermissionError:  # it does, and is of another user
                pass


def require_room(path, needed=0, remedy="make room"):
    """Raise ValueError if a path cannot be written, or its disk has less than `needed` bytes."""
    path = Path(path)
    parents = path.absolute().parents
    folder = path if path.is_dir() else next(parent for parent in parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: needs a folder to write into, {folder} is none; name another")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{path}: needs {needed:,.0f} bytes of disk, got {free:,.0f}; {remedy}")


def open_regular(path, limit=None):
    """Open a regular file for reading bytes. Raises ValueError for any other, or one > limit."""
    # A FIFO without a writer would block without O_NONBLOCK, which regular files ignore.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or (limit is not None and status.st_size > limit):
        file.close()
        what = ("a regular file, got a folder, device or pipe" if not stat.S_ISREG(status.st_mode)
                else f"at most {limit:,} bytes, got {status.st_size:,}")
        raise ValueError(f"{path}: needs {what}; name another file")
    return file


def read_bytes(path):
    """The bytes of a text file, JSON, merges, captions or prompts. Errors as in open_regular."""
    with open_regular(path, MAX_TEXT) as file:
        return file.read()


def write_text(path, text):
    """Write a UTF-8 text file atomically."""
    with atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path, value):
    """Write a JSON file atomically, indented for readers."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The JSON object in a file. Raises ValueError naming the file if it holds anything else."""
    data = read_bytes(path)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: needs a JSON object, got {type(value).__name__}")
    return value


def from_json(cls, values, where, most=2**63 - 1):
    """A dataclass from the values of a JSON object. Lists become tuples.

    Raises ValueError naming the file `where` and the field, unless each value has the type of its
    field, is one of its choices, and a number is finite and at most `most`.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in chosen.items():
        if name not in fields:
            raise ValueError(f"{where}: {name} is unknown; is the file damaged, or of another "
                             "version?")
        choices = fields[name].metadata.get("choices")
        if not _has_type(value, hints[name], most):
            need = f"{inspect.formatannotation(hints[name])}, numbers of at most {most:,}"
            raise ValueError(f"{where}: {name} needs {need}, got {values[name]!r:.60}")
        if choices and value is not None and value not in choices:
            raise ValueError(f"{where}: {name} needs one of {choices}, got {value!r:.60}")
    try:
        return cls(**chosen)
    except (TypeError, ValueError) as error:  # a TypeError if a field is missing
        raise ValueError(f"{where}: {error}") from None


def _has_type(value, kind, most):
    """Whether a value is of a type as fields are annotated with: `tuple[int, ...] | None`."""
    if isinstance(kind, types.UnionType):
        return any(_has_type(value, one, most) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_has_type(x, item, most) for x in value)
    if kind in (int, float):  # written as <=, so that NaN fails
        known = type(value) is int or type(value) is kind
        return known and -most <= value <= most
    return type(value) is kind


def save_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, atomically and one tensor at a time.

    CPU kernels sum in an order that depends on where a tensor begins, and PyTorch's own memory
    begins at multiples of 64 bytes. So the header is padded to such a multiple, and tensors whose
    size is not one come last. The header lists the tensors in the order given.
    """
    order, end = sorted(tensors, key=lambda name: tensors[name].nbytes % 64 != 0), 0  # stable
    header = {"__metadata__": {"format": "pt"}} | dict.fromkeys(tensors)
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with atomic(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in map(tensors.get, order):
            file.write(raw_bytes(tensor))


def raw_bytes(tensor):
    """The bytes of a tensor's numbers in row-major order, of a CPU tensor without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def load_safetensors(path):
    """Read a safetensors file: {name: tensor}, memory-mapped, so that bytes are read when used.

    Raises ValueError naming the file and what is wrong with it: truncated, a git-lfs pointer, a
    header that is not JSON, an unknown dtype, bytes outside the file or shared by two tensors.
    """
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        if start == b"version ":
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: not a whole safetensors file (the header does not fit)")
        entries = _parse_header(path, file.read(length), size - 8 - length)
        # A private mapping: a tensor's pages are shared with the file until they are written to.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if entries else b""
    tensors = {}
    for name, (dtype, shape, begin) in entries.items():
        count, offset = math.prod(shape), 8 + length + begin
        flat = (torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count
                else torch.empty(0, dtype=dtype))
        tensors[name] = flat.reshape(shape)
    return tensors


def _parse_header(path, header, data_size):
    """The checked header: {name: (dtype, shape, begin)}, begin in bytes after the header."""
    def unique(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged ({error})") from None
    entries.pop("__metadata__", None)
    parsed, spans = {}, []
    for name, entry in entries.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            whole = all(type(n) is int and 0 <= n < 2**63 for n in [*shape, begin, end])
            if not whole or not isinstance(shape, list):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: the header's {name!r} is damaged or has an unknown "
                             "dtype") from None
        if end - begin != math.prod(shape) * dtype.itemsize or end > data_size:
            raise ValueError(f"{path}: {name!r} does not fit into the file (truncated download?)")
        parsed[name] = dtype, shape, begin
        spans.append((begin, end))
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(sorted(spans))):
        raise ValueError(f"{path}: two tensors share bytes; the header is damaged")
    return parsed
