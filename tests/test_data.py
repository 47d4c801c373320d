"""Folders of clips, right and wrong, each made by its test."""

import os

import numpy as np
import pytest
import torch
from helpers import make_clip
from PIL import Image

from training.data import ClipFolder, check
from training.options import TrainOptions


def test_an_item_is_the_whole_clip_at_its_stride(tmp_path):
    make_clip(tmp_path / "dog/a.gif", num_frames=5)
    frames, caption = ClipFolder(tmp_path, num_frames=2, image_size=6, stride=2)[0]
    assert frames.shape == (3, 3, 6, 6) and frames.dtype == torch.uint8 and caption == "dog"
    assert [frame.unique().tolist() for frame in frames] == [[10], [50], [90]]


def test_channels_are_moved_and_not_reshaped(tmp_path):
    image = np.zeros((5, 5, 3), np.uint8)
    image[1, 3] = (1, 2, 3)
    (tmp_path / "dog").mkdir()
    Image.fromarray(image).save(tmp_path / "dog/a.png")
    frames, _ = ClipFolder(tmp_path, num_frames=1, image_size=5)[0]
    assert frames[0, :, 1, 3].tolist() == [1, 2, 3] and frames.sum() == 6


def test_a_folder_is_a_sequence_with_captions(tmp_path):
    for name in ("dog/1.gif", "cat/1.gif", "cat/2.gif"):
        make_clip(tmp_path / name)
    clips = ClipFolder(tmp_path, num_frames=5, image_size=4)
    assert [caption for _, caption in clips.clips] == clips.captions == ["cat", "cat", "dog"]
    assert len(clips) == 3


def test_a_version_changes_with_size_time_and_how_a_clip_is_read(tmp_path):
    path = tmp_path / "dog/a.gif"
    make_clip(path)
    os.utime(path, (5, 5))

    def version(**options):
        return ClipFolder(tmp_path, **{"num_frames": 1, "image_size": 6} | options).version(0)

    first = version()
    assert first == version()
    others = [version(image_size=8), version(stride=2), version(frame_rate=5),
              version(max_frames=3)]
    os.utime(path, (5, 6))
    others.append(version())
    make_clip(path, num_frames=4)
    os.utime(path, (5, 5))
    others.append(version())
    assert first not in others and len(set(map(repr, others))) == 6


def test_the_version_of_a_folder_of_images_is_that_of_every_image(tmp_path):
    (tmp_path / "a.txt").write_text("a dog")
    for i in range(2):
        make_clip(tmp_path / f"a/{i}.png", num_frames=1)
    first = ClipFolder(tmp_path, num_frames=2, image_size=6).version(0)
    os.utime(tmp_path / "a/1.png", (5, 5))
    assert ClipFolder(tmp_path, num_frames=2, image_size=6).version(0) != first


@pytest.mark.parametrize("rate, pace", [(None, "stride 2"), (10, "stride 2 of 10 frames per sec")])
def test_a_clip_too_short_says_how_many_frames_it_has(tmp_path, rate, pace):
    make_clip(tmp_path / "dog/a.gif", num_frames=5, duration=100)
    clips = ClipFolder(tmp_path, num_frames=4, image_size=6, stride=2, frame_rate=rate)
    with pytest.raises(ValueError, match=f"dog/a.gif: needs 4 frames at {pace}.*, got 3; lower --"):
        clips[0]


def test_a_folder_with_problems_is_refused_in_one_line(tmp_path):
    make_clip(tmp_path / "a.gif")
    make_clip(tmp_path / "b.gif")
    with pytest.raises(ValueError) as error:
        ClipFolder(tmp_path, num_frames=1, image_size=6)
    assert str(error.value) == (
        f"{tmp_path}/a.gif: clip without a caption; write it into a.txt"
        f" (problem 1 of 2; run: python train.py RUN --data {tmp_path} --check)"
    )


@pytest.mark.parametrize("name, message", [("none", "no such folder"), ("a.gif", "not a folder"),
                                           ("empty", "no clips in it")])
def test_no_folder_of_clips_is_an_error_that_names_it(tmp_path, name, message):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ClipFolder(tmp_path / name, num_frames=1, image_size=6)


# train.py --check


def test_a_check_lists_clips_problems_and_a_summary(tmp_path, capsys):
    make_clip(tmp_path / "dog/fine.gif")
    make_clip(tmp_path / "dog/short.gif", num_frames=2)
    (tmp_path / "dog/text.gif").write_text("hello")
    make_clip(tmp_path / "stray.gif")
    assert check(TrainOptions(data=str(tmp_path), num_frames=3)) == 1
    lines = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
    assert lines[1].split() == ["5", "10", "dog/fine.gif:", "dog"]
    names = [line.split(":")[0] for line in lines[4:7]]
    assert names == ["stray.gif", "dog/short.gif", "dog/text.gif"]  # of captions, then of files
    assert lines[7:] == ["3 clips, 5 frames, 3 problems"]


def test_a_check_reads_as_the_training_would(tmp_path):
    make_clip(tmp_path / "dog/fine.gif", num_frames=5, duration=100)
    pace = {"stride": 2, "frame_rate": 20.0, "max_frames": 3}  # 10 frames; of every other: 3
    assert check(TrainOptions(data=str(tmp_path), num_frames=3, **pace)) == 0
    assert check(TrainOptions(data=str(tmp_path), num_frames=4, **pace)) == 1


def test_shapes_need_no_check(capsys):
    assert check(TrainOptions(data="shapes")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
