"""No kill, signal, damaged file or number that is not finite spoils a run.

A kill in this process is an exception that nothing catches, at a step after which nothing was
saved. What only a process can show, is shown with one.
"""

import contextlib
import math
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
from helpers import SMALL, call, flags, metrics_of, train_small, weights_of

import run
import train
import trainer
from options import STAGES
from trainer import Trainer
from weights import load_pipeline

ROOT = Path(train.__file__).parent


def assert_equal(a, b):
    """Nested dicts and lists of tensors are equal, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


class Killed(BaseException):
    """What stands in for kill -9: nothing catches it, nothing is saved."""


def before_step(monkeypatch, stage, step, action):
    """Do something in a stage just before the step that is number `step`, from 0."""
    optimise = Trainer._optimise

    def optimise_or_act(self):
        if (self.stage, self.step) == (stage, step):
            action()
        return optimise(self)

    monkeypatch.setattr(Trainer, "_optimise", optimise_or_act)


def fail(error):
    raise error


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """{stage: one run as it was after a kill just before step 3 of the stage}."""
    path, runs = tmp_path_factory.mktemp("killed") / "run", {}
    for stage in STAGES:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            before_step(patch, stage, 3, lambda: fail(Killed))
            train_small(path, *["--resume"] * path.exists(), log_every=1)
        runs[stage] = shutil.copytree(path, path.parent / stage)
    return runs


# Ends before the end


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed_runs, tmp_path, stage):
    shutil.copytree(killed_runs[stage], tmp_path / "run")
    assert torch.load(tmp_path / "run/training_state.pt")["step"] == 2
    train_small(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_and_average_after_a_resume_are_those_without_a_kill(
        trained, killed_runs, tmp_path, stage):
    shutil.copytree(killed_runs[stage], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.Run, "finish", finish_until(stage))
        train_small(tmp_path / "run", "--resume")
    states = [tmp_path / "run/training_state.pt", trained.parent / f"states/{stage}-4.pt"]
    assert_equal(*(torch.load(state, weights_only=True) for state in states))


def finish_until(stage):
    """Run.finish, and a kill just before it notes that a stage is done."""
    finish = run.Run.finish
    return lambda self, name: fail(Killed) if name == stage else finish(self, name)


def test_metrics_after_a_resume_are_those_without_a_kill(killed_runs, tmp_path):
    shutil.copytree(killed_runs["image"], tmp_path / "run")
    train_small(tmp_path / "run", "--resume", log_every=1)
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(tmp_path / "run")]
    assert steps == [(stage, step) for stage in STAGES for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_just_before_a_stage_is_noted_as_done_is_survived(
        trained, killed_runs, tmp_path, stage):
    shutil.copytree(killed_runs[stage], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.Run, "finish", finish_until(stage))
        train_small(tmp_path / "run", "--resume")
    train_small(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["plainly", "with --resume"])
def test_a_kill_just_after_a_stage_is_noted_as_done_is_survived(
        trained, killed_runs, tmp_path, more):
    shutil.copytree(killed_runs["image"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: (
            fail(Killed) if self.name == "training_state.pt" else None
        ))
        train_small(tmp_path / "run", "--resume")
    assert (tmp_path / "run/training_state.pt").exists()
    train_small(tmp_path / "run", *more)
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_ctrl_c_in_the_last_step_of_a_stage_stops_and_goes_on(
        trained, killed_runs, tmp_path, monkeypatch):
    shutil.copytree(killed_runs["image"], tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(trainer.Stopped, match="step 4 of the ima"):
        before_step(patch, "image", 3, lambda: signal.raise_signal(signal.SIGINT))
        train_small(tmp_path / "run", "--resume")
    train_small(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before_step(monkeypatch, "vae", 1, twice)
    with pytest.raises(KeyboardInterrupt) as stop:
        train_small(tmp_path / "run")
    assert stop.type is KeyboardInterrupt and not (tmp_path / "run/training_state.pt").exists()


def start(path, wait_for, **options):
    """train.py in a process of its own, without an end in sight, when it has written a file."""
    words = flags(**SMALL | {"vae_steps": 1_000_000, "log_every": 1} | options)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", path, *words], stderr=subprocess.PIPE, text=True
    )
    wait(path / wait_for, process)
    return process


def wait(file, process):
    """Wait until a process has written a file anew."""

    def modified():
        return file.stat().st_mtime_ns if file.exists() else None

    before = modified()
    while modified() == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_kill_9_leaves_a_state_that_goes_on(tmp_path, monkeypatch):
    with start(tmp_path / "run", save_every=1, wait_for="training_state.pt") as process:
        process.kill()
    first = torch.load(tmp_path / "run/training_state.pt", weights_only=True)["step"]
    before_step(monkeypatch, "vae", first + 2, lambda: fail(Killed))
    with pytest.raises(Killed):
        call(train.main, tmp_path / "run", "--resume")
    step = torch.load(tmp_path / "run/training_state.pt", weights_only=True)["step"]
    assert step == first + 2 and first >= 1


def test_sigterm_stops_as_ctrl_c_does(tmp_path, monkeypatch):
    before_step(monkeypatch, "vae", 0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(trainer.Stopped, match="stopped at step 1 of the vae stage"):
        train_small(tmp_path / "run")
    assert torch.load(tmp_path / "run/training_state.pt")["step"] == 1


def test_a_signal_ends_training_with_one_line_and_the_state_of_its_step(tmp_path):
    never = {"save_every": 1_000_000, "wait_for": "metrics.jsonl"}
    with start(tmp_path / "run", **never) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    step = torch.load(tmp_path / "run/training_state.pt")["step"]
    stopped = f"\nstopped at step {step} of the vae stage; continue with --resume\n"
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.count("stopped") == 1 and errors.endswith(stopped)
    assert metrics_of(tmp_path / "run")[-1]["step"] == step


# Several processes


@contextlib.contextmanager
def two_processes(path, **options):
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, ROOT / "train.py", path, *flags(**SMALL | options)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1"}  # each has a core; fighting for two takes five times as long
    places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [
        subprocess.Popen(
            command, env=os.environ | common | place, stderr=subprocess.PIPE, text=True
        )
        for place in places
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_processes_make_one_run(tmp_path):
    few = {"vae_steps": 2, "image_steps": 2, "video_steps": 2}
    with two_processes(tmp_path / "run", **few) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(tmp_path / "run")]
    assert steps == [(stage, 2) for stage in STAGES]
    assert load_pipeline(tmp_path / "run")


@pytest.fixture(scope="module")
def stopped_pair(tmp_path_factory):
    """(run, [what each process wrote]) of two processes, of which the second got a signal."""
    path = tmp_path_factory.mktemp("pair") / "run"
    endless = {"vae_steps": 1_000_000, "save_every": 1}
    with two_processes(path, **endless) as (first, second):
        wait(path / "training_state.pt", first)
        second.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    return path, errors


def test_a_signal_to_one_process_stops_all_at_the_same_step(stopped_pair):
    path, errors = stopped_pair
    step = torch.load(path / "training_state.pt")["step"]
    assert all(f"\nstopped at step {step} of the vae stage" in text for text in errors)


def test_the_state_of_two_processes_is_refused_by_one(stopped_pair, monkeypatch):
    path, _ = stopped_pair
    before = weights_of(path)
    monkeypatch.setattr(Trainer, "_optimise", lambda self: fail(Killed))  # its steps have no end
    with pytest.raises(ValueError, match="with 2 processes, this one has 1; resume it with as"):
        call(train.main, path, "--resume")
    assert weights_of(path) == before


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    loss, calls = train.reconstruction_loss, []

    def loss_until(*batch):
        calls.append(1)
        return loss(*batch) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "reconstruction_loss", loss_until)
    with pytest.raises(ValueError, match="the loss of the vae stage is not finite at step 4"):
        train_small(tmp_path / "run")
    state = torch.load(tmp_path / "run/training_state.pt")
    assert state["step"] == 2
    assert all(parameter.isfinite().all() for parameter in state["parameters"])


@pytest.mark.parametrize("stage", STAGES)
def test_an_enormous_learning_rate_saves_no_weights(tmp_path, stage):
    with pytest.raises(ValueError, match=f"the {stage} stage is not finite .* lower --{stage}-lea"):
        train_small(tmp_path / "run", **{f"{stage}_learning_rate": 1e9, "save_every": 1})
    part = {"vae": "vae", "image": "image_unet", "video": "unet"}[stage]
    if stage == "video":  # the image model of the stage before still draws
        assert load_pipeline(tmp_path / "run").sampling.num_frames == 1
    else:
        assert not (tmp_path / "run" / part).exists()


# Refusals


@pytest.fixture
def killed(tmp_path, killed_runs):
    """A copy of a run that was killed in its image stage."""
    return shutil.copytree(killed_runs["image"], tmp_path / "killed")


def test_an_unfinished_stage_is_not_trained_over(killed):
    before = weights_of(killed)
    with pytest.raises(ValueError, match="add --resume to continue it, or remove that file"):
        call(train.main, killed)
    assert weights_of(killed) == before


def test_an_unfinished_stage_can_be_started_anew(killed, trained):
    (killed / "training_state.pt").unlink()
    train_small(killed)
    assert weights_of(killed) == weights_of(trained)


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:1000], lambda raw: raw[:-100], lambda raw: b"hello" * 50,
    lambda raw: b"\x80\x02" + bytes(50), lambda raw: raw[1000:],
], ids=["empty", "a beginning", "cut", "a text", "a pickle", "an end"])
def test_a_damaged_state_is_refused_by_name_and_with_a_remedy(killed, damage):
    state = killed / "training_state.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match="training_state.pt: no training state .*; remove it"):
        call(train.main, killed, "--resume")


@pytest.mark.parametrize("value", [{"model": 1}, [1, 2]])
def test_a_state_of_another_program_is_refused_by_name(killed, value):
    torch.save(value, killed / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt: no training state"):
        call(train.main, killed, "--resume")


def test_a_state_of_another_network_is_refused(killed, trained):
    state = torch.load(trained.parent / "states/video-2.pt") | {"stage": "image"}
    torch.save(state, killed / "training_state.pt")
    with pytest.raises(ValueError, match="belongs to a model of another configuration"):
        call(train.main, killed, "--resume")


def test_a_state_holds_nothing_to_execute(killed):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"stage": "image", "evil": Evil()}, killed / "training_state.pt")
    with pytest.raises(ValueError, match="training_state.pt: no training state"):
        call(train.main, killed, "--resume")
