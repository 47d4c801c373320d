"""Training: what a step computes, and that no kill, flag or damaged file spoils a run."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, call, flags, train_small
from torch import nn

import losses
import train
import trainer
import vae
from diffusion import Diffusion
from pictures import write_clip
from recipe import RECIPES, STAGES, TrainOptions, merge_options
from trainer import Average, Metrics, Plan, Trainer, learning_rate_at, step_generator
from weights import load_pipeline

ROOT = Path(train.__file__).parent


def weights_of(path):
    """The bytes of everything that training has made, but for its clock and its options."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = [file.relative_to(path).as_posix() for file in files]
    return {
        name: file.read_bytes() for name, file in zip(names, files, strict=True)
        if name not in ("metrics.jsonl", "train.json") and "previews" not in name
    }  # fmt: skip


def metrics_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


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

    def optimise_or_act(self, forward):
        if (self.plan.stage, self.step) == (stage, step):
            action()
        return optimise(self, forward)

    monkeypatch.setattr(Trainer, "_optimise", optimise_or_act)


def fail(error):
    raise error


def kill_at(path, stage, step, **options):
    """Train a run that is killed just before a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        before_step(patch, stage, step, lambda: fail(Killed))
        train_small(path, **options)


# A toy objective, for what the loop does by itself


class Line(nn.Module):
    """Fits y = a x + b; b learns at a tenth of the rate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))

    def parameter_groups(self):
        return [([self.a], 1.0), ([self.b], 0.1)]

    def forward(self, x, y):
        return (self.a * x + self.b - y).square().mean()


def points(step, micro=0):
    x = torch.randn(4, generator=step_generator(0, "line", step, micro))
    return x, 3 * x + 2


def line_trainer(path, make_batch=points, num_steps=6, **options):
    path.mkdir(exist_ok=True)
    plan = Plan("vae", num_steps, 0.1, Line(), make_batch, lambda step: None)
    options = TrainOptions(log_every=2, save_every=2, warmup_steps=0, **options)
    return Trainer(path, plan, options, torch.device("cpu"))


# The loop


def test_the_learning_rate_rises_and_falls_as_worked_out_by_hand():
    rates = [learning_rate_at(step, 100, 2.0, 10) for step in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([
        0.2, 1.0 * (0.5 + 0.5 * math.cos(0.04 * math.pi)), 1 + math.cos(0.09 * math.pi), 1.0,
        1 + math.cos(0.99 * math.pi),
    ])  # fmt: skip


def test_without_warm_up_the_first_rate_is_the_peak():
    assert learning_rate_at(0, 100, 2.0, 0) == 2.0


def test_each_group_learns_at_its_part_of_the_rate(tmp_path):
    trainer = line_trainer(tmp_path, num_steps=1, weight_decay=0.0)
    trainer.run()
    # AdamW's first step is the learning rate, whatever the gradient; the average takes 0.9 of it.
    a, b = (parameter.item() for parameter in trainer.parameters)
    assert (abs(a - 0.5), abs(b)) == pytest.approx((0.9 * 0.1, 0.9 * 0.01), rel=1e-4)


def test_the_average_equals_a_loop_by_hand():
    parameter, expected = nn.Parameter(torch.tensor([1.0])), 1.0
    average = Average([parameter], decay=0.4)
    for step, value in enumerate([2.0, -1.0, 5.0, 3.0, 0.0, 4.0, 1.0]):
        parameter.data.fill_(value)
        average.update(step)
        decay = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4][step]  # warms up until 0.4
        expected = decay * expected + (1 - decay) * value
    assert average.values[0].item() == pytest.approx(expected, rel=1e-6)


def test_the_average_can_stand_in_for_the_weights_and_leaves_again():
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], decay=0.5)
    parameter.data.fill_(7.0)
    with pytest.raises(Killed), average.swapped():
        assert parameter.item() == 1.0
        raise Killed
    assert parameter.item() == 7.0


def test_a_stage_ends_with_the_weights_of_the_average(tmp_path):
    trainer = line_trainer(tmp_path)
    trainer.run()
    assert_equal([p.detach() for p in trainer.parameters], trainer.average.values)
    assert trainer.average.values[0] != torch.load(trainer.state_path)["parameters"][0]


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    def both(step, micro):
        return [torch.cat(pair) for pair in zip(points(step, 0), points(step, 1), strict=True)]

    halves = line_trainer(tmp_path / "2", points, accumulate=2)
    whole = line_trainer(tmp_path / "1", both)
    halves.run(), whole.run()
    a, b = ([value.item() for value in each.average.values] for each in (halves, whole))
    assert a == pytest.approx(b, rel=1e-4)
    assert metrics_of(tmp_path / "2")[-1]["loss"] == pytest.approx(
        metrics_of(tmp_path / "1")[-1]["loss"], rel=1e-5
    )


