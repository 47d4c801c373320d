"""Flags made from a dataclass, and mistakes that are one line and a status."""

import argparse
import importlib.util
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from studies import bench
import cli
from cli import add_flags, check_ranges, choose_device, given_flags, option, run_main

ROOT = Path(cli.__file__).parent


@dataclass(frozen=True)
class Options:
    num_steps: int = option(50, "how many steps")
    rate: float | None = option(None, "how fast")
    name: str = option("ddim", "which one", choices=("ddim", "ddpm"))
    mirror: bool = option(True, "left is right")


def given(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Options())
    return given_flags(parser.parse_args(words), Options())


# Flags


def test_only_what_the_command_line_sets_is_given():
    assert given() == {}
    assert given("--num-steps", "50") == {"num_steps": 50}  # even if it is the default


def test_a_boolean_can_be_switched_on_and_off():
    assert given("--mirror") == {"mirror": True}
    assert given("--no-mirror") == {"mirror": False}


def test_an_optional_value_has_the_type_of_the_value():
    assert given("--rate", "3") == {"rate": 3.0}


def test_the_help_shows_the_default(capsys):
    with pytest.raises(SystemExit):
        given("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "how many steps (default: 50)" in text and "left is right (default: True)" in text


@pytest.mark.parametrize("words, message", [
    (("--num-step", "3"), "unrecognized arguments: --num-step"),
    (("--num-steps", "3.5"), "--num-steps: invalid int value: '3.5'"),
    (("--name", "euler"), "--name: invalid choice: 'euler'"),
    (("--mirror", "no"), "unrecognized arguments: no"),
])
def test_a_wrong_flag_is_named_and_ends_with_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        given(*words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ("--rate", "nan"), ("--rate", "inf"), ("--num-steps", 30 * "1"),
])
def test_numbers_of_flags_are_finite_and_fit_into_64_bits(capsys, words):
    with pytest.raises(SystemExit):
        given(*words)
    assert f"{words[0]}: needs a finite number below 2**63, got" in capsys.readouterr().err


def test_ranges_are_checked_by_the_name_of_the_flag():
    args = argparse.Namespace(num_steps=3, rate=None, eta=float("nan"))
    check_ranges(args, num_steps=(3, 3), rate=(1, 2), absent=(1, 2))
    with pytest.raises(ValueError, match=r"--num-steps needs to lie in \[4, 9\], got 3"):
        check_ranges(args, num_steps=(4, 9))
    with pytest.raises(ValueError, match="--eta"):
        check_ranges(args, eta=(0, 1))


def test_warnings_do_not_precede_an_error(capsys):
    def main():
        warnings.warn("odd", UserWarning)
        raise ValueError("a mistake")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert end_of(main) == 1
    assert not seen and capsys.readouterr().err.count("\n") == 1


# Devices


@pytest.mark.parametrize("there, kind", [(True, "cuda"), (False, "cpu")])
def test_auto_chooses_cuda_if_there_is_one(monkeypatch, there, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert choose_device("auto").type == kind


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--device {name}: not usable"):
        choose_device(name)


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


def test_a_command_that_works_ends_with_status_0():
    assert end_of(lambda: None) in (0, None)


def test_a_command_can_choose_its_status():
    assert end_of(lambda: 3) == 3


@pytest.mark.parametrize("error, line", [
    (ValueError("rate needs > 0, got -1"), "x.py: error: rate needs > 0, got -1\n"),
    (FileNotFoundError(2, "Not there", "a.gif"), "x.py: error: [Errno 2] Not there: 'a.gif'\n"),
    (OSError(), "x.py: error: OSError\n"),
])
def test_a_mistake_of_the_user_is_one_line_and_status_1(monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "argv", ["some/x.py"])
    assert end_of(fail(error)) == 1
    assert capsys.readouterr() == ("", line)


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_main(fail(KeyError("name")))


@pytest.mark.parametrize("error, line", [
    (KeyboardInterrupt(), "stopped by Ctrl-C"),
    (KeyboardInterrupt("stopped at step 7"), "stopped at step 7"),
])
def test_ctrl_c_is_one_line_and_status_130(capsys, error, line):
    assert end_of(fail(error)) == 130
    assert capsys.readouterr().err == f"\n{line}\n"


@pytest.mark.parametrize("words", [
    ("train.py", "new", "--stage", "video"),
    ("sample.py", "nowhere", "a red circle"),
    ("evaluate.py", "nowhere"),
])
def test_every_script_ends_a_mistake_with_one_line(tmp_path, words):
    script, *rest = words
    command = [sys.executable, ROOT / script, *rest]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.count("\n") == 1


def test_output_that_is_closed_early_is_not_an_error(tmp_path):
    code = "import cli; cli.run_main(lambda: [print('x' * 1000) for _ in range(1000)] and None)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    process.wait()


def test_without_diffusers_the_bench_leaves_that_comparison_out(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench.bench_diffusers(torch.device("cpu"), 1)
    assert capsys.readouterr().out.startswith("beside diffusers: not measured")
