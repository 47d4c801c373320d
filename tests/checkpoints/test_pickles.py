"""Pickles: classes that Lightning leaves in them are skipped, and calls are refused."""

import contextlib
import os
import pickle
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from checkpoint_files import WEIGHTS, A, holds_weights, save

from checkpoints.containers import read_checkpoint
from checkpoints.weights import load_pipeline

# Classes that Lightning leaves in a checkpoint


@contextlib.contextmanager
def named(full_name, base=object):
    """A new class that pickle writes under a library's name, without that library."""
    module, _, name = full_name.rpartition(".")
    parts = module.split(".")
    with pytest.MonkeyPatch.context() as patch:
        for prefix in (".".join(parts[: end + 1]) for end in range(len(parts))):
            if prefix not in sys.modules:
                patch.setitem(sys.modules, prefix, types.ModuleType(prefix))
        cls = type(name, (base,), {"__module__": module})
        patch.setattr(sys.modules[module], name, cls, raising=False)
        yield cls


MODEL_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def test_reads_what_lightning_1_4_wrote(tmp_path):
    with named(MODEL_CHECKPOINT) as cls:
        state = {"monitor": "val/loss", "best_model_score": np.float64(0.25), "best": tmp_path}
        save(tmp_path / "x.ckpt", {
            "state_dict": OrderedDict(WEIGHTS), "callbacks": {cls: state}, "global_step": 470000,
            "optimizer_states": [{"exp_avg": A}], "scores": np.ones(3),
            "by_name": defaultdict(dict, x=1),
        })
    assert MODEL_CHECKPOINT.rpartition(".")[0] not in sys.modules
    assert holds_weights(tmp_path / "x.ckpt")


def test_reads_a_configuration_beside_the_weights(tmp_path):
    with (
        named("omegaconf.dictconfig.DictConfig") as config,
        named("omegaconf.nodes.AnyNode") as node,
        named("pytorch_lightning.utilities.parsing.AttributeDict", dict) as attributes,
    ):
        value, leaf = config(), node()
        leaf.__dict__ |= {"_val": 7, "_type": int}
        value.__dict__ |= {"_content": {"width": leaf}, "_parent": value}
        save(tmp_path / "x.ckpt", {**WEIGHTS, "config": value, "hparams": attributes(lr=1e-4)})
    assert holds_weights(tmp_path / "x.ckpt")


@pytest.mark.parametrize("value, kind", [
    ({"string_to_param": torch.nn.ParameterDict({"*": A})}, "a textual inversion"),
    ({"string_to_param": {"*": A}, "name": "style"}, "a textual inversion"),
    ({768: ({"linear.0.weight": A}, {"linear.0.weight": A}), "step": 5}, "a hypernetwork"),
    ({"image_proj": {"latents": A}, "ip_adapter": {"1.to_k_ip.weight": A}}, "an IP-Adapter"),
])
def test_an_addition_to_a_model_is_named(tmp_path, value, kind):
    with pytest.raises(ValueError, match=f"x.pt: needs a whole model of .*, got {kind}"):
        load_pipeline(save(tmp_path / "x.pt", value))


# Pickles that would run a program. Each would create the file that `made` names.


class Call:
    """Pickled as a call of a function, which happens when the pickle is opened."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


made = None  # set by the fixture `trap`


def make_file(*_):
    made.touch()


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "made", tmp_path / "made")
    return tmp_path / "made"


HOSTILE = {
    "os.system": (lambda p: Call(os.system, f"touch {p}"), "system"),
    "a function of the program": (lambda p: Call(make_file), "make_file"),
    "in a parameter's hooks": (
        lambda p: Call(torch._utils._rebuild_parameter, A, True, Call(make_file)), "make_file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_never_run(tmp_path, trap, kind):
    make, name = HOSTILE[kind]
    value = {"state_dict": {**WEIGHTS, "z": make(trap)}}
    for zipped in (True, False):
        torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"x.ckpt: refuses to load [\w.]*({name}):"):
            read_checkpoint(tmp_path / "x.ckpt")
    assert not trap.exists()
    with contextlib.suppress(AttributeError):  # the call makes no tensor
        torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert trap.exists()  # where pickles are trusted


def test_a_stub_called_with_anything_does_nothing(tmp_path):
    with named(MODEL_CHECKPOINT) as cls:
        path = save(tmp_path / "x.ckpt", {**WEIGHTS, "z": Call(cls, cls, "os.system", [1])})
    assert holds_weights(path)


@pytest.mark.parametrize("code", [
    b"cargparse\nNamespace\n)R)R.",  # calls an instance
    b"cargparse\nNamespace\n}U\x06systemcposix\nsystem\nsb.",  # gives the class a method
    b"cargparse\nNamespace.__init__.__globals__\n.",  # reaches through it
])
def test_handwritten_opcodes_get_nowhere(tmp_path, code):
    """In the form of torch files before 1.6."""
    start = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    (tmp_path / "x.pt").write_bytes(b"".join([*start, b"\x80\x02", code]))
    with pytest.raises(ValueError, match=r"x.pt: (refuses to load|torch cannot read it)"):
        read_checkpoint(tmp_path / "x.pt")
