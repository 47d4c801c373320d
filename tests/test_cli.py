"""Flags made from a dataclass, and mistakes that are one line and a status."""

import ctypes
import io
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from support.cli import (Parser, add_flags, given_flags, number, option, out_of_memory,
                         run_main)


@dataclass(frozen=True)
class Options:
    num_steps: int = option(50, "how many steps", low=1, high=99)
    rate: float | None = option(None, "how fast")
    name: str = option("ddim", "which one", choices=("ddim", "ddpm"))
    mirror: bool = option(True, "left is right")


def given(*words, **settings):
    parser = Parser(prog="x.py")
    add_flags(parser, Options(), **settings)
    return given_flags(parser.parse_args(words), Options())


# Flags


def test_only_what_the_command_line_sets_is_given():
    assert given() == {}
    assert given("--num-steps", "50") == {"num_steps": 50}  # even if it is the default
    assert given("--rate", "3", "--no-mirror") == {"rate": 3.0, "mirror": False}


@pytest.mark.parametrize("settings", [{}, {"show_defaults": False}])
def test_the_help_shows_defaults_unless_they_are_not_the_commands(capsys, settings):
    with pytest.raises(SystemExit):
        given("--help", **settings)
    text = " ".join(capsys.readouterr().out.split())
    assert "how many steps" in text and ("(default: 50)" in text) == (not settings)


@pytest.mark.parametrize("words, message", [
    (("--num-step", "3"), "unrecognized arguments: --num-step 3"),  # no abbreviations
    (("--num-steps", "3.5"), "argument --num-steps: invalid int value: '3.5'"),
    (("--num-steps", "0"), "argument --num-steps: needs a number from 1 to 99, got 0"),
    (("--rate", "-1"), "argument --rate: needs at least 0, got -1"),  # unless `low` says more
    (("--rate", "nan"), "argument --rate: needs at least 0, got nan"),
    (("--name", "euler"), "argument --name: invalid choice: 'euler' (choose from "),
])
def test_a_wrong_flag_is_one_line_and_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        given(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"x.py: error: {message}") and line.endswith("; see --help")


def test_numbers_may_take_their_limits():
    assert given("--num-steps", "1") | given("--rate", "0") == {"num_steps": 1, "rate": 0.0}
    assert given("--num-steps", "99") == {"num_steps": 99}
    assert number(int)("-5") == -5 and number(int, 0)(str(2**63 - 1)) == 2**63 - 1
    with pytest.raises(ArgumentTypeError, match="needs at least 0, got 9223372036854775808"):
        number(int, 0)(str(2**63))


# Memory


@pytest.mark.parametrize("error, asked", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
     " when asked for 20.00 GiB more"),
    (MemoryError(), ""),
])
def test_an_allocators_error_names_the_flags_that_decide(monkeypatch, error, asked):
    monkeypatch.setattr(sys, "argv", ["x.py", "--batch-size", "9", "run", "--seed", "1",
                                      "--num-frames=10"])
    assert out_of_memory(error) == f"out of memory{asked}; lower --batch-size, --num-frames"
    monkeypatch.setattr(sys, "argv", ["x.py"])
    assert out_of_memory(error).endswith("; lower batch sizes, frames or the image size")


def test_real_allocators_are_understood_and_other_errors_are_none_of_memory():
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50),
                     lambda: torch.empty(2**62, 4), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert out_of_memory(caught.value).startswith("out of memory")
    assert out_of_memory(RuntimeError("shapes (2, 3) and (4, 5)")) is None


# Ends


def end_of(main):
    """The exit status of run_main(main)."""
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code


def fail(error):
    def main():
        raise error

    return main


def test_a_command_chooses_its_status():
    assert (end_of(lambda: None), end_of(lambda: 3)) == (None, 3)


@pytest.mark.parametrize("error, line", [
    (ValueError("rate needs > 0, got -1"), "rate needs > 0, got -1"),
    (FileNotFoundError(2, "Not there", "a.gif"), "a.gif: no such file or folder"),
    (OSError(), "OSError"),
    (MemoryError(), "out of memory; lower batch sizes, frames or the image size"),
])
def test_a_mistake_of_the_user_is_one_line_and_status_1(monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "argv", ["some/where/x.py"])
    assert end_of(fail(error)) == 1
    assert capsys.readouterr() == ("", f"x.py: error: {line}\n")


def test_a_name_that_stdout_cannot_print_is_escaped(monkeypatch):
    """Surrogates stand for bytes of a name that are not UTF-8."""
    for encoding in ("ascii", "utf-8"):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, write_through=True))
        assert end_of(lambda: print("\udce9")) is None and out.getvalue() == b"\\udce9\n"


@pytest.mark.parametrize("error", [KeyError("name"), RuntimeError("shapes")])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_main(fail(error))


@pytest.mark.parametrize("error, line", [
    (KeyboardInterrupt(), "stopped by Ctrl-C"),
    (KeyboardInterrupt("stopped at step 7"), "stopped at step 7"),
])
def test_ctrl_c_is_one_line_and_status_130(capsys, error, line):
    assert end_of(fail(error)) == 130
    assert capsys.readouterr().err == f"\n{line}\n"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_stays_in_the_heap_for_the_next_operation():
    code = ("import ctypes, sys; from support.cli import run_main\n"
            "class Info(ctypes.Structure): _fields_ = [(c, ctypes.c_int) for c in 'abcdefghij']\n"
            "def main():\n"
            "    len(bytes(2**26))  # 64 MiB, freed at once\n"
            "    mallinfo = ctypes.CDLL(None).mallinfo; mallinfo.restype = Info\n"
            "    print(mallinfo().a)  # bytes of the heap\n"
            "run_main(main) if sys.argv[1:] else main()")
    without, kept = (int(subprocess.check_output([sys.executable, "-c", code, *words]))
                     for words in ([], ["kept"]))
    assert without < 2**26 <= kept
