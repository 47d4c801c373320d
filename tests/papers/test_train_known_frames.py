"""Tasks and windows of a training for known frames, and the training itself."""

import pytest
import torch
from helpers import call, flags, make_clip, weights_of

from checkpoints import weights
from media.read import read_clip
from papers import long_video
from papers.known_frames import load_model
from papers.train_known_frames import LongOptions, Task, open_clips, random_windows, tasks_of
from train import drop_captions
from training.run import Run

SMALL = {"num_clips": 3, "clip_frames": 20, "num_frames": 4, "num_known": 2, "long_steps": 4,
         "long_batch_size": 2, "decoder_steps": 4, "decoder_batch_size": 2, "warmup_steps": 1,
         "save_every": 2, "device": "cpu"}


def train(path, init, *arguments, **options):
    call(long_video.main, "train", path, *flags(init=init, **SMALL | options), *arguments)


def changed_parts(run, trained):
    """The parts of a run's autoencoder whose weights differ from the run that it started from."""
    before, after = (weights.load_vae(path / "vae").state_dict() for path in (trained, run))
    return {name.split(".")[0] for name, value in before.items() if not value.equal(after[name])}


def test_tasks_know_the_frames_that_their_names_say():
    tasks = tasks_of(LongOptions(), base=2, longest=128)
    assert {name: task.known for name, task in tasks.items()} == {
        "prediction": (0, 1, 2), "text": (), "first frame": (0,), "interpolation": (0, 4, 8),
        "every other": (0, 2, 4, 6, 8), "key frames": (),
    }
    assert sum(task.share for task in tasks.values()) == pytest.approx(1)
    assert tasks["key frames"].num_frames == 16


@pytest.mark.parametrize("base, strides", [(2, {1, 2, 4, 8}), (1, {1, 2, 4})])
def test_strides_are_half_one_two_and_four_times_the_base(base, strides):
    tasks = tasks_of(LongOptions(), base, longest=128)
    assert set(tasks["text"].strides) == strides
    assert tasks["prediction"].strides == (*5 * [base], 4 * base)  # most often the base


def test_windows_that_do_not_fit_into_any_clip_are_left_out():
    tasks = tasks_of(LongOptions(), base=1, longest=16)
    assert set(tasks["text"].strides) == {1, 2}  # 8 frames at stride 2 span 15
    assert "key frames" not in tasks  # 16 frames at stride 2 span 31


@pytest.mark.parametrize("base, needed", [(1, 8), (2, 15)])
def test_clips_shorter_than_a_window_are_refused(base, needed):
    tasks_of(LongOptions(), base, longest=needed)
    with pytest.raises(ValueError, match=f"--num-frames 8 needs a clip of >= {needed} frames, .*"):
        tasks_of(LongOptions(), base, longest=needed - 1)


def test_windows_are_taken_at_their_stride_from_clips_that_are_long_enough():
    latents = [torch.arange(n).float() + 100 * k for k, n in enumerate((15, 20, 30))]
    generator = torch.Generator().manual_seed(0)
    x0, chosen = random_windows(Task(1.0, 4, (), (5,)), 5, latents, 200, generator)
    assert set(chosen) == {1, 2}  # 4 frames at stride 5 span 16
    assert (x0.diff(dim=1) == 5).all()
    starts = {(clip, int(row[0]) - 100 * clip) for clip, row in zip(chosen, x0, strict=True)}
    assert {start for clip, start in starts if clip == 1} == set(range(5))


def test_windows_of_a_text_start_where_the_clip_does():
    generator = torch.Generator().manual_seed(0)
    x0, _ = random_windows(Task(1.0, 4, (), (1,), at_start=True), 1, [torch.arange(9.0)], 20,
                           generator)
    assert (x0[:, 0] == 0).all()


def test_bouncing_shapes_have_two_frames_per_frame_of_the_video_model():
    clips, base = open_clips(LongOptions(num_clips=2), image_size=16)
    assert (clips.step, base, len(clips[0][0])) == (0.5, 2, 128)


def test_known_frames_must_leave_a_frame_to_draw():
    with pytest.raises(ValueError, match="--num-known needs to be < --num-frames 8, got 8"):
        LongOptions(num_known=8)


@pytest.fixture(scope="module")
def long_run(trained, tmp_path_factory):
    """A run for known frames, not to be written into."""
    path = tmp_path_factory.mktemp("long") / "run"
    train(path, trained)
    return path


@pytest.mark.parametrize("stage", ["decoder", "long"])
def test_a_stopped_training_continues_bit_for_bit(stage, long_run, trained, tmp_path, monkeypatch):
    save = Run.save_state

    def stop(self, state):
        save(self, state)
        if state["stage"] == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_state", stop)
        train(tmp_path / "run", trained)
    train(tmp_path / "run", trained, "--resume")
    assert weights_of(tmp_path / "run") == weights_of(long_run)


def test_the_decoder_is_all_that_learns_of_the_autoencoder(long_run, trained):
    assert changed_parts(long_run, trained) == {"decoder"}



def test_a_model_with_the_mask_alone_is_trained_and_loaded(trained, tmp_path):
    train(tmp_path / "run", trained, "--no-hold", decoder_steps=0, max_level=100)
    assert load_model(tmp_path / "run").unet.config.in_channels == 4 + 1
    assert changed_parts(tmp_path / "run", trained) == set()


def test_later_windows_of_shapes_have_captions_without_direction(trained, tmp_path, monkeypatch):
    texts = set()
    monkeypatch.setattr("papers.train_known_frames.drop_captions", lambda found, *rest: (
        texts.update(found) or drop_captions(found, *rest)))
    train(tmp_path / "run", trained, long_steps=8, decoder_steps=0)
    assert len({text.endswith(("left", "right", "up", "down")) for text in texts}) == 2


def test_a_folder_of_clips_is_trained_on(trained, tmp_path):
    for name, count in (("a", 12), ("b", 9)):
        make_clip(tmp_path / "clips" / "red" / f"{name}.gif", num_frames=count)
    train(tmp_path / "run", trained, data=tmp_path / "clips", decoder_steps=0)
    call(long_video.main, "sample", tmp_path / "run", "red", "--num-frames", 9, "--output",
         tmp_path / "red.gif")
    assert len(read_clip(tmp_path / "red.gif")[0]) == 9
