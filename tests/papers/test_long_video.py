"""The commands, with runs of seconds: training, long clips, first frames, interpolation."""

import json
import signal
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import call, flags, make_clip, weights_of

from checkpoints import weights
from media.read import read_clip
from papers import chains, long_video, train_known_frames
from papers.known_frames import load_model
from train import drop_captions
from training.run import Run

SMALL = {"num_clips": 3, "clip_frames": 60, "num_frames": 4, "num_known": 2, "long_steps": 4,
         "long_batch_size": 2, "decoder_steps": 4, "decoder_batch_size": 2, "warmup_steps": 1,
         "save_every": 2, "device": "cpu"}


def train(path, init, *arguments, **options):
    options = {"init": init} | SMALL | options
    for name in train_known_frames.LongOptions(**options).unused():
        options.pop(name, None)
    call(long_video.main, "train", path, *flags(**options), *arguments)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run for known frames, not to be written into."""
    path = tmp_path_factory.mktemp("long") / "run"
    train(path, trained)
    return path


@pytest.mark.parametrize("stage", ["decoder", "long"])
def test_a_stopped_training_continues_bit_for_bit(stage, run, trained, tmp_path, monkeypatch):
    save = Run.save_state

    def stop(self, state):
        save(self, state)
        if state["stage"] == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_state", stop)
        train(tmp_path / "run", trained)
    train(tmp_path / "run", trained, "--resume")
    assert weights_of(tmp_path / "run") == weights_of(run)
    before, after = (weights.load_vae(path / "vae").state_dict() for path in (trained, run))
    assert {name.split(".")[0] for name in before if not before[name].equal(after[name])} == {
        "decoder"}


def test_a_model_with_the_mask_alone_is_trained_and_loaded(trained, tmp_path, monkeypatch):
    texts, widen, unets = set(), train_known_frames.widen, []
    monkeypatch.setattr(train_known_frames, "LARGE", 1000)  # parameters
    monkeypatch.setattr(train_known_frames, "widen", lambda *inputs: (
        unets.append(widen(*inputs)) or unets[0]))
    monkeypatch.setattr(train_known_frames, "drop_captions", lambda found, *rest: (
        texts.update(found) or drop_captions(found, *rest)))
    train(tmp_path / "run", trained, "--no-hold", decoder_steps=0, max_level=100, long_steps=8)
    assert load_model(tmp_path / "run").unet.config.in_channels == 4 + 1
    assert unets[0].gradient_checkpointing
    # Windows that start later than their clip have captions without direction.
    assert len({text.endswith(("left", "right", "up", "down")) for text in texts}) == 2


def test_a_training_without_a_decoder_stage_keeps_its_options(trained, tmp_path, monkeypatch):
    def stop(self, state):
        (self.path / "training_state.pt").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_state", stop)
        train(tmp_path / "run", trained, decoder_steps=0)
    with pytest.raises(ValueError, match="was trained with --long-batch-size 2, not 3"):
        train(tmp_path / "run", trained, "--resume", decoder_steps=0, long_batch_size=3)


def test_a_folder_of_clips_is_trained_on(trained, tmp_path):
    for name, count in (("a", 12), ("b", 9)):
        make_clip(tmp_path / "clips" / f"{name}.gif", num_frames=count)
        (tmp_path / "clips" / f"{name}.txt").write_text("red")
    train(tmp_path / "run", trained, data=tmp_path / "clips", decoder_steps=0)
    call(long_video.main, "sample", tmp_path / "run", "red", "--num-frames", 9, "--output",
         tmp_path / "red.gif")
    assert len(read_clip(tmp_path / "red.gif")[0]) == 9


@pytest.fixture
def draws(monkeypatch):
    """The arguments of each call of draw()."""
    calls, real = [], chains.draw
    monkeypatch.setattr(chains, "draw", lambda *inputs: calls.append(inputs) or real(*inputs))
    return calls


def sample(run, output, *arguments, num_frames=11):
    call(long_video.main, "sample", run, "a red circle moving left", "--num-frames", num_frames,
         "--output", output, *arguments)
    return read_clip(output)[0]


def is_close(a, b):
    return np.abs(a.astype(int) - b).mean() < 3  # a GIF has 256 colours


def test_a_clip_is_written_window_by_window(run, tmp_path, monkeypatch, draws):
    parts, write = [], long_video.write_parts
    monkeypatch.setattr(long_video, "write_parts", lambda path, clips, rate: write(
        path, (parts.append(len(clip)) or clip for clip in clips), rate))
    assert sample(run, tmp_path / "x.gif").shape == (11, 128, 128, 3)
    assert parts == [4, 2, 2, 2, 1]
    # The direction of a caption is wrong after the first bounce.
    (_, image, *_), (_, first, *_), (_, second, *_), (_, third, *_), *_ = draws
    assert image.equal(first) and not first.equal(second) and second.equal(third)


def test_ctrl_c_keeps_the_frames_that_are_drawn(run, tmp_path, monkeypatch):
    whole = sample(run, tmp_path / "whole.gif")
    monkeypatch.setattr(long_video, "stop_signals", lambda: nullcontext([signal.SIGINT]))
    assert np.array_equal(sample(run, tmp_path / "long.gif"), whole[:4])


def test_the_words_that_a_model_does_not_see_are_named(run, capsys):
    assert len(long_video.encode_prompt(load_model(run), "a red circle" + 15 * " left")) == 1
    assert 'the model does not see "left' in capsys.readouterr().err


def test_a_clip_starts_from_an_image_or_a_clip(run, tmp_path, draws):
    make_clip(tmp_path / "start.gif", num_frames=3, gray=200)
    first = sample(run, tmp_path / "a.gif", "--first-frame", tmp_path / "start.gif")
    more = sample(run, tmp_path / "b.gif", "--continue", tmp_path / "start.gif")
    assert len(more) == 11 and is_close(first[0], more[0])
    assert [list(inputs[3]) for inputs in draws[:2]] == [[0], [0, 1]]
    with pytest.raises(ValueError, match="start.gif: needs 2 frames or more, .* 3, got 3"):
        sample(run, "x.gif", "--continue", tmp_path / "start.gif", num_frames=3)


def test_flags_reach_the_model_and_the_file(run, tmp_path, draws):
    sample(run, tmp_path / "x.gif", "--key-frames", 4, "--frame-rate", 20, "--num-steps", 2,
           "--perturbation", 30, "--guidance", 0.5)
    assert [inputs[4] for inputs in draws[:2]] == [8.0, 5.0]  # the image has the run's own rate
    assert {inputs[4] for inputs in draws[2:]} == {5.0, 20.0}
    assert read_clip(tmp_path / "x.gif")[1] == pytest.approx(20)
    how = draws[-1][6]
    assert (how.num_steps, how.level, how.known_scale) == (2, 30, 0.5)


def test_frames_are_drawn_between_those_of_a_clip(run, tmp_path):
    make_clip(tmp_path / "a.gif", num_frames=3)
    call(long_video.main, "interpolate", run, tmp_path / "a.gif", "--frames-between", 4,
         "--output", tmp_path / "b.gif")
    first = sample(run, tmp_path / "c.gif", "--first-frame", tmp_path / "a.gif")[0]
    frames = read_clip(tmp_path / "b.gif")[0]
    assert len(frames) == 11 and is_close(frames[0], first)


def test_an_evaluation_is_kept_in_the_run(run, monkeypatch):
    monkeypatch.setattr(long_video, "evaluate", lambda model, chain, num_clips, num_frames, seed: {
        "frames": num_frames, "clips": num_clips})
    call(long_video.main, "evaluate", run, "--num-frames", 208, "--perturbation", 4)
    found = json.loads((run / "long_evaluation.json").read_text())
    assert (found["frames"], found["clips"], found["chain"]["how"]["level"]) == (208, 32, 4)
