"""Tasks and windows of a training for known frames."""

import pytest
import torch
from helpers import call, make_clip

import weights
from papers import long_video
from papers.train_known_frames import LongOptions, random_windows, tasks_of


def test_tasks_know_the_frames_that_their_names_say():
    tasks = tasks_of(LongOptions(), base=2, longest=128)
    assert {name: task.known for name, task in tasks.items()} == {
        "prediction": (0, 1, 2), "text": (), "first frame": (0,), "interpolation": (0, 4, 8),
        "every other": (0, 2, 4, 6, 8), "key frames": (),
    }
    assert sum(task.share for task in tasks.values()) == pytest.approx(1)
    assert tasks["key frames"].num_frames == 16


def test_strides_are_half_one_two_and_four_times_the_base():
    tasks = tasks_of(LongOptions(), base=2, longest=128)
    assert set(tasks["text"].strides) == {1, 2, 4, 8} and tasks["interpolation"].strides == (1, 2)
    assert tasks["prediction"].strides == (2, 2, 2, 2, 2, 8)  # most often the base
    assert set(tasks_of(LongOptions(), base=1, longest=128)["text"].strides) == {1, 2, 4}


def test_windows_that_clips_have_no_room_for_are_left_out():
    tasks = tasks_of(LongOptions(), base=1, longest=17)
    assert set(tasks["text"].strides) == {1, 2}  # 8 frames at stride 2 span 15
    assert "key frames" not in tasks  # 16 frames at stride 2 span 31


def test_clips_shorter_than_a_window_are_refused():
    with pytest.raises(ValueError, match="--num-frames 8 needs a clip of >= 8 frames, .* has 7"):
        tasks_of(LongOptions(), base=1, longest=7)


def test_windows_are_taken_at_their_stride_from_clips_that_are_long_enough():
    # Clip k has frames 100 k + i.
    latents = [torch.arange(n).float() + 100 * k for k, n in enumerate((4, 20, 30))]
    generator = torch.Generator().manual_seed(0)
    x0, chosen = random_windows(4, False, 5, latents, (4, 20, 30), 200, generator)
    assert set(chosen) == {1, 2}
    assert (x0.diff(dim=1) == 5).all()
    starts = {(clip, int(row[0]) - 100 * clip) for clip, row in zip(chosen, x0, strict=True)}
    assert {start for clip, start in starts if clip == 1} == set(range(5))


def test_windows_of_a_text_begin_where_the_clip_does():
    generator = torch.Generator().manual_seed(0)
    x0, _ = random_windows(4, True, 1, [torch.arange(9.0)], [9], 20, generator)
    assert (x0[:, 0] == 0).all()


@pytest.mark.parametrize("options, message", [
    ({"clean_part": 1.5}, r"--clean-part needs to lie in \[0, 1\], got 1.5"),
    ({"num_known": 0}, "--num-known needs to lie in .1, .*, got 0"),
    ({"num_known": 8}, "--num-known needs to be < --num-frames 8, got 8"),
    ({"max_level": 1000}, "--max-level needs to be < 1000, got 1000"),
])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongOptions(**options)


def test_only_the_decoder_learns_the_new_frames(trained, tmp_path):
    call(long_video.main, "train", tmp_path / "run", "--init", trained, "--num-clips", 2,
         "--clip-frames", 20, "--num-frames", 4, "--num-known", 2, "--decoder-steps", 2,
         "--decoder-batch-size", 4, "--long-steps", 1, "--device", "cpu")
    before, after = (weights.load_vae(run / "vae").state_dict()
                     for run in (trained, tmp_path / "run"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}


def test_a_folder_of_clips_is_trained_on(trained, tmp_path):
    for name, count in (("a", 12), ("b", 9)):
        make_clip(tmp_path / "clips" / "red" / f"{name}.gif", num_frames=count)
    call(long_video.main, "train", tmp_path / "run", "--init", trained, "--data",
         tmp_path / "clips", "--num-frames", 4, "--num-known", 2, "--long-steps", 3,
         "--long-batch-size", 2, "--decoder-steps", 0, "--device", "cpu")
    before, after = (weights.load_vae(run / "vae").state_dict()
                     for run in (trained, tmp_path / "run"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    call(long_video.main, "sample", tmp_path / "run", "red", "--num-frames", 9, "--output",
         tmp_path / "red.webp")
    assert (tmp_path / "red.webp").stat().st_size > 100
