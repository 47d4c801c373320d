"""Two trainings, full disks, kills and odd files: one clear line, and nothing old is harmed."""

import contextlib
import dataclasses
import gzip
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import SMALL, call, flags

import evaluate
import memory
import run as runs
import sample
import train
from checkpoints.containers import read_checkpoint
from checkpoints.tokenizers import read_merges
from cli import run_main
from files import (
    HOST, MAX_TEXT, atomic, from_json, full_disk, load_safetensors, read_json, write_json,
)
from media.read import read_clip
from media.write import write_clip
from options import RECIPES
from pipeline import Sampling
from sample import read_prompts
from studies.damage import cases, fault_of, places, small_files, stopped_run, trial
from trainer import drop_repeated


@pytest.fixture
def path(tmp_path):
    """The folder of a run whose first stage is done."""
    options = dataclasses.asdict(dataclasses.replace(RECIPES["tiny"], device="cpu"))
    write_json(tmp_path / "train.json", {"options": options, "finished": ["vae"]})
    return tmp_path


def open_run(path):
    return runs.Run(path, *runs.read_record(path), resume=True)


@contextlib.contextmanager
def other_process(*words):
    """A Python process that has written a line, until its death."""
    with subprocess.Popen([sys.executable, "-c", *map(str, words)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free", file=file, flush=True)
    print("free", flush=True)
except OSError:
    print("locked", flush=True)
sys.stdin.read()
"""


# Two trainings in one folder


def test_a_second_training_is_refused_until_the_first_is_dead(path):
    before = (path / "train.json").read_bytes()
    with other_process(LOCK, path / ".lock"):
        with pytest.raises(ValueError, match=f"{path}: free is training here; stop it or wait"):
            open_run(path)
        assert (path / "train.json").read_bytes() == before
    assert open_run(path).finished == ["vae"]


def test_a_training_locks_its_folder_and_says_who_it_is(path):
    open_run(path)
    asked = subprocess.run([sys.executable, "-c", LOCK, path / ".lock"], capture_output=True,
                           check=True, input=b"")
    assert asked.stdout == b"locked\n"
    assert (path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_stage_that_another_training_has_just_finished_is_noticed(path):
    with pytest.raises(ValueError, match="another training has finished a stage of it"):
        runs.Run(path, RECIPES["tiny"], [], resume=True)
    assert runs.read_record(path)[1] == ["vae"]


def test_there_is_nothing_to_resume_where_no_run_is(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume, it is no run; leave out --resume"):
        runs.Run(tmp_path / "new", RECIPES["tiny"], [], resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_nothing_but_a_lock_is_new(tmp_path):
    (tmp_path / ".lock").touch()
    assert runs.merge_options(tmp_path, {})[1] == []
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and no run"):
        runs.merge_options(tmp_path, {})


# Full disks and kills


@pytest.fixture
def small_disk():
    """Files of more than 10,000 bytes cannot be written: EFBIG, as with a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write(bytes(x.nbytes))])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, small_disk, save):
    (tmp_path / "state.pt").write_bytes(b"old")
    message = "state.pt: File too large after .* bytes, at least 3[0-9],... are missing; make room"
    with pytest.raises(OSError, match=message), atomic(tmp_path / "state.pt", 40_000) as file:
        save(torch.zeros(10_000), file)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("state.pt", b"old")]


def test_what_dead_processes_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = {f".a.pt.{HOST}.1.tmp", f".b.pt.{HOST}.{os.getppid()}.tmp", f".c.pt.{HOST}.x.tmp",
            f".d.pt.other.{dead.pid}.tmp", "d.pt"}
    for name in kept | {f".{old}.{HOST}.{dead.pid}.tmp" for old in ("e.pt", "f.safetensors")}:
        (tmp_path / name).touch()
    write_json(tmp_path / "g.json", {})
    assert {file.name for file in tmp_path.iterdir()} == kept | {"g.json"}


# Damaged and odd files


def state():
    def tensors():
        return [torch.ones(2, 3), torch.ones(2)]

    moments = {i: {"step": torch.tensor(1.0), "exp_avg": x, "exp_avg_sq": x + 1}
               for i, x in enumerate(tensors())}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "part": 1.0,
             "params": [0, 1]}
    return {"stage": "vae", "step": 1, "processes": 1, "parameters": tensors(),
            "average": tensors(), "optimizer": {"state": moments, "param_groups": [group]}}


