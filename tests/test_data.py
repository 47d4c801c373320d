"""Folders of clips, right and wrong, each made by its test."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import data
from data import ClipFolder, find_clips, random_window

ROOT = Path(data.__file__).parent


def make_clip(path, num_frames=5, gray=10, duration=100):
    """A GIF of 12 x 8 pixels whose frame i has the gray value gray + 20 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (12, 8), (gray + 20 * i,) * 3) for i in range(num_frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration)


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def found(folder):
    """What find_clips finds, with names relative to the folder."""
    clips, problems = find_clips(folder)
    named = [(path.relative_to(folder).as_posix(), caption) for path, caption in clips]
    return named, [problem.replace(f"{folder}/", "") for problem in problems]


def test_metadata_gives_captions_in_its_own_order(tmp_path):
    make_clip(tmp_path / "a.gif")
    make_clip(tmp_path / "deep/er/b.gif")
    write_metadata(tmp_path, {"file_name": "deep/er/b.gif", "text": "a  bee\n"},
                   "", {"file_name": "./a.gif", "text": "an ape"})
    assert found(tmp_path) == ([("deep/er/b.gif", "a bee"), ("a.gif", "an ape")], [])


def test_a_text_file_beside_a_clip_is_its_caption(tmp_path):
    make_clip(tmp_path / "some_class/a.gif")
    (tmp_path / "some_class/a.txt").write_text("\ufeffun éléphant_x\n", encoding="utf-8")
    assert found(tmp_path) == ([("some_class/a.gif", "un éléphant_x")], [])


def test_without_a_text_file_the_sub_folders_name_is_the_caption(tmp_path):
    for name in ("playing_chess/10.gif", "playing_chess/9.gif", "train/dog_run/1.gif"):
        make_clip(tmp_path / name)
    assert found(tmp_path)[0] == [
        ("playing_chess/9.gif", "playing chess"), ("playing_chess/10.gif", "playing chess"),
        ("train/dog_run/1.gif", "dog run"),
    ]


def save_images(folder, grays):
    folder.mkdir(parents=True)
    for i, gray in enumerate(grays):
        Image.new("RGB", (9, 9), (gray,) * 3).save(folder / f"{i}.png")


def test_a_folder_of_images_with_a_caption_of_its_own_is_one_clip(tmp_path):
    save_images(tmp_path / "walk.v2", range(0, 240, 20))
    (tmp_path / "walk.v2.txt").write_text("a walk")
    assert found(tmp_path) == ([("walk.v2", "a walk")], [])
    frames, _ = ClipFolder(tmp_path, num_frames=12, image_size=4)[0]
    assert frames[:, 0, 0, 0].tolist() == list(range(0, 240, 20))  # 10.png after 9.png


def test_a_folder_of_images_without_one_is_a_class_of_stills(tmp_path):
    save_images(tmp_path / "red_cats", [5, 6])
    assert found(tmp_path)[0] == [("red_cats/0.png", "red cats"), ("red_cats/1.png", "red cats")]


def test_a_folder_of_frames_can_be_listed_in_metadata(tmp_path):
    save_images(tmp_path / "walk", [5, 6])
    write_metadata(tmp_path, {"file_name": "walk", "text": "a walk"})
    assert found(tmp_path) == ([("walk", "a walk")], [])


def test_hidden_and_known_other_files_are_ignored(tmp_path):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.txt").write_text("an ape")
    for name in (".DS_Store", "README", "README.txt", "LICENSE.txt", "info.json", "notes.md"):
        (tmp_path / name).write_text("something")
    assert found(tmp_path) == ([("a.gif", "an ape")], [])


