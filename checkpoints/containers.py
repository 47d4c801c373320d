"""The containers that published weights come in, read into a flat dict of tensors.

    .safetensors            numbers and a header that says where they are (files.py)
    .ckpt .bin .pt          a pickle: a program that a stack machine runs to rebuild an object
    *.index.json            a table from names to the files, shards, that hold them
    folder                  a part of a diffusers model, such as unet/, with one of these inside

A pickle can name any function that Python can import and call it, so opening one from a stranger is
running his program. `torch.load(weights_only=True)` runs it on a machine that knows tensors, text,
numbers and containers, and stops at every other name. Checkpoints of PyTorch Lightning hold a few
harmless ones beside their weights, the classes of callbacks and of configurations. Here each of
those means `Inert`, a class that takes everything and does nothing, and any name that is not in the
list is refused. So nothing of the file's choice is imported, let alone called.
"""

import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PureWindowsPath

import torch

from files import load_safetensors, read_json

# A part's weights as diffusers ("diffusion_pytorch_model") and transformers ("model" and, before
# safetensors, "pytorch_model") name them. A variant stands before the last suffix: model.fp16.bin,
# model.safetensors.index.fp16.json; some wrote model.fp16.safetensors.index.json.
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)


class Inert:
    """Stands in for a class that a checkpoint names: takes everything, keeps nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class InertDict:
    """Likewise for a kind of dict; torch fills in items of a plain or an ordered one only."""

    def __new__(cls, *_):
        return OrderedDict()


# sd-v1-4.ckpt names ModelCheckpoint (the class itself is the key of that callback's state), numpy's
# scalar and dtype (its best score); fine-tuned models add configurations and paths.
DICTS = (
    "collections.defaultdict", "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
HARMLESS = {
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "argparse": "Namespace",
    "typing": "Any",
    "builtins": "bool dict float int list str tuple",
}
STUBS = [(InertDict, name) for name in DICTS]
STUBS += [(Inert, f"{module}.{name}") for module in HARMLESS for name in HARMLESS[module].split()]


def read_checkpoint(path):
    """{name: tensor} of a file, an index of shards or a folder that holds one of these.

    The tensors are on the CPU, of the file's dtypes and mapped into memory, so that a part of the
    file is read when it is used (but for torch files older than 1.6, which are no zip). What is no
    tensor (epochs, the states of callbacks) is left out.

    Raises:
        ValueError: naming the file and what is wrong with it, or the name that it may not use.
        OSError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def find_weights(folder):
    """The path of the file that holds the weights in a part's folder, or of the index of shards.

    Of several: weights averaged over training before those that are not ("non_ema"), safetensors
    before pickles, full precision before fp16 before other variants, one file before shards.

    Raises ValueError if there is none.
    """
    found = []
    for path in Path(folder).iterdir():
        if match := WEIGHTS_NAME.fullmatch(path.name):
            variant = match["variant"] or match["index_variant"] or ""
            rank = ["", "fp16", variant].index(variant)
            order = (variant == "non_ema", match["format"] == "bin", rank, bool(match["index"]))
            found.append((order, path))
    if not found:
        raise ValueError(
            f"{folder}: holds no weights; needs diffusion_pytorch_model, model or pytorch_model "
            f"as .safetensors or .bin, or such a file's .index.json"
        )
    return min(found)[1]


def _read_shards(path):
    """{name: tensor} of all shards of an index, which has to tell each tensor's shard truly."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path}: needs a weight_map from tensors to files, got {shards!r:.60}")
    tensors = {}
    for shard in sorted(set(shards.values())):
        # Windows' rules, on every system, since they know more ways out of a folder: / \ C:
        if PureWindowsPath(shard).name != shard:
            raise ValueError(f"{path}: a shard needs to be a file beside the index, got {shard!r}")
        if not (path.parent / shard).is_file():
            raise ValueError(f"{path}: the shard {shard} is missing")
        for name, tensor in _read_file(path.parent / shard).items():
            if shards.get(name) != shard:
                raise ValueError(f"{path}: {shard} holds {name!r}, which the index does not say")
            tensors[name] = tensor
    for name, shard in shards.items():
        if name not in tensors:
            raise ValueError(f"{path}: {name!r} is not in {shard}, as the index says")
    return tensors


def _read_file(path):
    """{name: tensor} of one file, whose first bytes say what it is; names of files often lie."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{path}: a web page, not a checkpoint; download the file itself")
    if start[8:9] == b"{":  # after the length of the header
        return load_safetensors(path)
    if start.startswith((b"PK\3\4", b"\x80")):  # a zip with a pickle in it, or a pickle
        return _flatten(path, _unpickle(path, zipped=start.startswith(b"PK")))
    if path.suffix == ".safetensors":
        return load_safetensors(path)  # says what is wrong with it
    raise ValueError(f"{path}: neither safetensors nor a torch file, it begins with {start[:16]!r}")


def _unpickle(path, zipped):
    """What torch.save() wrote, without calling anything that the file names."""
    try:
        mapped = zipped and _is_mappable(path)
        with torch.serialization.safe_globals(STUBS), open(path, "rb") as file:
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # given garbage, an unpickler may raise anything
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = (
                f"refuses to load {refused[1]}: it is no part of weights, and a pickle may run any "
                f"program; get a .safetensors file, or convert it on a machine that may be lost"
            )
        else:
            told = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
            told = re.split(r"\. |\n", told)[0] or type(error).__name__  # a first sentence
            reason = f"torch cannot read it ({told}); is it complete?"
        raise ValueError(f"{path}: {reason}") from None


def _is_mappable(path):
    """Whether a zip's tensors are stored as they are. Raises if it holds none."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise ValueError("a zip without data.pkl")
    # torch.load() takes an open file under the name *.safetensors, but no path.
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return stored and path.suffix != ".safetensors"


def _flatten(path, checkpoint):
    """The tensors of an unpickled object, in a "state_dict" or not, or even in two."""
    for _ in range(2):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
            checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: needs a dict of tensors, got {type(checkpoint).__name__}")
    tensors = {}
    for name, value in checkpoint.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            # By the class, since a pickle can give a tensor attributes of any name.
            tensor = torch.Tensor.detach(value)
            odd = tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided
            if odd or tensor.device.type != "cpu":
                raise ValueError(f"{path}: {name!r} is nested, quantized, sparse or without values")
            tensors[name] = tensor
    if not tensors:
        names = [name for name in checkpoint if isinstance(name, str)]
        raise ValueError(f"{path}: holds no tensors, but {names[:5]}")
    return tensors