def test_a_whole_state_is_read_and_one_of_wrong_types_is_refused(tmp_path):
    path, count = tmp_path / "training_state.pt", len(list(places(state())))
    torch.save(state(), path)
    assert runs.read_state(path)["step"] == 1
    free = {"lr", "betas", "eps", "weight_decay", "part"}  # those of the options are used
    for number in range(count):
        damaged = state()
        holder, key = list(places(damaged))[number]
        if key not in free:
            holder[key] = {"odd": 7067}
            torch.save(damaged, path)
            with pytest.raises(ValueError, match="training_state.pt: no training state"):
                runs.read_state(path)


def test_a_mutated_state_is_read_or_refused_by_name(tmp_path):
    path, chance = tmp_path / "training_state.pt", random.Random(0)
    torch.save(state(), path)
    raw = path.read_bytes()
    for _ in range(200):
        mutated, at = bytearray(raw), chance.randrange(4, len(raw))
        mutated[at : at + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
        path.write_bytes(mutated)
        with contextlib.suppress(ValueError):
            assert runs.read_state(path)["step"] >= 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_deep_json_and_endless_integers_are_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: not a JSON file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [
    read_json, load_safetensors, runs.read_state, read_merges, read_prompts, read_clip,
    read_checkpoint, lambda path: drop_repeated(path, "vae", 1),
])
def test_pipes_and_devices_do_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "zero.gif").symlink_to("/dev/zero")
    for name in ("pipe.gif", "zero.gif"):
        with pytest.raises(ValueError, match=f"{name}: needs a regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", [read_json, read_merges, read_prompts])
def test_texts_have_a_largest_size(tmp_path, read):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_TEXT + 1)
    with pytest.raises(ValueError, match="large: needs at most 100,000,000 bytes, got 100,000,001"):
        read(tmp_path / "large")


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    (tmp_path / "merges.gz").write_bytes(gzip.compress(bytes(MAX_TEXT + 1)))
    with pytest.raises(ValueError, match="merges.gz: not a merges file .more than 100,000,000"):
        read_merges(tmp_path / "merges.gz")


# Every kind of file, damaged, through main()


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """{name: folder}: finished and stopped runs, clips, texts and single files."""
    path = stopped_run(tmp_path_factory.mktemp("stopped") / "run", *flags(**SMALL))
    files = small_files(tmp_path_factory.mktemp("files"))
    files.pop("mp4", None)  # a process of ffmpeg takes a tenth of a second
    return {"run": trained, "stopped": path} | files


KINDS = cases(dict.fromkeys(("run", "stopped", "gif", "webp", "png", "npy", "texts", "files"), ""))


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[file for _, file, *_ in KINDS])
def test_a_command_holds_whatever_a_file_holds(folders, tmp_path, number):
    case, chance = cases(folders)[number], random.Random(number)
    for _ in range(5):  # studies/torture.py tries more
        assert trial(case, folders, tmp_path / "work", chance) is None


def test_ctrl_c_in_a_command_ends_the_study():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fault_of(interrupted, [])


# One checked reader


@pytest.mark.parametrize("values, message", [
    ({"eta": float("nan")}, "eta needs float, numbers of at most 100, got nan"),
    ({"num_steps": True}, "num_steps needs int, .* got True"),
    ({"num_steps": 2.0}, "num_steps needs int, .* got 2.0"),
    ({"num_steps": 101}, "num_steps needs int, numbers of at most 100, got 101"),
    ({"sampler": ["ddim"]}, "sampler needs str, .* got ..ddim"),
    ({"sampler": "euler"}, "sampler needs one of .* got 'euler'"),
    ({"speed": 1}, "speed is unknown"), ({"num_steps": 0}, "num_steps needs >= 1, got 0"),
])
def test_a_dataclass_is_read_with_types_choices_and_ranges(values, message):
    with pytest.raises(ValueError, match=f"^a.json: {message}"):
        from_json(Sampling, {"image_size": 64} | values, "a.json", most=100)