@pytest.mark.parametrize("line, problem", [
    ("{bad", "metadata.jsonl line 2: not JSON"),
    ("[1]", 'metadata.jsonl line 2: needs {"file_name": ..., "text": ...}'),
    ('{"file_name": "b.gif", "caption": "x"}', 'needs {"file_name": ..., "text": ...}'),
    ('{"file_name": "b.gif", "text": 3}', "line 2: the caption needs to be a text"),
    ('{"file_name": "b.gif", "text": " "}', "line 2: the caption needs to be a text"),
    ('{"file_name": 7, "text": "x"}', "line 2: file_name needs to be a path below the folder"),
    ('{"file_name": "a.gif", "text": "x"}', "line 2: 'a.gif' is on line 1 already"),
    ('{"file_name": "c.gif", "text": "x"}', "c.gif: caption without a clip"),
    ('{"file_name": "../up.gif", "text": "x"}', "up.gif: leads out of the folder"),
    ('{"file_name": "/etc/up.gif", "text": "x"}', "up.gif: leads out of the folder"),
    ('{"file_name": "a\\u0000.gif", "text": "x"}', "line 2: "),
    ('{"file_name": "out.gif", "text": "x"}', "out.gif: leads out of the folder"),
])
def test_every_bad_line_of_metadata_is_a_problem(tmp_path, line, problem):
    make_clip(tmp_path / "up.gif")
    folder = tmp_path / "clips"
    make_clip(folder / "a.gif")
    write_metadata(folder, {"file_name": "a.gif", "text": "an ape"}, line)
    if "out.gif" in line:
        (folder / "out.gif").symlink_to(tmp_path / "up.gif")
    if "b.gif" in line:
        make_clip(folder / "b.gif")
    clips, problems = found(folder)
    assert clips == [("a.gif", "an ape")]
    assert problem in problems[0]


def test_metadata_that_is_not_utf_8_is_a_problem_with_its_line(tmp_path):
    make_clip(tmp_path / "a.gif")
    lines = ['\ufeff{"file_name": "a.gif", "text": "caf\u00e9"}'.encode(),
             '{"file_name": "b.gif", "text": "caf\u00e9"}'.encode("latin-1")]
    (tmp_path / "metadata.jsonl").write_bytes(b"\r\n".join(lines))
    clips, problems = found(tmp_path)
    assert clips == [("a.gif", "caf\u00e9")]
    assert len(problems) == 1 and "line 2: not JSON in UTF-8" in problems[0]


def test_a_clip_that_metadata_does_not_list_is_a_problem(tmp_path):
    make_clip(tmp_path / "a.gif")
    make_clip(tmp_path / "class/b.gif")
    (tmp_path / "class/b.txt").write_text("is not read beside metadata")
    write_metadata(tmp_path, {"file_name": "a.gif", "text": "an ape"})
    assert found(tmp_path)[1] == [
        "class/b.gif: clip without a caption; add a line to metadata.jsonl or remove the file"
    ]


@pytest.mark.parametrize("name, text, problem", [
    ("a.gif", None, "a.gif: clip without a caption; write it into a.txt"),
    ("dog/a.gif", "", "dog/a.txt: the caption needs to be a text with words"),
    ("a.flv", "an ape", "a.flv: not a clip (known: .gif "),
    ("dog/metadata.jsonl", None, "use dog as the folder"),
    ("b.txt", None, "b.txt: caption without a clip"),
])
def test_every_bad_name_is_a_problem(tmp_path, name, text, problem):
    make_clip(tmp_path / "fine/ok.gif")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    if text is not None:
        (tmp_path / name).with_suffix(".txt").write_text(text)
    clips, problems = found(tmp_path)
    assert clips == [("fine/ok.gif", "fine")]
    assert len(problems) == 1 and problem in problems[0].replace(str(tmp_path) + "/", "")


def test_a_link_to_the_folder_itself_is_a_problem_and_not_an_endless_walk(tmp_path):
    make_clip(tmp_path / "dog/a.gif")
    (tmp_path / "dog/loop").symlink_to(tmp_path)
    clips, problems = found(tmp_path)
    assert clips == [("dog/a.gif", "dog")]
    assert len(problems) == 1 and "dog/loop: a link to a folder" in problems[0]


