"""File formats of published weights, read into a flat dict of tensors.

    .safetensors            numbers and a header that says where they are (safetensors_file.py)
    .ckpt .bin .pt          a pickle: a program that a stack machine runs to rebuild an object
    *.index.json            the file (shard) of each tensor
    folder                  a part of a diffusers model, such as unet/, with one of these inside

A pickle can import and call any Python function, so opening one runs a stranger's program.
`torch.load(weights_only=True)` allows only tensors, text, numbers and containers, and refuses every
other name. Checkpoints of PyTorch Lightning also name a few harmless classes, of callbacks and of
configurations. Each of them becomes `Inert`, a class that does nothing, and every name that is not
in the list is refused. So a file cannot choose what is imported or called.
"""

import re
from collections import OrderedDict
from pathlib import Path

import torch

from checkpoints.errors import DAMAGED, naming
from checkpoints.safetensors_file import load_safetensors
from support.files import read_json

# The names that diffusers ("diffusion_pytorch_model") and transformers ("model" and, before
# safetensors, "pytorch_model") give to weights. The variant, such as fp16, comes before the last
# suffix: model.fp16.bin, model.safetensors.index.fp16.json; or model.fp16.safetensors.index.json.
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
# Names of attention layers in old autoencoders: {old: present}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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


# sd-v1-4.ckpt names ModelCheckpoint (the class is the key of that callback's state), and numpy's
# scalar and dtype (its best score). Fine-tuned models add configurations and paths.
DICTS = ("collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict",
         "lightning.fabric.utilities.data.AttributeDict",
         "lightning_fabric.utilities.data.AttributeDict")
HARMLESS = {  # {packages: names in them that become Inert}
    "pytorch_lightning.callbacks lightning.pytorch.callbacks":
        "model_checkpoint.ModelCheckpoint early_stopping.EarlyStopping",
    "omegaconf": "dictconfig.DictConfig listconfig.ListConfig base.ContainerMetadata base.Metadata "
                 "nodes.AnyNode nodes.StringNode nodes.IntegerNode nodes.FloatNode "
                 "nodes.BooleanNode",
    "numpy.core.multiarray numpy._core.multiarray": "scalar _reconstruct",
    "pathlib pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "argparse": "Namespace", "typing": "Any", "numpy": "dtype ndarray",
    "builtins": "bool dict float int list str tuple", "torch.nn.modules.container": "ParameterDict",
}
STUBS = [(InertDict, name) for name in DICTS]
STUBS += [(Inert, f"{package}.{name}") for packages, names in HARMLESS.items()
          for package in packages.split() for name in names.split()]


def find_weights(folder):
    """The path of the weights in a part's folder, or of the index of their shards.

    Averaged weights are preferred to "non_ema", then safetensors to pickles, then full precision to
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


def read_checkpoint(path):
    """{name: tensor} of a file or of an index of shards, on the CPU with the file's dtypes.

    Values that are not tensors (epochs, states of callbacks) are left out. Raises ValueError naming
    the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix != ".json":
        return _read_file(path)
    with naming(path, "not an index of shards"):
        shards, tensors = read_json(path)["weight_map"], {}
        names = {Path(name).name for name in shards.values()}  # never outside the folder
    for name in sorted(names):
        tensors |= _read_file(path.parent / name)
    if differing := sorted(shards.keys() ^ tensors.keys()):
        raise ValueError(f"{path}: the index and its shards disagree about {len(differing)} "
                         f"tensors: {', '.join(differing[:5])}")
    return tensors


def _read_file(path):
    """{name: tensor} of a pickle or a safetensors file."""
    with open(path, "rb") as file:
        start = file.read(9)
    # The content decides, because suffixes are often wrong. A zip or a bare pickle begins like
    # this; in a safetensors file, "{" follows the eight bytes of the header's length.
    if not start.startswith((b"PK\3\4", b"\x80")) or start[8:] == b"{":
        return load_safetensors(path)
    checkpoint = _unpickle(path)
    for _ in range(2):  # the tensors may be inside one "state_dict" or two
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
            checkpoint = checkpoint["state_dict"]
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    tensors = {name: tensor.detach() for name, tensor in checkpoint.items()
               if isinstance(name, str) and isinstance(tensor, torch.Tensor)}
    # A file without tensors at this level is no model, but its keys tell what it is.
    return tensors or {str(key): torch.empty(0) for key in checkpoint}


def _unpickle(path):
    """The object that torch.save() wrote, without calling anything that the file names."""
    try:
        with torch.serialization.safe_globals(STUBS), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = (f"refuses to load {refused[1]}: weights do not need it, and a pickle may "
                       "run any program; use a .safetensors file")
        else:
            cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
            cause = re.split(r"\. |\n", cause)[0] or type(error).__name__  # the first sentence
            problem = f"torch cannot read it ({cause}); is it complete?"
        raise ValueError(f"{path}: {problem}") from None


def current_names(tensors):
    """({our name: tensor}, how many are ignored) of a part of a diffusers folder, old or new."""
    bare = "embeddings.token_embedding.weight" in tensors  # transformers 5 writes no "text_model."
    prefix, current = "text_model." if bare else "", {}
    for name, tensor in tensors.items():
        if old := re.search(r"attentions\.0\.(query|key|value|proj_attn)\.", name):
            name = name.replace(f".{old[1]}.", f".{OLD_ATTENTION[old[1]]}.")
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # a 1x1 convolution
        if not name.endswith("position_ids"):
            current[prefix + name] = tensor
    return current, len(tensors) - len(current)
