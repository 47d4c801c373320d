"""The commands, with a run of seconds: long clips, stops, resumes, refusals, key frames."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import call, flags, make_clip, metrics_of, weights_of
from PIL import Image

from media.read import read_clip
from media.write import to_uint8
from papers import chains, key_frames, long_video
from papers.train_known_frames import Trainer
from sample import main as sample_main

SMALL = {"num_clips": 3, "clip_frames": 60, "num_frames": 4, "num_known": 2, "long_steps": 4,
         "long_batch_size": 2, "decoder_steps": 4, "decoder_batch_size": 2, "warmup_steps": 1,
         "log_every": 2, "save_every": 2, "device": "cpu"}


def train(path, init, *arguments, **options):
    call(long_video.main, "train", path, *flags(init=init, **SMALL | options), *arguments)


@pytest.fixture(scope="module")
def long_run(trained, tmp_path_factory):
    """A run for known frames, not to be written into."""
    path = tmp_path_factory.mktemp("long") / "run"
    train(path, trained)
    return path


def draw(run, output, *arguments, num_frames=11):
    call(long_video.main, "sample", run, "a red circle moving left", "--num-frames", num_frames,
         "--output", output, *arguments)
    return read_clip(output)[0]


def test_a_training_leaves_a_model_with_conditions_and_more_channels(long_run):
    config = json.loads((long_run / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"], config["num_conditions"]) == (15, 4, 2)
    assert metrics_of(long_run)[-1]["step"] == 4
    assert not (long_run / "training_state.pt").exists()


@pytest.mark.parametrize("stage", ["decoder", "long"])
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    stage, long_run, trained, tmp_path, monkeypatch
):
    save = Trainer.save_state

    def stop(self):
        save(self)
        if self.stage == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save_state", stop)
        train(tmp_path / "run", trained)
    train(tmp_path / "run", trained, "--resume")
    mine, other = weights_of(tmp_path / "run"), weights_of(long_run)
    assert mine["unet/diffusion_pytorch_model.safetensors"] == (
        other["unet/diffusion_pytorch_model.safetensors"])


def test_other_options_need_another_folder(long_run, trained):
    with pytest.raises(ValueError, match="was trained with --num-known 2, not 3"):
        train(long_run, trained, num_known=3)


@pytest.mark.parametrize("arguments", [(), ("--hierarchical",)])
def test_a_long_clip_has_as_many_frames_as_asked_for(long_run, tmp_path, arguments):
    assert draw(long_run, tmp_path / "long.gif", *arguments).shape == (11, 16, 16, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["long.gif"]


@pytest.mark.parametrize("suffix", ["webp", "gif"])
@pytest.mark.parametrize("arguments", [(), ("--hierarchical",)])
def test_a_stopped_sampling_goes_on_with_the_same_frames(long_run, tmp_path, monkeypatch, arguments,
                                                         suffix):
    whole = draw(long_run, tmp_path / f"whole.{suffix}", *arguments, num_frames=23)
    real, calls = chains.draw, []

    def stop(*inputs):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C: the window is finished
        return real(*inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="with --resume"):
        patch.setattr(chains, "draw", stop)
        draw(long_run, tmp_path / f"long.{suffix}", *arguments, num_frames=23)
    part = read_clip(tmp_path / f"long.{suffix}")[0]
    assert 0 < len(part) < 23 and np.array_equal(part, whole[: len(part)])
    resumed = draw(long_run, tmp_path / f"long.{suffix}", "--resume", *arguments, num_frames=23)
    assert np.array_equal(resumed, whole)


def test_a_stop_while_old_windows_are_decoded_again_loses_nothing(long_run, tmp_path, monkeypatch):
    output = tmp_path / "long.gif"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(long_video, "write_parts", lambda path, parts, rate: fail(list(parts)))
        draw(long_run, output)  # all is drawn, and nothing written
    real = long_video.LatentsFile.windows

    def stop(self):
        for window in real(self):
            yield window
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="4 of 11 frames"):
        patch.setattr(long_video.LatentsFile, "windows", stop)
        draw(long_run, output, "--resume")
    assert len(draw(long_run, output, "--resume")) == 11


def fail(_):
    raise OSError("full")


def test_an_unfinished_sampling_is_not_started_anew_by_mistake(long_run, tmp_path):
    (tmp_path / "long.gif.latents").write_bytes(b"{}\n123")
    with pytest.raises(ValueError, match="unfinished sampling; add --resume"):
        draw(long_run, tmp_path / "long.gif")
    assert (tmp_path / "long.gif.latents").read_bytes() == b"{}\n123"


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_drawn(long_run, tmp_path):
    with pytest.raises(ValueError, match="needs one of the suffixes"):
        draw(long_run, tmp_path / "long.avi")
    assert not list(tmp_path.iterdir())


def test_a_training_that_never_began_can_change_its_options(trained, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        train(tmp_path / "run", tmp_path / "typo")
    train(tmp_path / "run", trained)


def test_a_model_for_known_frames_is_no_video_model_to_start_from(long_run, tmp_path):
    with pytest.raises(ValueError, match="is a model for known frames already"):
        train(tmp_path / "run", long_run)


def test_a_resume_of_another_sampling_is_refused(long_run, tmp_path):
    (tmp_path / "long.gif.latents").write_text('{"prompt": "another"}\n')
    with pytest.raises(ValueError, match="is of another sampling"):
        draw(long_run, tmp_path / "long.gif", "--resume")


def test_an_image_of_any_size_can_be_the_first_frame(long_run, tmp_path):
    Image.new("RGB", (90, 50), (255, 40, 40)).save(tmp_path / "red.png")
    clip = draw(long_run, tmp_path / "long.gif", "--first-frame", tmp_path / "red.png")
    other = draw(long_run, tmp_path / "other.gif")
    assert len(clip) == 11 and not np.array_equal(clip[0], other[0])


def test_a_clip_is_continued(long_run, tmp_path):
    start = draw(long_run, tmp_path / "start.gif", num_frames=6)
    clip = draw(long_run, tmp_path / "long.gif", "--continue", tmp_path / "start.gif")
    assert len(clip) == 11
    # The clip itself comes first, as the autoencoder shows it.
    model = long_video.load_model(long_run).to("cpu")
    frames = torch.from_numpy(start).permute(0, 3, 1, 2)
    shown = to_uint8(model.decode(long_video.encode_clip(model.vae, frames)[None])[0])
    assert np.abs(clip[:6].astype(int) - shown).mean() < 2  # a GIF has 256 colours


def test_fewer_frames_than_the_clip_has_are_refused(long_run, tmp_path):
    draw(long_run, tmp_path / "start.gif", num_frames=6)
    with pytest.raises(ValueError, match="--num-frames needs more than the clip's 6, got 5"):
        draw(long_run, tmp_path / "x.gif", "--continue", tmp_path / "start.gif", num_frames=5)


def test_a_clip_shorter_than_the_known_frames_is_refused(long_run, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"--continue .*one.png: needs 2 frames, got 1"):
        draw(long_run, tmp_path / "long.gif", "--continue", tmp_path / "one.png")


def test_more_frames_than_the_disk_holds_are_refused(long_run, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(ValueError, match="needs 5,120,000 bytes of disk, got 1,000,000; make room"):
        draw(long_run, tmp_path / "long.gif", num_frames=10_000)  # 4 * 64 + 256 bytes each


def test_another_run_is_refused_with_the_command_that_trains_one(trained, tmp_path):
    with pytest.raises(ValueError, match="papers.long_video train RUN"):
        draw(trained, tmp_path / "long.gif")


def test_sample_py_refuses_a_model_for_known_frames_by_name(long_run, tmp_path):
    with pytest.raises(ValueError, match="papers.long_video"):
        call(sample_main, long_run, "a red circle", "--output", tmp_path / "x.gif")


def test_clips_too_short_for_a_window_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="--num-frames 4 needs a clip of >= 7 frames.*has 6"):
        train(tmp_path / "run", trained, clip_frames=6)


def test_key_frames_and_what_lies_between(long_run, tmp_path):
    call(key_frames.main, "sample", long_run, "a red circle moving left", "--num-key-frames", 4,
         "--frames-between", 3, "--output", tmp_path / "keys.gif")
    assert len(read_clip(tmp_path / "keys.gif")[0]) == 13


def test_frames_between_that_memory_cannot_hold_are_refused_first(long_run, tmp_path, monkeypatch):
    asked, output = [], tmp_path / "x.gif"

    def refuse(model, sampling, *rest):
        asked.append(sampling.num_frames)
        raise ValueError("too many")

    make_clip(tmp_path / "a.gif", num_frames=3)
    monkeypatch.setattr(key_frames, "check_sampling", refuse)
    for words in (("sample", long_run, "a", "--num-key-frames", 4),
                  ("interpolate", long_run, tmp_path / "a.gif")):
        with pytest.raises(ValueError, match="too many"):
            call(key_frames.main, *words, "--frames-between", 9, "--output", output)
    assert asked == [31, 21]


def test_interpolation_keeps_the_frames_of_the_clip_where_they_were(long_run, tmp_path):
    model = long_video.load_model(long_run).to("cpu")
    keys = torch.randn(1, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    context = model.encode_text([""])
    for between in (1, 2, 3, 8):
        frames = key_frames.interpolate(model, context, keys, between, 8.0, [0])
        assert frames.shape[1] == 4 * (between + 1) + 1
        assert frames[:, :: between + 1].equal(keys)


def test_memory_does_not_grow_with_the_number_of_frames(long_run, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(long_video, "write_parts", lambda path, clips, rate: parts.extend(
        len(clip) for clip in clips))
    call(long_video.main, "sample", long_run, "a red circle", "--num-frames", 60, "--output",
         tmp_path / "x.gif")
    assert sum(parts) == 60 and max(parts) == 4  # decoded window by window


@pytest.mark.parametrize("flag, value", [
    ("--num-frames", 0), ("--seed", -1), ("--perturbation", 1000), ("--guidance", "nan"),
    ("--num-steps", 0),
])
def test_numbers_out_of_range_are_refused_by_their_flag(long_run, tmp_path, flag, value):
    with pytest.raises(ValueError, match=rf"{flag} needs to lie in \["):
        draw(long_run, tmp_path / "x.gif", flag, value)
