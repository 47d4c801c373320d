"""Two trainings, full disks, kills and odd files: one clear line, and nothing old is harmed."""

import contextlib
import dataclasses
import os
import signal

import pytest

import run as runs
from files import write_json
from options import RECIPES


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
