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
    named = [(path.relative_to(folder).as_posix(), " | ".join(texts)) for path, texts in clips]
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
    """An image beside a video of the same stem is its thumbnail."""
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.txt").write_text("an ape")
    for name in (".DS_Store", "README", "README.txt", "LICENSE.txt", "Thumbs.db", "desktop.ini",
                 "notes.md", "a.jpg"):
        (tmp_path / name).write_text("something")
    assert found(tmp_path) == ([("a.gif", "an ape")], [])


@pytest.mark.parametrize("line, problem", [
    (b'{"file_name": "b.gif", "text": "caf\xe9"}', "b.gif: needs a caption of words"),  # not UTF-8
    ({"file_name": "b.gif", "text": 3}, "metadata.jsonl: row 2 needs"),
    ({"file_name": "b.gif", "text": "\ud83d"}, "b.gif: needs a caption of words"),  # a surrogate
    ({"file_name": "b.gif", "text": " "}, "b.gif: needs a caption of words"),
    ({"file_name": "b.gif", "text": "a\0b\0"}, "b.gif: needs a caption of words"),  # UTF-16
    ({"file_name": "b.gif", "text": []}, "b.gif: needs a caption of words"),
    ({"file_name": " ", "text": "x"}, "metadata.jsonl: row 2 needs"),  # not the whole folder
    ({"file_name": "sub", "text": "x"}, "sub: a folder of clips, not of frames"),
    ({"file_name": "c.gif", "text": "x"}, "metadata.jsonl: row 2: no clip c.gif; "),
    ({"file_name": "d.flv", "text": "x"}, "d.flv: not a clip"),
    (b"", "b.gif: not in metadata.jsonl; add a row or remove the file"),
])
def test_every_bad_line_of_metadata_is_a_problem(tmp_path, line, problem):
    make_clip(tmp_path / "a.gif")
    for name in ("b.gif", "d.flv", "sub/e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
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
    make_clip(tmp_path / "good/ok.gif")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    if text:
        (tmp_path / name).with_suffix(".txt").write_bytes(text)
    clips, problems = found(tmp_path)
    assert clips == [("fine/ok.gif", "fine"), ("good/ok.gif", "good")]
    assert len(problems) == 1 and problems[0].startswith(problem)


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl",
     '{"video": "a.gif", "text": null, "prompt": "an ape"}\n{"path": "b", "captions": ["x", "y"]}'),
    ("all.json",
     '[{"file": "a.gif", "caption": "an ape"}, {"file_name": "b.gif", "text": ["x", "y"]}]'),
    ("all.json", '{"a.gif": "an ape", "v/b": {"caption": ["x", "y"]}}'),
    ("MSR_VTT.json",
     '{"annotations": [{"image_id": "b", "caption": "x"}, {"image_id": "z", "caption": "?"}, '
     '{"image_id": "a", "caption": "an ape"}, {"image_id": "b", "caption": "y"}]}'),
    ("all.json", '{"d": [{"clip": "a", "text": "an ape"}, {"id": "b", "text": ["x", "y"]}]}'),
    ("all.json", '{"file": "a.gif", "text": "an ape"}\n{"file": "b.gif", "text": ["x", "y"]}\n'),
    ("all.jsonl", '[{"file": "a.gif", "text": "an ape"},\n{"file": "b.gif", "text": ["x", "y"]}]'),
    ("all.csv", 'file;text\na.gif;an ape\nb.gif;x\nb.gif;"y"\n'),
    ("all.tsv", 'file\ttext\na.gif\tan ape\nb.gif\tx\nb.gif\ty\n'),
    ("metadata.csv", '\ufeffFile_Name,Text\nV\\A.gif,an ape\nb.gif,x\nb.gif,y\n'),
    ("webvid.csv", 'videoid,page_dir,name\na,v,"an ape"\nb,0_9,x\nb,0_9,y\nmissing,v,?\n'),
])
def test_a_table_gives_captions(tmp_path, name, text):
    """Names are found wherever a clip has them. WebVid and MSR-VTT list clips that are missing."""
    for clip in ("a.gif", "b.gif"):
        make_clip(tmp_path / "v" / clip)
    (tmp_path / name).write_text(text, encoding="utf-8")
    clips, problems = found(tmp_path)
    assert sorted(clips) == [("v/a.gif", "an ape"), ("v/b.gif", "x | y")] and problems == []


@pytest.mark.parametrize("name", ["prompt.txt", "prompts.txt", "captions.txt"])
def test_videos_txt_and_prompt_txt_belong_together_line_by_line(tmp_path, name):
    for clip in ("b", "a", "c"):
        make_clip(tmp_path / f"videos/{clip}.gif")
    (tmp_path / "videos.txt").write_text("videos/b.gif\nvideos/a.gif\nvideos/c.gif\n\n")
    (tmp_path / "prompt_old.txt").write_text("x\ny\nz")
    (tmp_path / name).write_text("\r\nan ape\r\n")
    assert found(tmp_path) == ([("videos/a.gif", "an ape")], [
        "videos/b.gif: needs a caption of words in UTF-8, got ''",
        'videos.txt: row 3 needs a clip and a caption, as {"file_name": "...", "text": "..."}, '
        "in UTF-8", "videos/c.gif: not in videos.txt; add a row or remove the file"])
    (tmp_path / name).unlink()
    assert found(tmp_path)[0] == []  # videos.txt is not the caption of a clip "videos"