def test_gradients_are_clipped(tmp_path):
    trainer = line_trainer(tmp_path, num_steps=1, gradient_clip=0.5)
    norms, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (
        norms.append(torch.stack([p.grad for p in trainer.parameters]).norm().item()), step()
    )  # fmt: skip
    trainer.run()
    assert norms == pytest.approx([0.5], rel=1e-4)


def test_metrics_have_the_mean_loss_of_each_interval(tmp_path, monkeypatch):
    seen, forward = [], Line.forward
    monkeypatch.setattr(Line, "forward", lambda *a: seen.append(forward(*a)) or seen[-1])
    line_trainer(tmp_path, num_steps=5).run()
    means = [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2, seen[4]]
    entries = metrics_of(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["loss"] for entry in entries] == pytest.approx([m.item() for m in means])


def test_a_resume_drops_the_lines_of_the_steps_that_it_repeats(tmp_path):
    lines = [
        {"stage": "vae", "step": 9}, {"stage": "image", "step": 2}, {"stage": "image", "step": 4},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "image", "st')  # cut by a kill
    Metrics(tmp_path / "metrics.jsonl", "image", 2)
    assert metrics_of(tmp_path) == lines[:2]


# What is random


def test_a_batch_depends_on_seed_stage_step_and_micro_batch_alone():
    def draw(*key):
        return torch.randn(3, generator=step_generator(*key)).tolist()

    keys = [(0, "vae", 1, 0), (1, "vae", 1, 0), (0, "image", 1, 0), (0, "vae", 2, 0),
            (0, "vae", 1, 1)]  # fmt: skip
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(values) for values in draws}) == len(keys)


def test_processes_draw_different_batches(monkeypatch):
    draws = set()
    for rank in range(3):
        monkeypatch.setattr(trainer, "processes", lambda rank=rank: (rank, 3))
        draws |= {step_generator(0, "vae", step).initial_seed() for step in range(4)}
    assert len(draws) == 12


def fake_run(**options):
    return SimpleNamespace(options=TrainOptions(**options), to_device=lambda *tensors: tensors)


CAPTIONS = ["zero", "one", "two"]
TEXTS = {"": torch.tensor([-1]), **{name: torch.tensor([i]) for i, name in enumerate(CAPTIONS)}}
# Frame f of clip i holds 100 i + f, so a batch shows where it comes from.
LATENTS = [torch.arange(9.0)[:, None, None, None].expand(9, 4, 2, 2) + 100 * i for i in range(3)]


def batches(stage, **options):
    return train.denoising_batches(fake_run(**options), stage, LATENTS, CAPTIONS, TEXTS)


