"""Files that are whole or absent, and JSON."""

from dataclasses import dataclass, field

import pytest

from support.files import atomic, from_json, read_json, write_json, write_text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.bin"


# Atomic writes


def test_a_file_is_not_visible_before_it_is_whole(path):
    path.write_bytes(b"old")
    with atomic(path) as file:
        file.write(b"new")
        file.flush()
        while_writing = path.read_bytes()
    assert (while_writing, path.read_bytes()) == (b"old", b"new")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(path):
    path.write_bytes(b"the old text")
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:
        file.write(b"the new te")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"the old text" and list(path.parent.iterdir()) == [path]


def test_the_next_write_replaces_what_a_kill_left(path):
    path.with_name(".file.bin.tmp").write_bytes(b"half of a longer text")
    with atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a/b/c.txt", "赤い丸")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "赤い丸".encode()


# JSON


def test_json_comes_back_and_is_indented_for_readers(tmp_path):
    value = {"width": [1, 2.5, None], "name": "赤い丸"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().startswith('{\n  "width": [\n    1,')


@pytest.mark.parametrize("text, message", [
    (b"", "not a JSON file"), (b'{"\xff": 1}', "not a JSON file"),
    (b"[" * 100_000, "not a JSON file"), (b"[1]", "needs a JSON object, got list"),
])
def test_a_file_without_a_json_object_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json")


@dataclass(frozen=True)
class Config:
    width: int = 1
    levels: tuple = (1, 2)
    known: int = field(init=False, default=0)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width needs >= 1, got {self.width}")


def test_lists_become_tuples_and_missing_fields_defaults():
    assert from_json(Config, {"levels": [3, 4]}, "config.json") == Config(levels=(3, 4))


@pytest.mark.parametrize("values, message", [
    ({"height": 2}, "height is unknown; is it from another"), ({"known": 2}, "known is unk"),
    ({"width": 0}, "width needs >= 1, got 0"), ({"width": "x"}, "'<' not supported"),
    ([1], "'list' object"),
])
def test_errors_of_a_dataclass_name_the_file(values, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        from_json(Config, values, "config.json")