def test_a_json_beside_a_clip_can_have_its_caption(tmp_path):
    make_clip(tmp_path / "1/a.gif")
    (tmp_path / "1/a.json").write_text('{"caption": "an ape", "said": [{"id": 1, "text": "?"}]}')
    assert found(tmp_path) == ([("1/a.gif", "an ape")], [])


@pytest.mark.parametrize("name, text", [
    ("info.json", "[1, 2]"), ("a.csv", "one,two\n1,2\n"), ("a.parquet", "PAR1"), ("b.json", "{"),
    pytest.param("a.csv", f"file,text\na.gif,{'x' * 200_000}", id="too long"),
])
def test_a_table_without_captions_is_named(tmp_path, name, text):
    make_clip(tmp_path / "a.gif")
    (tmp_path / "a.caption").write_text("an ape")
    (tmp_path / name).write_text(text)
    clips, (problem,) = found(tmp_path)
    assert clips == [("a.gif", "an ape")] and problem.startswith(f"{name}: its captions cannot be")


@pytest.mark.parametrize("row, problem", [
    ("a.gif,an ape, sitting", "all.csv: row 2 needs"),  # the comma is not in quotes
    ("same,an ape", "all.csv: row 2: same is several clips; write"),
])
def test_a_row_that_could_mean_two_things_is_a_problem(tmp_path, row, problem):
    for name in ("1/same.gif", "2/same.gif", "a.gif"):
        make_clip(tmp_path / name)
    (tmp_path / "all.csv").write_text(f"file,text\na.gif,x\n{row}\n")
    clips, problems = found(tmp_path)
    assert clips == [("a.gif", "x")] and problems[0].startswith(problem)


@pytest.mark.parametrize("on_disk, text_file", [
    ("cafe\u0301.gif", "caf\u00e9.txt"), ("Dog.GIF", "dog.TXT")])
@pytest.mark.parametrize("table", [False, True])
def test_names_that_differ_in_case_or_composition_are_found(tmp_path, on_disk, text_file, table):
    make_clip(tmp_path / on_disk)
    if table:
        write_metadata(tmp_path, {"file_name": f".\\{text_file[:-4]}.gif", "text": "x"})
    else:
        (tmp_path / text_file).write_text("x")
    assert found(tmp_path) == ([(on_disk, "x")], [])


def test_a_whole_path_comes_before_the_end_of_another(tmp_path):
    for name in ("a", "x/a", "w/x/b", "w/y/b"):
        make_clip(tmp_path / f"{name}.gif")
    write_metadata(tmp_path, {"file": "a.gif", "text": "1"}, {"file": "x/a.gif", "text": "2"},
                   {"videoid": "b", "page_dir": "x", "name": "3"}, {"file": "y/b", "text": "4"})
    assert found(tmp_path) == (
        [("a.gif", "1"), ("x/a.gif", "2"), ("w/x/b.gif", "3"), ("w/y/b.gif", "4")], [])


def test_exact_names_come_first(tmp_path):
    for name in ("a", "A"):
        make_clip(tmp_path / f"{name}.gif")
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(found(tmp_path)[0]) == [("A.gif", "A"), ("a.gif", "a")]


@pytest.mark.parametrize("names, captions", [
    (["videos/1.gif"], []), (["train/videos/1.gif", "test/videos/2.gif"], []),
    (["train/1.gif", "test/2.gif"], []), (["001/1.gif", "clip_002/2.gif", "All/3.gif"], []),
    (["YoYo/v_YoYo_g01.gif"], ["yo yo"]),
    (["YoYo/1.gif", "ApplyEyeMakeup/1.gif"], ["apply eye makeup", "yo yo"])])
def test_one_sub_folder_is_no_caption_but_a_class_of_ucf_101_is(tmp_path, names, captions):
    for name in names:
        make_clip(tmp_path / name)
    clips, problems = found(tmp_path)
    assert [text for _, text in clips] == captions
    assert len(problems) == (0 if captions else len(names))


def test_links_are_followed_and_a_link_back_up_is_no_endless_walk(tmp_path):
    """As in the cache of Hugging Face, whose files have no suffix, and on another disk."""
    make_clip(tmp_path / "disk/cat/1.gif")
    (tmp_path / "data/dog").mkdir(parents=True)
    (tmp_path / "blob").write_bytes((tmp_path / "disk/cat/1.gif").read_bytes())
    (tmp_path / "data/dog/a.gif").symlink_to(tmp_path / "blob")
    (tmp_path / "data/cat").symlink_to(tmp_path / "disk/cat")
    (tmp_path / "data/dog/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/dog/gone.gif").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data/dog/gone.txt").symlink_to("gone.txt")
    (tmp_path / "data/gone.csv").symlink_to("nowhere")
    clips, problems = found(tmp_path / "data")
    assert sorted(clips) == [("cat/1.gif", "cat"), ("dog/a.gif", "dog")]
    assert [problem[:21] for problem in sorted(problems)] == [
        "dog/gone.gif: a link ", "dog/gone.txt: a link ", "gone.csv: a link to a"]