def test_a_batch_has_successive_frames_and_their_caption():
    make_batch = batches("video", video_batch_size=200, num_frames=5, caption_dropout=0.0)
    x0, _, _, context = make_batch(0, 0)
    first = x0[:, 0, 0, 0, 0]
    assert torch.equal(x0[:, :, 0, 0, 0], first[:, None] + torch.arange(5))
    assert torch.equal((first // 100).long(), context[:, 0])
    assert set((first % 100).tolist()) == {0, 1, 2, 3, 4}  # all windows that fit into 9 frames


def test_captions_are_left_out_as_often_as_asked_for():
    make_batch = batches("image", image_batch_size=5000, caption_dropout=0.2)
    x0, _, _, context = make_batch(0, 0)
    dropped = context[:, 0] == -1
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal((x0[~dropped, 0, 0, 0, 0] // 100).long(), context[~dropped, 0])


def test_frames_of_a_clip_share_the_part_of_the_noise_asked_for():
    _, noise, _, _ = batches("video", video_batch_size=2000, num_frames=3, shared_noise=0.3)(0, 0)
    a, b = noise[:, 0].flatten(), noise[:, 2].flatten()
    assert ((a * b).mean().item(), a.var().item()) == pytest.approx((0.3, 1.0), abs=0.05)


def test_some_steps_of_the_video_stage_see_as_many_pictures():
    make_batch = batches("video", video_batch_size=2, num_frames=5, image_every=3)
    shapes = [tuple(make_batch(step, 0)[0].shape[:2]) for step in range(6)]
    assert shapes == [(2, 5), (2, 5), (10, 1)] * 2


def test_without_image_every_all_steps_see_clips():
    make_batch = batches("video", video_batch_size=2, num_frames=5, image_every=0)
    assert {tuple(make_batch(step, 0)[0].shape[:2]) for step in range(20)} == {(2, 5)}


@pytest.mark.parametrize("step, prefer", [(0, 3.0), (25, 1.5), (50, 0.0), (90, 0.0)])
def test_early_steps_prefer_noisy_timesteps(step, prefer):
    make_batch = batches("video", video_batch_size=9000, num_frames=2, video_steps=100,
                         early_noise=3.0, image_every=0)  # fmt: skip
    timesteps = make_batch(step, 0)[2]
    # The mean of u^(1 / (1 + p)), u uniform in [0, 1], is (1 + p) / (2 + p).
    mean = 1000 * (1 + prefer) / (2 + prefer) - 0.5
    assert timesteps.float().mean().item() == pytest.approx(mean, abs=15)
    assert timesteps.min() >= 0 and timesteps.max() <= 999


# Losses


class Nothing(nn.Module):
    """A network that answers 0, as a U-Net or as an autoencoder whose Gaussian is N(1, 1)."""

    def forward(self, latents, timesteps, context):
        return torch.zeros_like(latents)

    def encode(self, x):
        ones = torch.ones(len(x), 4, 1, 1)
        return vae.DiagonalGaussian(ones, torch.zeros_like(ones))

    def decode(self, z):
        return torch.zeros(len(z), 3, 4, 4)


def test_the_reconstruction_loss_by_hand():
    x = torch.full((1, 3, 4, 4), 0.5)
    x[0, 0, 2, 1] = 1.0  # one of 16 pixels differs from the background, in one channel
    loss = losses.ReconstructionLoss(Nothing(), TrainOptions(motion_weight=4.0, kl_weight=0.1))
    error = (15 * 3 * 0.25 + 5 * (1.0 + 0.25 + 0.25)) / 48
    kl = 0.5  # nats a latent number, of N(1, 1) from N(0, 1)
    assert loss(x, torch.zeros(1, 4, 1, 1)).item() == pytest.approx(error + 0.1 * kl)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_network_that_predicts_nothing_loses_the_square_of_the_target(prediction_type):
    diffusion = Diffusion(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    timesteps = torch.tensor([10, 900])
    loss = losses.DenoisingLoss(Nothing(), diffusion)(x0, noise, timesteps, torch.zeros(2, 1, 8))
    target = diffusion.target(x0, noise, timesteps)
    assert loss.item() == pytest.approx((target**2).mean().item())


# A whole run


def test_training_leaves_a_folder_in_the_layout_of_diffusers(trained):
    assert {file.relative_to(trained).as_posix() for file in trained.rglob("*.*")} == {
        "model_index.json", "sampling.json", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "image_unet/config.json", "image_unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "train.json", "metrics.jsonl",
    }  # fmt: skip


def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = weights_of(run)
    call(train.main, run)
    assert capsys.readouterr().out == f"{run}: all stages are finished\n"
    assert weights_of(run) == before


def test_metrics_have_a_line_for_each_interval_of_each_stage(trained):
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(trained)]
    assert steps == [(stage, step) for stage in STAGES for step in (2, 4)]


def test_training_changes_every_weight_of_every_network(trained):
    for stage in STAGES:
        early, late = (torch.load(trained.parent / f"states/{stage}-{s}.pt") for s in (2, 4))
        for a, b in zip(early["parameters"], late["parameters"], strict=True):
            assert not torch.equal(a, b)


def test_the_video_stage_leaves_the_text_encoder_alone(trained):
    state = torch.load(trained.parent / "states/video-4.pt")
    assert len(state["parameters"]) == len(list(load_pipeline(trained).unet.parameters()))


def test_latents_of_the_training_clips_have_mean_zero_and_unit_variance(trained):
    autoencoder = load_pipeline(trained).vae
    clips, _ = train.open_data(TrainOptions(num_clips=8, num_frames=3, image_size=16))
    latents = torch.cat([vae.encode_clip(autoencoder, clip) for clip in clips])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_stage_after_stage_equals_one_call(trained, tmp_path):
    for stage in STAGES:
        train_small(tmp_path / "run", "--stage", stage)
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_free_options_and_previews_do_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", log_every=3, save_every=1, preview_every=1)
    assert weights_of(tmp_path / "run") == weights_of(trained)
    names = {f"{stage}-00000{step}" for stage in STAGES for step in (1, 2, 3)}
    assert {file.stem for file in (tmp_path / "run/previews").iterdir()} == names


def test_gradient_checkpointing_does_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", "--gradient-checkpointing")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_another_seed_gives_another_model(trained, tmp_path):
    train_small(tmp_path / "run", seed=1)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(trained)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert ours[name] != theirs[name]


def test_every_clip_is_encoded_once_in_each_stage(tmp_path, monkeypatch):
    calls, encode_clip = [], vae.encode_clip
    monkeypatch.setattr(vae, "encode_clip", lambda *a: calls.append(1) or encode_clip(*a))
    train_small(tmp_path / "run")
    assert len(calls) == len(STAGES) * SMALL["num_clips"]


def test_a_folder_of_clips_is_trained_on(tmp_path):
    for i, name in enumerate(("a dog", "a cat", "a dog again")):
        clip = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 20, 24) * (i + 1) / 3
        write_clip(tmp_path / f"clips/{i}.gif", clip, 10)
        (tmp_path / f"clips/{i}.txt").write_text(name)
    train_small(tmp_path / "run", data=tmp_path / "clips")
    pipeline = load_pipeline(tmp_path / "run")
    ids = pipeline.tokenizer(["a dog again"])[0]
    assert len(ids[ids != pipeline.tokenizer.pad_id]) <= 5  # its words have become tokens
    *_, latents = pipeline.sample(["a dog"], [0])
    assert pipeline.decode(latents).shape == (1, 3, 3, 16, 16)


# Ends before the end


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, tmp_path, stage):
    kill_at(tmp_path / "run", stage, 3)
    assert torch.load(tmp_path / "run/training_state.pt")["step"] == 2
    train_small(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_and_average_after_a_resume_are_those_without_a_kill(trained, tmp_path, stage):
    for step in (3, 4):  # the second time, at the end of the stage
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            before_step(patch, stage, 3, lambda: fail(Killed))
            if step == 4:
                patch.undo()
                patch.setattr(train.Run, "finish", finish_until(stage))
            train_small(tmp_path / "run", "--resume")
    states = [tmp_path / "run/training_state.pt", trained.parent / f"states/{stage}-4.pt"]
    assert_equal(*(torch.load(state, weights_only=True) for state in states))


def finish_until(stage):
    """Run.finish, and a kill just before it notes that a stage is done."""
    finish = train.Run.finish
    return lambda self, name: fail(Killed) if name == stage else finish(self, name)


def test_metrics_after_a_resume_are_those_without_a_kill(trained, tmp_path):
    kill_at(tmp_path / "run", "image", 3, log_every=1)
    train_small(tmp_path / "run", "--resume", log_every=1)
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(tmp_path / "run")]
    assert steps == [(stage, step) for stage in STAGES for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_just_before_a_stage_is_noted_as_done_is_survived(trained, tmp_path, stage):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, "finish", finish_until(stage))
        train_small(tmp_path / "run")
    train_small(tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["plainly", "with --resume"])
def test_a_kill_just_after_a_stage_is_noted_as_done_is_survived(trained, tmp_path, more):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: (
            fail(Killed) if self.name == "training_state.pt" else None
        ))  # fmt: skip
        train_small(tmp_path / "run")
    assert (tmp_path / "run/training_state.pt").exists()
    train_small(tmp_path / "run", *more)
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_ctrl_c_in_the_last_step_of_a_stage_stops_and_goes_on(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(trainer.Stopped, match="step 4 of the vae"):
        before_step(patch, "vae", 3, lambda: signal.raise_signal(signal.SIGINT))
        train_small(tmp_path / "run")
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


def test_the_handlers_of_signals_are_those_from_before_again(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    line_trainer(tmp_path).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def start(path, *more):
    """train.py in a process of its own, without an end in sight, when it has saved a state."""
    words = flags(**SMALL | {"vae_steps": 1_000_000, "save_every": 1, "log_every": 1})
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", path, *words, *more], stderr=subprocess.PIPE, text=True
    )
    wait_for_state(path, process)
    return process


def wait_for_state(path, process):
    """Wait until a process has saved a new state."""

    def modified():
        state = path / "training_state.pt"
        return state.stat().st_mtime_ns if state.exists() else None

    before = modified()
    while modified() == before:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_kill_9_leaves_a_state_that_goes_on(tmp_path):
    with start(tmp_path / "run") as process:
        process.kill()
    first = torch.load(tmp_path / "run/training_state.pt", weights_only=True)["step"]
    with start(tmp_path / "run", "--resume") as process:
        process.kill()
    assert torch.load(tmp_path / "run/training_state.pt", weights_only=True)["step"] > first >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_one_line_and_the_state_of_its_step(tmp_path, number):
    with start(tmp_path / "run") as process:
        process.send_signal(number)
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
    places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [
        subprocess.Popen(
            command, env=os.environ | common | place, stderr=subprocess.PIPE, text=True
        )
        for place in places
    ]  # fmt: skip
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


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    endless = {"vae_steps": 1_000_000, "save_every": 1}
    with two_processes(tmp_path / "run", **endless) as (first, second):
        wait_for_state(tmp_path / "run", first)
        second.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    step = torch.load(tmp_path / "run/training_state.pt")["step"]
    assert all(f"\nstopped at step {step} of the vae stage" in text for text in errors)


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    forward, calls = losses.ReconstructionLoss.forward, []

    def forward_until(self, *batch):
        calls.append(1)
        return forward(self, *batch) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(losses.ReconstructionLoss, "forward", forward_until)
    with pytest.raises(ValueError, match="the loss of the vae stage is not finite at step 4"):
        train_small(tmp_path / "run")
    state = torch.load(tmp_path / "run/training_state.pt")
    assert state["step"] == 2
    assert all(parameter.isfinite().all() for parameter in state["parameters"])


@pytest.mark.parametrize("stage", STAGES)
def test_an_enormous_learning_rate_saves_no_weights(tmp_path, stage):
    with pytest.raises(ValueError, match=f"the {stage} stage is not finite .* lower --{stage}-lea"):
        train_small(tmp_path / "run", **{f"{stage}_learning_rate": 1e30, "save_every": 1})
    part = {"vae": "vae", "image": "image_unet", "video": "unet"}[stage]
    if stage == "video":  # the picture model of the stage before still draws
        assert load_pipeline(tmp_path / "run").sampling.num_frames == 1
    else:
        assert not (tmp_path / "run" / part).exists()


def test_weights_that_are_not_finite_are_not_saved_whatever_the_loss(tmp_path):
    trainer = line_trainer(tmp_path)
    trainer.save_state()
    before = trainer.state_path.read_bytes()
    trainer.parameters[1].data.fill_(math.inf)
    with pytest.raises(ValueError, match="the model of the vae stage is not finite"):
        trainer.save_state()
    assert trainer.state_path.read_bytes() == before


# Refusals


@pytest.fixture
def killed(tmp_path, unfinished):
    """A copy of a run that was killed in its image stage."""
    return shutil.copytree(unfinished, tmp_path / "killed")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    path = tmp_path_factory.mktemp("unfinished") / "run"
    kill_at(path, "image", 3)
    return path


def test_an_unfinished_stage_is_not_trained_over(killed):
    before = weights_of(killed)
    with pytest.raises(ValueError, match="add --resume to go on with it, or remove that file"):
        call(train.main, killed)
    assert weights_of(killed) == before


def test_an_unfinished_stage_can_be_started_anew(killed, trained):
    (killed / "training_state.pt").unlink()
    train_small(killed)
    assert weights_of(killed) == weights_of(trained)


@pytest.mark.parametrize("stage, message", [
    ("vae", "the vae stage of .* is finished; choose a new folder"),
    ("video", "--stage video needs the image stage of .*, which is not finished"),
])  # fmt: skip
def test_a_stage_out_of_turn_is_refused(killed, stage, message):
    with pytest.raises(ValueError, match=message):
        call(train.main, killed, "--stage", stage, "--resume")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and no run; choose a new folder"):
        train_small(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        train_small(tmp_path / "run", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [
    {"seed": 1}, {"image_size": 32}, {"num_clips": 9}, {"temporal": "none"}, {"preset": "small"},
    {"vae_steps": 5}, {"image_steps": 5}, {"gradient_checkpointing": True}, {"data": "clips"},
])  # fmt: skip
def test_an_option_that_differs_from_the_runs_is_refused_by_name(killed, given):
    ((name, value),) = given.items()
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"was trained with {flag} .*, not {value}; choose a new"):
        merge_options(killed, given)


@pytest.mark.parametrize("given", [
    {"log_every": 7}, {"save_every": 7}, {"preview_every": 7}, {"device": "cuda"},
    {"precision": "fp32"}, {"compile": True}, {"video_steps": 5}, {"video_batch_size": 1},
    {"video_learning_rate": 0.5}, {"seed": 0},
])  # fmt: skip
def test_what_does_not_touch_the_past_may_differ(killed, given):
    ((name, value),) = given.items()
    options, finished = merge_options(killed, given)
    assert getattr(options, name) == value and finished == ["vae"]


def test_a_finished_run_is_what_its_options_say(run):
    with pytest.raises(ValueError, match="--image-size 16, not 32"):
        call(train.main, run, "--image-size", 32)


def test_options_that_are_not_given_are_the_runs_own(killed):
    options, _ = merge_options(killed, {})
    assert options == dataclasses.replace(RECIPES["tiny"], **SMALL)


def test_a_preset_brings_its_own_defaults(tmp_path):
    options, finished = merge_options(tmp_path / "run", {"preset": "small", "seed": 5})
    assert options == dataclasses.replace(RECIPES["small"], seed=5) and finished == []


@pytest.mark.parametrize("text, message", [
    ("", "not a JSON file"), ('{"options": {"seed"', "not a JSON file"),
    ("[]", "needs a JSON object"), ("{}", "damaged, or of another version"),
    ('{"options": {"speed": 3}, "finished": []}', "damaged, or of another version .*speed"),
    ('{"options": {"seed": "x"}, "finished": []}', "damaged, or of another version"),
    ('{"options": [], "finished": []}', "damaged, or of another version"),
    ('{"options": {}, "finished": 3}', "damaged, or of another version"),
    ('{"options": {}, "finished": ["gan"]}', "damaged, or of another version"),
    ('{"options": {"preset": "big"}, "finished": []}', "damaged, or of another version"),
])  # fmt: skip
def test_a_damaged_record_is_refused_by_name(killed, text, message):
    (killed / "train.json").write_text(text)
    with pytest.raises(ValueError, match=f"train.json: {message}"):
        call(train.main, killed, "--resume")


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:1000], lambda raw: raw[:-100], lambda raw: b"hello" * 50,
    lambda raw: b"\x80\x02" + bytes(50), lambda raw: raw[1000:],
], ids=["empty", "a beginning", "cut", "a text", "a pickle", "an end"])  # fmt: skip
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


