"""No kill, signal, damaged file or number that is not finite spoils a run.

A kill in this process is an exception that nothing catches, at a step after which nothing was
saved. Only a process can show the rest.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (ROOT, SMALL, call, flags, metrics_of, train_quickly, train_small,
                     weights_of)

import train
import trainer
from checkpoints.weights import load_pipeline
from shapes import MovingShapes
from support import files
from support.cli import run_main
from support.files import lock
from trainer import Trainer
from training.options import STAGES
from training.run import Run


class Killed(BaseException):
    """Stands in for kill -9: nothing catches it, nothing is saved."""


def before_step(monkeypatch, stage, step, action):
    """Do something in a stage just before the step that is number `step`, from 0."""
    optimise = Trainer.optimise

    def optimise_or_act(self):
        if (self.stage, self.step) == (stage, step):
            action()
        return optimise(self)

    monkeypatch.setattr(Trainer, "optimise", optimise_or_act)


def kill():
    raise Killed


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """{stage: one run as it was after a kill just before step 3 of the stage}."""
    path, runs = tmp_path_factory.mktemp("killed") / "run", {}
    for stage in STAGES:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            before_step(patch, stage, 3, kill)
            train_small(path, *["--resume"] * path.exists())
        runs[stage] = shutil.copytree(path, path.parent / stage)
    return runs


@pytest.fixture
def killed(tmp_path, killed_runs):
    """A copy of a run that was killed in its image stage."""
    return shutil.copytree(killed_runs["image"], tmp_path / "killed")


def state_of(path):
    return torch.load(path / "training_state.pt", weights_only=True)


# Ends before the end


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed_runs, tmp_path, stage):
    shutil.copytree(killed_runs[stage], tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == 2
    train_quickly(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_a_resumed_image_stage_has_the_tokenizer_of_its_start(trained, killed, monkeypatch):
    before = MovingShapes.__init__

    def edited(self, *arguments):
        before(self, *arguments)
        self.captions = ["a purple heptagon", *self.captions[1:]]

    monkeypatch.setattr(MovingShapes, "__init__", edited)
    train_quickly(killed, "--resume")
    files = [path / "tokenizer/merges.txt" for path in (killed, trained)]
    assert files[0].read_text() == files[1].read_text()


def test_metrics_after_a_resume_are_those_without_a_kill(killed):
    # The state is of step 2. The line of step 3 is dropped, and a line that the kill cut short.
    with open(killed / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "image", "step": 3}\n{"stage": "image", "st')
    train_quickly(killed, "--resume")
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(killed)]
    assert steps == [(stage, step) for stage in STAGES for step in (2, 4)]


@pytest.mark.parametrize("method, more", [
    ((Run, "save_record"), ["--resume"]), ((Path, "unlink"), ["--resume"]), ((Path, "unlink"), []),
], ids=["not yet noted", "noted", "noted, and no --resume"])
def test_a_kill_around_the_note_that_a_stage_is_done_is_survived(trained, killed, method, more):
    before = getattr(*method)

    def act_or_die(self, *rest, **options):
        if getattr(self, "name", "") == "training_state.pt" or (
            getattr(self, "finished", None) == ["vae", "image"]
        ):
            raise Killed
        before(self, *rest, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*method, act_or_die)
        train_quickly(killed, "--resume")
    assert (killed / "training_state.pt").exists()
    train_quickly(killed, *more)
    assert weights_of(killed) == weights_of(trained)


def test_ctrl_c_in_the_last_step_of_a_stage_stops_and_goes_on(trained, killed):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(
        trainer.Stopped, match="stopped at step 4 of the image stage; continue with --resume"
    ):
        before_step(patch, "image", 3, lambda: signal.raise_signal(signal.SIGINT))
        train_quickly(killed, "--resume")
    assert state_of(killed)["step"] == 4
    train_quickly(killed, "--resume")
    assert weights_of(killed) == weights_of(trained)


def test_a_signal_ends_the_command_with_one_line_and_status_130(tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, "vae", 0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_small(tmp_path / "run", "--stage", "vae"))
    assert stop.value.code == 130 and state_of(tmp_path / "run")["step"] == 1
    assert capsys.readouterr().err.endswith(
        "\nstopped at step 1 of the vae stage; continue with --resume\n")


def test_kill_9_leaves_a_state_that_goes_on(tmp_path, monkeypatch):
    endless = flags(**SMALL | {"vae_steps": 1_000_000, "save_every": 1})
    command = [sys.executable, ROOT / "train.py", tmp_path / "run", *endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run/training_state.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.kill()
    first = state_of(tmp_path / "run")["step"]
    before_step(monkeypatch, "vae", first + 2, kill)
    with pytest.raises(Killed):
        train_quickly(tmp_path / "run", "--resume")
    assert state_of(tmp_path / "run")["step"] == first + 2 and first >= 1


def two_processes(path, *words):
    """Train with two processes, as torchrun starts them. Returns their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = ("import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
            "from helpers import train_quickly; train_quickly(Path(sys.argv[1]), *sys.argv[2:])")
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "OMP_NUM_THREADS": "1"}  # two that fight for cores are far slower
    processes = [subprocess.Popen(
        [sys.executable, "-c", code, path, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return errors


def test_two_processes_make_one_run_of_twice_the_batch(tmp_path, monkeypatch):
    # The conv variant: a step on images skips its layers in all processes.
    few = {"vae_steps": 2, "image_steps": 2, "video_steps": 2, "image_every": 2,
           "temporal": "conv"}
    errors = two_processes(tmp_path / "two", *flags(**SMALL | few))
    assert "100%" in errors[0] and "100%" not in errors[1]  # only the first draws a bar
    assert load_pipeline(tmp_path / "two").sampling.num_frames == 3
    generator = trainer.step_generator  # one process with the batches of both, one after another
    monkeypatch.setattr(trainer, "step_generator", lambda seed, stage, step, micro: (
        generator(seed, stage, 2 * step + micro)))
    train_small(tmp_path / "one", accumulate=2, **few)
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


# Numbers that are not finite


def test_an_enormous_learning_rate_saves_no_weights(trained, tmp_path):
    with pytest.raises(ValueError, match="the video stage diverged .* lower --video-learning-rate"):
        train_small(tmp_path / "run", video_learning_rate=1e9, save_every=1)
    assert load_pipeline(tmp_path / "run").sampling.num_frames == 1  # the image model is whole


# Refusals


def test_an_unfinished_stage_is_not_trained_over_but_can_be_started_again(killed, trained):
    before = weights_of(killed)
    with pytest.raises(ValueError, match="nothing to resume, because it is not a run; leave out"):
        train_small(killed / "new", "--resume")
    with pytest.raises(ValueError, match="add --resume to continue it, or remove that file"):
        call(train.main, killed)
    assert weights_of(killed) == before
    (killed / "training_state.pt").unlink()
    train_quickly(killed)
    assert weights_of(killed) == weights_of(trained)


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:-100], lambda raw: b"\x80\x02" + bytes(50),
], ids=["empty", "cut", "a pickle"])
def test_a_damaged_state_is_refused_by_name_and_with_a_remedy(killed, damage):
    state = killed / "training_state.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match="training_state.pt: not a training state .*; remove it"):
        call(train.main, killed, "--resume")


def test_a_state_holds_nothing_to_execute(killed, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"stage": "image", "evil": Evil()}, killed / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt: not a training state"):
        call(train.main, killed, "--resume")
    assert "executed" not in capsys.readouterr().out


def test_a_run_is_locked_for_other_processes(tmp_path, monkeypatch):
    path = tmp_path / "run/.lock"
    lock(path)
    lock(path)  # a process may train in its run several times
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", code, path], stderr=subprocess.PIPE, check=False)
    assert b"BlockingIOError" in other.stderr

    def refuse(*_):
        raise BlockingIOError

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match="other: another process is training here; stop it, or"):
        lock(tmp_path / "other/.lock")
