"""The commands, with a run of seconds: long clips, stops, first frames, interpolation."""

import json
import os
import signal

import numpy as np
import pytest
from helpers import call, flags, make_clip
from PIL import Image

from media.read import read_clip
from media.write import to_uint8
from papers import chains, long_video
from papers.known_frames import load_model

SMALL = {"num_clips": 3, "clip_frames": 60, "num_frames": 4, "num_known": 2, "long_steps": 2,
         "long_batch_size": 2, "decoder_steps": 2, "decoder_batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run for known frames, not to be written into."""
    path = tmp_path_factory.mktemp("long") / "run"
    call(long_video.main, "train", path, *flags(init=trained, **SMALL))
    return path


def sample(run, output, *arguments, num_frames=11):
    call(long_video.main, "sample", run, "a red circle moving left", "--num-frames", num_frames,
         "--output", output, *arguments)
    return read_clip(output)[0]


@pytest.mark.parametrize("arguments", [(), ("--key-frames", 2), ("--key-frames", 4)])
def test_a_clip_has_the_number_of_frames_asked_for(run, tmp_path, arguments):
    assert sample(run, tmp_path / "long.gif", *arguments).shape == (11, 16, 16, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["long.gif"]


def test_ctrl_c_keeps_the_frames_that_are_drawn(run, tmp_path, monkeypatch):
    whole, real, calls = sample(run, tmp_path / "whole.gif"), chains.draw, []

    def stop(*inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*inputs)

    monkeypatch.setattr(chains, "draw", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped after 8 of 11 new frames"):
        sample(run, tmp_path / "long.gif")
    assert np.array_equal(read_clip(tmp_path / "long.gif")[0], whole[:8])


def test_memory_does_not_grow_with_the_number_of_frames(run, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(long_video, "write_parts", lambda path, clips, rate: parts.extend(
        len(clip) for clip in clips))
    call(long_video.main, "sample", run, "a red circle", "--num-frames", 30, "--output", "x.gif")
    assert parts == [4] + 13 * [2]  # decoded window by window


def test_an_image_of_any_size_can_be_the_first_frame(run, tmp_path):
    Image.new("RGB", (90, 50), (255, 40, 40)).save(tmp_path / "red.png")
    clip = sample(run, tmp_path / "long.gif", "--first-frame", tmp_path / "red.png")
    other = sample(run, tmp_path / "other.gif")
    assert len(clip) == 11 and not np.array_equal(clip[0], other[0])


def coded(run, path):
    """The frames of a clip, as the run's autoencoder shows them."""
    model = load_model(run).to("cpu")
    return to_uint8(model.decode(long_video.encode_frames(model, path))[0])


@pytest.mark.parametrize("arguments", [(), ("--key-frames", 2)])
def test_a_continued_clip_comes_first(run, tmp_path, arguments):
    start = tmp_path / "start.gif"
    sample(run, start, num_frames=6)
    clip = sample(run, tmp_path / "long.gif", "--continue", start, *arguments)
    assert len(clip) == 11
    assert np.abs(clip[:6].astype(int) - coded(run, start)).mean() < 2  # a GIF has 256 colours


@pytest.mark.parametrize("count, arguments", [(1, ()), (11, ()), (4, ("--key-frames", 2))])
def test_a_clip_that_is_too_short_or_too_long_is_not_continued(run, tmp_path, count, arguments):
    make_clip(tmp_path / "start.gif", num_frames=count)
    with pytest.raises(ValueError, match=f"--continue .*start.gif: needs .* got {count}"):
        sample(run, tmp_path / "x.gif", "--continue", tmp_path / "start.gif", *arguments)




def test_the_frame_rate_reaches_the_model_and_the_file(run, tmp_path, monkeypatch):
    real, rates = chains.draw, set()
    monkeypatch.setattr(chains, "draw", lambda *inputs: rates.add(inputs[4]) or real(*inputs))
    sample(run, tmp_path / "x.gif", "--key-frames", 4, "--frame-rate", 20)
    assert rates == {5.0, 20.0} and read_clip(tmp_path / "x.gif")[1] == pytest.approx(20)


def test_shapes_lose_their_direction_after_the_first_window(run, tmp_path, monkeypatch):
    real, contexts = chains.draw, []
    monkeypatch.setattr(chains, "draw", lambda *inputs: contexts.append(inputs[1]) or real(*inputs))
    sample(run, tmp_path / "x.gif")
    model = load_model(run).to("cpu")
    expected = model.encode_text(["a red circle moving left"]), model.encode_text(["a red circle"])
    assert contexts[0].equal(expected[0]) and all(x.equal(expected[1]) for x in contexts[1:])


def test_frames_are_drawn_between_those_of_a_clip(run, tmp_path):
    make_clip(tmp_path / "a.gif", num_frames=3)
    call(long_video.main, "interpolate", run, tmp_path / "a.gif", "--frames-between", 4,
         "--output", tmp_path / "b.gif")
    frames = read_clip(tmp_path / "b.gif")[0]
    assert len(frames) == 11
    assert np.abs(frames[::5].astype(int) - coded(run, tmp_path / "a.gif")).mean() < 2



def test_an_evaluation_is_kept_in_the_run(run, monkeypatch):
    monkeypatch.setattr(long_video, "evaluate", lambda model, chain, num_clips, num_frames, seed: {
        "frames": num_frames, "clips": num_clips})
    call(long_video.main, "evaluate", run, "--num-frames", 208, "--key-frames", 4)
    found = json.loads((run / "long_evaluation.json").read_text())
    assert (found["frames"], found["clips"], found["chain"]["key_frames"]) == (208, 32, 4)
