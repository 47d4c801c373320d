"""Two trainings, full disks, kills and odd files: one clear line, and nothing old is harmed."""

import contextlib
import dataclasses
import os
import random
import resource
import signal

import pytest
import torch

import run as runs
from checkpoints.tokenizers import read_merges
from files import MAX_TEXT, atomic, load_safetensors, read_json, write_json
from options import RECIPES
from sample import read_prompts


@pytest.fixture
def path(tmp_path):
    """The folder of a run whose first stage is done."""
    options = dataclasses.asdict(dataclasses.replace(RECIPES["tiny"], device="cpu"))
    write_json(tmp_path / "train.json", {"options": options, "finished": ["vae"]})
    return tmp_path


def open_run(path):
    return runs.Run(path, *runs.read_record(path), resume=True)


@contextlib.contextmanager
def other_process(action):
    """The number of a process that has called action() and then waits for its death."""
    begin, end = os.pipe()
    if not (process := os.fork()):
        try:
            action()
            os.write(end, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(end)
    try:
        assert os.read(begin, 4) == b"done"
        yield process
    finally:
        os.close(begin)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


# Two trainings in one folder


def test_a_second_training_is_refused_until_the_first_is_dead(path):
    before = (path / "train.json").read_bytes()
    with other_process(lambda: open_run(path)) as process:
        with pytest.raises(ValueError, match=f"{path}: process {process} on .* is training here"):
            open_run(path)
        assert (path / "train.json").read_bytes() == before
    assert open_run(path).finished == ["vae"]


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
    with other_process(lambda: None) as dead:
        pass
    kept = {".a.pt.1.tmp", f".b.pt.{os.getppid()}.tmp", ".c.pt.x.tmp", "d.pt"}
    for name in kept | {f".e.pt.{dead}.tmp", f".f.safetensors.{dead}.tmp"}:
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


def places(value):
    """The (dict or list, key) of all that a state holds."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_a_whole_state_is_read_and_one_of_wrong_types_is_refused(tmp_path):
    path, count = tmp_path / "training_state.pt", len(list(places(state())))
    torch.save(state(), path)
    assert runs.read_state(path)["step"] == 1
    free = {"lr", "betas", "eps", "weight_decay", "part"}  # the values of a group may be any
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
    read_json, load_safetensors, runs.read_state, read_merges, read_prompts,
])
def test_pipes_and_devices_do_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=f"{name}: needs a regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", [read_json, read_merges, read_prompts])
def test_texts_have_a_largest_size(tmp_path, read):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_TEXT + 1)
    with pytest.raises(ValueError, match="large: needs at most 100,000,000 bytes, got 100,000,001"):
        read(tmp_path / "large")
