"""Folders whose captions are right and wrong, each made by its test."""

import json

import pytest
from helpers import make_clip
from PIL import Image

from media.captions import find_clips


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries]
    (folder / "metadata.jsonl").write_bytes(b"\r\n".join(lines))


def save_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")


def found(folder):
    """The result of find_clips, with names relative to the folder."""
    clips, problems = find_clips(folder)
    named = [(path.relative_to(folder).as_posix(), caption) for path, caption in clips]
    return named, [problem.replace(f"{folder}/", "") for problem in problems]


def test_metadata_gives_captions_in_its_own_order(tmp_path):
    make_clip(tmp_path / "a.gif")
    save_images(tmp_path / "deep/er/walk", 2)
    first = b'\xef\xbb\xbf{"file_name": "deep/er/walk", "text": "a  walk "}'  # byte order mark
    write_metadata(tmp_path, first, b"", {"file_name": "./a.gif", "text": "an ape"})
    assert found(tmp_path) == ([("deep/er/walk", "a walk"), ("a.gif", "an ape")], [])


def test_a_text_file_beside_a_clip_is_its_caption(tmp_path):
    """A folder of images is one clip if it has such a file."""
    make_clip(tmp_path / "some_class/a.gif")
    (tmp_path / "some_class/a.txt").write_text("\ufeffun éléphant_x\n", encoding="utf-8")
    save_images(tmp_path / "walk.v2", 2)
    (tmp_path / "walk.v2.txt").write_text("a walk")
    assert found(tmp_path) == (
        [("some_class/a.gif", "un éléphant_x"), ("walk.v2", "a walk")], [])


def test_without_a_text_file_the_sub_folders_name_is_the_caption(tmp_path):
    """A folder of images is then a class of stills."""
    for name in ("playing_chess/10.gif", "playing_chess/9.gif", "train/dog_run/1.gif"):
        make_clip(tmp_path / name)
    save_images(tmp_path / "red_cats", 2)
    assert found(tmp_path) == ([
        ("playing_chess/9.gif", "playing chess"), ("playing_chess/10.gif", "playing chess"),
        ("red_cats/0.png", "red cats"), ("red_cats/1.png", "red cats"),
        ("train/dog_run/1.gif", "dog run"),
    ], [])


def test_hidden_and_known_other_files_are_ignored(tmp_path):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.txt").write_text("an ape")
    for name in (".DS_Store", "README", "README.txt", "LICENSE.txt", "info.json", "notes.md"):
        (tmp_path / name).write_text("something")
    assert found(tmp_path) == ([("a.gif", "an ape")], [])


@pytest.mark.parametrize("line, problem", [
    (b'{"file_name": "b.gif", "text": "caf\xe9"}', "metadata.jsonl: line 2 needs"),  # not UTF-8
    ({"file_name": "b.gif", "text": 3}, "metadata.jsonl: line 2 needs"),
    ({"file_name": "b.gif", "text": " "}, "b.gif: needs a caption of words"),
    ({"file_name": "c.gif", "text": "x"}, "c.gif: caption without a clip"),
    ({"file_name": "d.flv", "text": "x"}, "d.flv: not a clip"),
    (b"", "b.gif: not in metadata.jsonl; add a line or remove the file"),
])
def test_every_bad_line_of_metadata_is_a_problem(tmp_path, line, problem):
    make_clip(tmp_path / "a.gif")
    for name in ("b.gif", "d.flv"):
        (tmp_path / name).touch()
    write_metadata(tmp_path, {"file_name": "a.gif", "text": "an ape"}, line)
    clips, problems = found(tmp_path)
    assert clips == [("a.gif", "an ape")] and problems[0].startswith(problem)


@pytest.mark.parametrize("name, text, problem", [
    ("a.gif", None, "a.gif: clip without a caption; write it into a.txt"),
    ("dog/a.gif", "caf\u00e9".encode("latin-1"), "dog/a.gif: needs a caption of words in UTF-8"),
    ("a.flv", b"an ape", "a.flv: not a clip (known: .gif "),
    ("b.txt", None, "b.txt: caption without a clip"),
])
def test_every_bad_name_is_a_problem(tmp_path, name, text, problem):
    make_clip(tmp_path / "fine/ok.gif")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    if text:
        (tmp_path / name).with_suffix(".txt").write_bytes(text)
    clips, problems = found(tmp_path)
    assert clips == [("fine/ok.gif", "fine")]
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_a_link_to_the_folder_itself_is_a_problem_and_not_an_endless_walk(tmp_path):
    make_clip(tmp_path / "dog/a.gif")
    (tmp_path / "dog/loop").symlink_to(tmp_path)
    clips, (problem,) = found(tmp_path)
    assert clips == [("dog/a.gif", "dog")] and "dog/loop: a link to a folder" in problem
