"""File formats of published weights, read into a flat dict of tensors.

    .safetensors            numbers and a header that says where they are (files.py)
    .ckpt .bin .pt          a pickle: a program that a stack machine runs to rebuild an object
    *.index.json            the file (shard) of each tensor
    folder                  a part of a diffusers model, such as unet/, with one of these inside

A pickle can import and call any Python function, so opening one runs a stranger's program.
`torch.load(weights_only=True)` allows only tensors, text, numbers and containers, and refuses every
other name. Checkpoints of PyTorch Lightning also name a few harmless classes, of callbacks and of
configurations. Here each of these becomes `Inert`, a class that does nothing, and every name that
is not in the list is refused. So a file cannot import or call anything it chooses.
"""

import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PureWindowsPath

import torch

from files import load_safetensors, open_regular, read_json

# The names that diffusers ("diffusion_pytorch_model") and transformers ("model" and, before
# safetensors, "pytorch_model") give to weights. The variant, such as fp16, comes before the last
# suffix: model.fp16.bin, model.safetensors.index.fp16.json; or model.fp16.safetensors.index.json.
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)


class Inert:
    """Replaces a class that a checkpoint names: accepts any arguments, keeps nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class InertDict:
    """Replaces a kind of dict; torch sets items only in a dict or an OrderedDict."""

    def __new__(cls, *_):
        return OrderedDict()


# sd-v1-4.ckpt names ModelCheckpoint (the class itself is the key of that callback's state), numpy's
# scalar and dtype (its best score); fine-tuned models add configurations and paths.
DICTS = ("collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict",
         "lightning.fabric.utilities.data.AttributeDict",
         "lightning_fabric.utilities.data.AttributeDict")
HARMLESS = {
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
    "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "argparse": "Namespace", "typing": "Any", "numpy": "dtype ndarray",
    "builtins": "bool dict float int list str tuple",
}
STUBS = [(InertDict, name) for name in DICTS]
STUBS += [(Inert, f"{module}.{name}") for module in HARMLESS for name in HARMLESS[module].split()]


def read_checkpoint(path):
    """{name: tensor} of a file, an index of shards or a folder that holds one of these.

    The tensors are on the CPU, have the file's dtypes and are mapped into memory, so that the file
    is read as they are used (torch files older than 1.6 are not zips and are read at once). Values
    that are not tensors (epochs, states of callbacks) are left out.

    Raises ValueError naming the file and what is wrong with it, OSError if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def find_weights(folder):
    """The path of the weights in a part's folder, or of the index of their shards.

    Preferred are averaged weights to "non_ema", then safetensors to pickles, then full precision to
    fp16 to other variants, then one file to shards. Raises ValueError if the folder has no weights.
    """
    found = []
    for path in Path(folder).iterdir():
        if match := WEIGHTS_NAME.fullmatch(path.name):
            variant = match["variant"] or match["index_variant"] or ""
            rank = ["", "fp16", variant].index(variant)
            order = variant == "non_ema", match["format"] == "bin", rank, bool(match["index"])
            found.append((order, path))
    if not found:
        raise ValueError(f"{folder}: holds no weights; needs diffusion_pytorch_model, model or "
                         "pytorch_model as .safetensors or .bin, or such a file's .index.json")
    return min(found)[1]


def _read_shards(path):
    """{name: tensor} of all shards of an index, which has to name each tensor's shard."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path}: needs a weight_map from tensors to files, got {shards!r:.60}")
    tensors, found = {}, {}
    for shard in sorted(set(shards.values())):
        # By Windows' rules on every system: they cover every way out of a folder (/, \, C:).
        if PureWindowsPath(shard).name != shard or not (path.parent / shard).is_file():
            raise ValueError(f"{path}: a shard needs to be a file beside the index, got {shard!r}")
        held = _read_file(path.parent / shard)
        tensors, found = tensors | held, found | dict.fromkeys(held, shard)
    for name in sorted(shards | found):
        listed, holder = shards.get(name, "no shard"), found.get(name, "no listed shard")
        if listed != holder:
            raise ValueError(f"{path}: lists {name!r} in {listed}, but {holder} holds it")
    return tensors


def _read_file(path):
    """{name: tensor} of one file. Its first bytes decide the format: suffixes are often wrong."""
    with open_regular(path) as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{path}: a web page, not a checkpoint; download the file itself")
    if start.startswith((b"PK\3\4", b"\x80")) and start[8:9] != b"{":  # a zip or a bare pickle
        return _flatten(path, _unpickle(path))
    # "{" follows the length of a safetensors header. Without it, loading says what is wrong.
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return load_safetensors(path)
    raise ValueError(f"{path}: neither safetensors nor a torch file, it begins with {start[:16]!r}")


def _unpickle(path):
    """The object that torch.save() wrote, without calling anything that the file names."""
    try:
        mapped = _is_mappable(path)
        with torch.serialization.safe_globals(STUBS), open(path, "rb") as file:
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True,
                              mmap=mapped)
    except Exception as error:  # an unpickler may raise anything for a damaged file
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: refuses to load {refused[1]}: weights do not need it, and a "
                             "pickle may run any program; use a .safetensors file, or convert this "
                             "one on an isolated machine") from None
        cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        cause = re.split(r"\. |\n", cause)[0] or type(error).__name__  # the first sentence
        raise ValueError(f"{path}: torch cannot read it ({cause}); is it complete?") from None


def _is_mappable(path):
    """Whether torch.load() can map the file: it misreads a zip whose entries are compressed."""
    # It also refuses a path that ends in .safetensors, but not such a file once it is open.
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _flatten(path, checkpoint):
    """{name: tensor} of an unpickled object, which may be inside one "state_dict" or two."""
    for _ in range(2):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
            checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: needs a dict of tensors, got {type(checkpoint).__name__}")
    tensors = {}
    for name, value in checkpoint.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            # Called on the class: a pickle can give a tensor an attribute named detach.
            tensor = torch.Tensor.detach(value)
            odd = tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided
            if odd or tensor.device.type != "cpu":
                raise ValueError(f"{path}: {name!r} is nested, quantized, sparse or without values")
            tensors[name] = tensor
    if not tensors:
        raise ValueError(f"{path}: needs tensors, got {list(checkpoint)[:5]}")
    return tensors