def test_an_item_is_the_whole_clip_at_its_stride(tmp_path):
    make_clip(tmp_path / "dog/a.gif", num_frames=5)
    frames, caption = ClipFolder(tmp_path, num_frames=2, image_size=6, stride=2)[0]
    assert frames.shape == (3, 3, 6, 6) and frames.dtype == torch.uint8 and caption == "dog"
    assert [frame.unique().tolist() for frame in frames] == [[10], [50], [90]]


def test_an_item_can_be_resampled_and_bounded(tmp_path):
    make_clip(tmp_path / "dog/a.gif", num_frames=5, duration=100)
    clips = ClipFolder(tmp_path, num_frames=2, image_size=6, frame_rate=5, max_frames=2)
    assert clips[0][0][:, 0, 0, 0].tolist() == [10, 50]


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
    assert [caption for _, caption in clips] == clips.captions == ["cat", "cat", "dog"]
    assert len(clips) == 3


def test_a_clip_too_short_says_how_many_frames_it_has(tmp_path):
    make_clip(tmp_path / "dog/a.gif", num_frames=5)
    clips = ClipFolder(tmp_path, num_frames=4, image_size=6, stride=2)
    with pytest.raises(ValueError, match="dog/a.gif: needs 4 frames at stride 2, got 3; lower --"):
        clips[0]


def test_a_folder_with_problems_is_refused_in_one_line(tmp_path):
    make_clip(tmp_path / "a.gif")
    make_clip(tmp_path / "b.gif")
    with pytest.raises(ValueError) as error:
        ClipFolder(tmp_path, num_frames=1, image_size=6)
    assert str(error.value) == (
        f"{tmp_path}/a.gif: clip without a caption; write it into a.txt"
        f" (+1 more; run: python data.py check {tmp_path})"
    )


@pytest.mark.parametrize("name, message", [("none", "no such folder"), ("a.gif", "not a folder"),
                                           ("empty", "no clips in it")])
def test_no_folder_of_clips_is_an_error_that_names_it(tmp_path, name, message):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ClipFolder(tmp_path / name, num_frames=1, image_size=6)


def test_windows_start_everywhere_equally_often():
    generator = torch.Generator().manual_seed(0)
    starts = [random_window(10, 8, generator) for _ in range(3000)]
    counts = [starts.count(start) for start in range(3)]
    assert sum(counts) == 3000 and min(counts) > 900


def test_a_window_depends_on_nothing_but_the_generator():
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    starts = [random_window(100, 8, first) for _ in range(20)]
    torch.manual_seed(1)
    assert starts == [random_window(100, 8, second) for _ in range(20)]


@pytest.mark.parametrize("num_frames", [0, 4])
def test_a_window_needs_one_frame_to_all_of_the_clip(num_frames):
    with pytest.raises(ValueError, match=f"0 < num_frames <= 3, got {num_frames}"):
        random_window(3, num_frames, torch.Generator())
    assert random_window(3, 3, torch.Generator()) == 0


def test_the_check_command_lists_clips_problems_and_a_summary(tmp_path, capsys):
    make_clip(tmp_path / "dog/fine.gif")
    make_clip(tmp_path / "dog/short.gif", num_frames=2)
    (tmp_path / "dog/text.gif").write_text("hello")
    make_clip(tmp_path / "stray.gif")
    assert call(data.main, "check", tmp_path, "--num-frames", 3) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["5", "12x8", "10", "dog/fine.gif:", "dog"]
    names = [line.split(":")[0].removeprefix(f"{tmp_path}/") for line in lines[4:7]]
    assert names == ["stray.gif", "dog/short.gif", "dog/text.gif"]  # of captions, then of files
    assert lines[-1] == "3 clips, 7 frames, 3 problems" and len(lines) == 1 + 3 + 3 + 1


def test_the_check_command_succeeds_on_a_good_folder(tmp_path):
    make_clip(tmp_path / "dog/fine.gif")
    command = [sys.executable, "data.py", "check", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("1 clips, 5 frames, 0 problems\n") and result.stderr == ""
