"""Tasks and windows of a training for known frames."""

import pytest
import torch

from papers.train_known_frames import LongOptions, Task, random_windows, tasks_of
from training.options import merge_options


def test_tasks_know_the_frames_that_their_names_say():
    tasks = tasks_of(LongOptions(), base=2, longest=128)
    assert {name: [*task.known] for name, task in tasks.items()} == {
        "prediction": [0, 1, 2], "text": [], "first image": [], "first frame": [0],
        "interpolation": [0, 4, 8], "every other": [0, 2, 4, 6, 8], "key frames": [0],
    }
    assert sum(task.share for task in tasks.values()) == pytest.approx(1)
    assert set(tasks["text"].strides) == {1, 2, 4, 8} and tasks["key frames"].num_frames == 16
    # An image has no frame rate; it is learned at the one that begin() names.
    assert (tasks["first image"].num_frames, tasks["first image"].strides) == (1, [2])
    # Windows that fit into no clip are left out.
    tasks = tasks_of(LongOptions(), base=1, longest=16)
    assert set(tasks["text"].strides) == {1, 2}  # 8 frames at stride 2 span 15
    assert "key frames" not in tasks  # 16 frames at stride 2 span 31


def test_windows_are_taken_at_their_stride_from_clips_that_are_long_enough():
    latents = [torch.arange(n).float() + 100 * k for k, n in enumerate((15, 20, 30))]
    generator = torch.Generator().manual_seed(0)
    for by_text, starts in ((False, {*range(100, 105), *range(200, 215)}), (True, {100, 200})):
        task = Task(1.0, 4, (), (5,), by_text)  # 4 frames at stride 5 span 16
        x0, chosen = random_windows(task, 5, latents, 200, generator)
        assert set(chosen) == {1, 2} and (x0.diff(dim=1) == 5).all()
        assert set(x0[:, 0].tolist()) == starts


@pytest.mark.parametrize("given", [
    {"data": "clips", "num_clips": 5}, {"data": "clips", "clip_frames": 64},
    {"decoder_steps": 0, "decoder_batch_size": 5}, {"decoder_steps": 0, "decoder_learning_rate": 1},
])
def test_an_option_that_the_training_would_not_use_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match=f"--{[*given][-1].replace('_', '-')} has no effect, beca"):
        merge_options(tmp_path, given, LongOptions)
    LongOptions(data="clips", num_frames=100)  # so --clip-frames does not bound it