def test_whole_numbers_are_floats_and_lists_tuples():
    assert from_json(Sampling, {"eta": 1, "image_size": 8}, "").eta == 1
    options = from_json(type(RECIPES["tiny"]), {"frame_rate": None, "max_frames": 9}, "")
    assert (options.frame_rate, options.max_frames) == (None, 9)


# Large numbers


def line_of(capsys, main, *words):
    """The last line that a command says before it ends with an error."""
    with pytest.raises(SystemExit) as stop:
        call(lambda: run_main(main), *words)
    assert stop.value.code in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


MEMORY = r"needs about [\d,.]+ GB of memory, the machine has [\d,.]+; lower --"


@pytest.mark.parametrize("name, value, message", [
    ("image_size", 100_000, MEMORY), ("zoom", 10_000, MEMORY), ("num_frames", 10**12, MEMORY),
    ("num_frames", 10**20, "--num-frames: needs a finite number below 2"),
    ("guidance_scale", "inf", "--guidance-scale: needs a finite number below 2"),
    ("zoom", 10**5, "--zoom needs to lie in"), ("seed", 2**64, "--seed needs to lie in"),
    ("batch_size", 0, "--batch-size needs to lie in"), ("device", "meta", "--device meta: not us"),
    ("output", "/dev/null/x.gif", "/dev/null/x.gif: needs a folder to write into"),
])
def test_sample_refuses_before_it_draws(trained, capsys, name, value, message):
    line = line_of(capsys, sample.main, trained, "a cat", *flags(**{name: value}))
    assert re.search(message, line)


@pytest.mark.parametrize("name, value, message", [
    ("image_size", 1_000_000, MEMORY), ("image_size", 10**9, "needs to lie in .1, 1000000."),
    ("vae_batch_size", 10**6, MEMORY), ("early_noise", "inf", "needs a finite number below 2"),
    ("workers", 10**6, "--workers needs to lie in .0, 256., got 1000000"),
    ("accumulate", 10**30, "needs a finite number below"), ("seed", 2**63 - 1, "to lie in .0, "),
])
def test_train_refuses_before_it_trains(tmp_path, capsys, name, value, message):
    line = line_of(capsys, train.main, tmp_path / "run", *flags(**SMALL | {name: value}))
    assert re.search(message, line)
    assert not (tmp_path / "run" / "cache").exists()


def test_evaluate_refuses_before_it_draws(trained, capsys, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**9)
    line = line_of(capsys, evaluate.main, trained, "--num-prompts", 10**6, "--device", "cpu")
    assert re.search(MEMORY, line)


@pytest.mark.parametrize("allocate, asked", [
    (lambda: torch.empty(10**15), "4000000000000000 bytes"), (lambda: np.empty(10**15), "7.11 PiB"),
    (lambda: bytearray(2**62), None),
])
def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys, allocate, asked):
    line = line_of(capsys, allocate, "--num-frames", 8, "--zoom", 3)
    asked = f" when asked for {asked} more" if asked else ""
    assert line == f"script.py: error: out of memory{asked}; lower --num-frames, --zoom"


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run_main(lambda: torch.ones(2) @ torch.ones(3))


# Small things


def test_start_as_shift_belongs_to_conv():
    with pytest.raises(ValueError, match="--start-as-shift needs --temporal conv, got --t"):
        dataclasses.replace(RECIPES["tiny"], temporal="attention", start_as_shift=True)


def test_another_number_of_threads_is_said(folders, tmp_path, capsys):
    path = shutil.copytree(folders["stopped"], tmp_path / "run")
    saved = torch.load(path / "training_state.pt", weights_only=True)
    assert saved["threads"] == torch.get_num_threads()
    torch.save(saved | {"threads": 77}, path / "training_state.pt")
    call(train.main, path, "--resume", "--stage", "vae")
    assert "is of a training with 77 threads, this one has" in capsys.readouterr().err


def test_a_side_too_long_for_its_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.webp: needs at most 16,383 pixels a side, got 16,384"):
        write_clip(tmp_path / "a.webp", torch.zeros(1, 3, 1, 16384))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_that_lines_are_added_to(tmp_path, small_disk):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(bytes(10_000))
    with pytest.raises(OSError, match="metrics.jsonl: File too large after 10,000 bytes, at"):
        with full_disk(metrics, metrics), open(metrics, "ab") as file:
            file.write(b"{}")