@pytest.mark.parametrize("options, message", [
    ({"image_size": 20}, "--image-size needs a multiple of 8, got 20"),
    ({"preset": "small", "image_size": 40}, "--image-size needs a multiple of 16, got 40"),
    ({"video_steps": 0}, "--video-steps needs >= 1, got 0"),
    ({"seed": -1}, "--seed needs >= 0, got -1"),
    ({"max_tokens": 2}, "--max-tokens needs >= 3, got 2"),
    ({"vae_learning_rate": -0.1}, "--vae-learning-rate needs >= 0"),
    ({"kl_weight": math.nan}, "--kl-weight needs >= 0, got nan"),
    ({"caption_dropout": 1.5}, r"--caption-dropout needs to lie in \[0, 1\], got 1.5"),
    ({"frames_per_second": 0}, "frames_per_second needs"),
    ({"num_steps": 2000}, "num_steps needs"),
    ({"prediction_type": "epsilon"}, "cannot start from zero terminal SNR"),
])  # fmt: skip
def test_what_a_later_stage_could_not_do_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES[options.get("preset", "tiny")], **options)


def test_every_option_has_a_help_text_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        call(train.main, "--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainOptions):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_the_schedule_divides_the_signal_to_noise_ratio(divisor):
    def ratio(diffusion):
        return diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)

    plain = TrainOptions(snr_divisor=1.0, zero_terminal_snr=False).diffusion()
    divided = TrainOptions(snr_divisor=divisor, zero_terminal_snr=False).diffusion()
    assert torch.allclose(ratio(divided), ratio(plain) / divisor, rtol=1e-9)


def test_the_last_timestep_is_pure_noise_if_asked_for():
    assert TrainOptions().diffusion().alphas_cumprod[-1] == 0
    assert TrainOptions(zero_terminal_snr=False).diffusion().alphas_cumprod[-1] > 0
