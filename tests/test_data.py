"""Folders of clips, right and wrong, each made by its test."""

import os

import numpy as np
import pytest
import torch
from helpers import make_clip
from PIL import Image

from train import new_tokenizer
from training.data import ClipFolder, check
from training.options import TrainOptions


def test_an_item_is_the_whole_clip_at_its_stride(tmp_path):
    for name in ("dog/1.gif", "cat/1.gif", "cat/2.gif"):
        make_clip(tmp_path / name, num_frames=5)
    clips = ClipFolder(tmp_path, num_frames=2, image_size=6, stride=2)
    frames, caption = clips[2]
    assert frames.shape == (3, 3, 6, 6) and frames.dtype == torch.uint8 and caption == "dog"
    assert [frame.unique().tolist() for frame in frames] == [[10], [50], [90]]
    assert clips.captions == ["cat", "cat", "dog"] and len(clips) == 3


def test_channels_are_moved_and_not_reshaped(tmp_path):
    image = np.zeros((5, 5, 3), np.uint8)
    image[1, 3] = (1, 2, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    frames, _ = ClipFolder(tmp_path, num_frames=1, image_size=5)[0]
    assert frames[0, :, 1, 3].tolist() == [1, 2, 3] and frames.sum() == 6


def test_a_clip_with_several_captions_takes_its_turn_in_rounds(tmp_path):
    for name in ("a", "b"):
        make_clip(tmp_path / f"{name}.gif")
    (tmp_path / "all.csv").write_text("file,text\na.gif,x\nb.gif,1\na.gif,y\na.gif,z\nb.gif,2\n")
    clips = ClipFolder(tmp_path, num_frames=1, image_size=6)
    assert clips.captions == ["x", "1", "y", "2", "z", "1"] and len(clips) == 2


def test_a_version_changes_with_content_and_how_a_clip_is_read_but_not_with_folder_or_time(
        tmp_path):
    """The version of a folder of images depends on each image."""
    def make(folder, data=b"end"):
        for name in ("0.png", "1.png"):
            make_clip(folder / "a" / name, num_frames=1)
        (folder / "a.txt").write_text("a dog")
        with open(folder / "a/1.png", "ab") as file:
            file.write(bytes(2**17) + data)
        return folder

    old = make(tmp_path / "old")

    def version(folder=old, **options):
        return ClipFolder(folder, **{"num_frames": 1, "image_size": 6} | options).version(0)

    moved = make(tmp_path / "new")
    os.utime(moved / "a/1.png", (5, 5))
    assert version(moved) == version()
    others = [version(image_size=8), version(stride=2), version(frame_rate=5),
              version(max_frames=3), version(make(tmp_path / "b", b"END")),
              version(make(tmp_path / "c", bytes(9) + b"end"))]
    assert version() not in others and len(set(map(repr, others))) == 6


def test_a_clip_too_short_says_how_many_frames_it_has(tmp_path):
    make_clip(tmp_path / "a.gif", num_frames=5, duration=100)
    (tmp_path / "a.txt").write_text("a dog")
    clips = ClipFolder(tmp_path, num_frames=4, image_size=6, stride=2, frame_rate=10)
    with pytest.raises(ValueError, match="a.gif: needs 4 frames at stride 2 of 10 .*, got 3; low"):
        clips[0]


@pytest.mark.parametrize("stride, grid, rate", [(1, 60, "16.66"), (2, 125, "8")])
def test_a_clip_whose_equal_frames_were_merged_says_which_frame_rate_restores_them(
        tmp_path, stride, grid, rate):
    shades = [0, 0, 9, 99, 99, 99, 200, 250]
    images = [Image.new("L", (6, 6), shade) for shade in shades]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=grid)
    (tmp_path / "a.txt").write_text("a fade")
    needed = {"num_frames": 8 // stride, "image_size": 6, "stride": stride}
    with pytest.raises(ValueError, match=f"stored once, so read it with --frame-rate {rate}$"):
        ClipFolder(tmp_path, **needed)[0]
    frames, _ = ClipFolder(tmp_path, **needed, frame_rate=float(rate))[0]
    assert frames[:, 0, 0, 0].tolist() == shades[::stride]


def test_a_folder_with_problems_is_refused_in_one_line(tmp_path):
    for name in ("a.gif", "b.gif"):
        make_clip(tmp_path / name)
    with pytest.raises(ValueError, match="a.gif: clip without .* .problem 1 of 2; run: .* --ch"):
        ClipFolder(tmp_path, num_frames=1, image_size=6)


def test_no_folder_of_clips_is_an_error_that_names_it(tmp_path):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such folder"), ("a.gif", "not a folder"),
                          ("empty", "no clips in it")):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            ClipFolder(tmp_path / name, num_frames=1, image_size=6)


def test_a_check_lists_clips_problems_and_a_summary(tmp_path, capsys):
    make_clip(tmp_path / "cat/fine.gif")
    make_clip(tmp_path / "dog/short.gif", num_frames=2)
    (tmp_path / "dog/text.gif").write_text("hello")
    make_clip(tmp_path / "stray.gif")
    assert check(TrainOptions(data=str(tmp_path), num_frames=3), new_tokenizer) == 1
    lines = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
    assert lines[1].split() == ["5", "10", "cat/fine.gif:", "cat"]
    assert [line.split(":")[0] for line in lines[4:7]] == [  # of captions, then of files
        "stray.gif", "dog/short.gif", "dog/text.gif"]
    assert lines[7:] == ["3 clips, 5 frames, 3 problems"]


@pytest.mark.parametrize("max_tokens, line", [
    (5, '1 of 2 captions have more than 5 tokens (up to 6), so the model does not see "loud"'),
    (None, ""),  # as many as the longest caption needs
])
def test_a_check_names_the_captions_that_are_cut(tmp_path, capsys, max_tokens, line):
    for name, caption in (("a", "a dog barks loud"), ("b", "a cat meows")):
        make_clip(tmp_path / f"{name}.gif")
        (tmp_path / f"{name}.txt").write_text(caption)
    options = TrainOptions(data=str(tmp_path), num_frames=1, max_tokens=max_tokens)
    assert check(options, new_tokenizer) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        *filter(None, [line]), "2 clips, 10 frames, 0 problems"]


def test_a_check_reads_as_the_training_would(tmp_path):
    make_clip(tmp_path / "fine.gif", num_frames=5, duration=100)
    (tmp_path / "fine.txt").write_text("a dog")
    pace = {"stride": 2, "frame_rate": 20.0, "max_frames": 3}  # 10 frames; of every other: 3
    assert check(TrainOptions(data=str(tmp_path), num_frames=3, **pace), new_tokenizer) == 0
    assert check(TrainOptions(data=str(tmp_path), num_frames=4, **pace), new_tokenizer) == 1
