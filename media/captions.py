"""Which files of a folder are clips, and what their captions are.

1.  If the folder has metadata.jsonl, with a line {"file_name": "dogs/1.mp4", "text": "a dog barks"}
    per clip, all captions come from it, and a clip that it does not list is a problem.
2.  Else a caption is the text of the .txt file beside the clip (1.mp4, 1.txt), or the name of its
    sub-folder (playing_chess/1.mp4: "playing chess"), as in UCF-101.

A clip is a file that media/read.py reads, or a folder of images, its frames. A folder of images can
also be a class of stills. So it is one clip only if it has its own caption: a line in
metadata.jsonl, or NAME.txt beside the folder NAME.
"""

import json
import os
from pathlib import Path

from files import open_regular, read_bytes
from media.read import CLIP_SUFFIXES, natural_key

METADATA = "metadata.jsonl"
IGNORED_SUFFIXES = (".json", ".md")
IGNORED_NAMES = ("readme", "license")  # with any suffix


def _walk(folder, is_clip):
    """Yield the files and clips below a folder in natural order, without ignored names."""
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        name = path.name.lower()
        if name.startswith((".", *IGNORED_NAMES)) or name.endswith(IGNORED_SUFFIXES):
            continue
        if path.is_dir() and not path.is_symlink() and not is_clip(path):
            yield from _walk(path, is_clip)
        else:  # also a link to a folder: it may lead back up, which would be an endless walk
            yield path


def _refusal(folder, path):
    """The reason why a path cannot be a clip of the folder, or None."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return "leads out of the folder; put the clip itself there"
    if not path.exists():
        return "caption without a clip; remove the line or add the file"
    if path.is_symlink() and path.is_dir():
        return "a link to a folder is not followed; put the folder itself there"
    if path.name == METADATA:
        return f"is read only at the top of a folder; use {path.parent} as the folder"
    if not path.is_dir() and path.suffix.lower() not in CLIP_SUFFIXES:
        return f"not a clip (known: {' '.join(CLIP_SUFFIXES)}); convert or remove it"
    return None


def _caption(text):
    """A caption as one line. Raises ValueError if it is empty."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the caption needs to be a text with words, got {text!r}")
    return " ".join(text.split())


def _parse(line, folder):
    """(path, caption) of a line of metadata.jsonl. Raises ValueError with the problem."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(entry, dict) or not {"file_name", "text"} <= entry.keys():
        raise ValueError('needs {"file_name": ..., "text": ...}')
    name = entry["file_name"]
    if not isinstance(name, str) or not name.strip() or Path(name).is_absolute():
        raise ValueError(f"file_name needs to be a path below the folder, got {name!r}")
    return folder / name, entry["text"]


def _clips_by_metadata(folder):
    """find_clips for a folder with metadata.jsonl."""
    source, clips, problems, lines = folder / METADATA, [], [], {}
    with open_regular(source) as file:  # of any size: millions of clips have gigabytes of captions
        text = file.read()
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            path, caption = _parse(line, folder)
            if path in lines:
                raise ValueError(f"{path.name!r} is on line {lines[path]} already; remove one")
            lines[path] = number
            if refusal := _refusal(folder, path):
                problems.append(f"{path}: {refusal} ({METADATA} line {number})")
            else:
                clips.append((path, _caption(caption)))
        except ValueError as error:
            problems.append(f"{source} line {number}: {error}")
    for path in _walk(folder, lambda path: path in lines):
        if path not in lines and path != source and path.suffix.lower() != ".txt":
            what = "not a clip" if _refusal(folder, path) else "clip without a caption"
            problems.append(f"{path}: {what}; add a line to {METADATA} or remove the file")
    return clips, problems


def _clips_by_name(folder):
    """find_clips for a folder whose captions are .txt files and names of sub-folders."""
    def text_of(path):
        return path.with_name(path.name + ".txt") if path.is_dir() else path.with_suffix(".txt")

    clips, problems = [], []
    paths = list(_walk(folder, lambda path: text_of(path).is_file()))
    texts = {path for path in paths if path.suffix.lower() == ".txt"}
    used = {text_of(path) for path in paths if path not in texts}
    for path in (path for path in paths if path not in used):
        text = text_of(path)
        if path in texts:
            problems.append(f"{path}: caption without a clip; remove it or add the clip")
        elif refusal := _refusal(folder, path):
            problems.append(f"{path}: {refusal}")
        elif text not in texts and path.parent == folder:
            problems.append(f"{path}: clip without a caption; write it into {text.name}")
        else:
            try:
                name = path.parent.name.replace("_", " ")
                caption = read_bytes(text).decode("utf-8-sig") if text in texts else name
                clips.append((path, _caption(caption)))
            except UnicodeDecodeError:
                problems.append(f"{text}: not a text file in UTF-8; save it as UTF-8")
            except ValueError as error:
                problems.append(f"{text}: {error}; write a caption into it")
    return clips, problems


def find_clips(folder):
    """The clips of a folder and their captions: ([(path, caption), ...], [problem, ...]).

    Hidden files, .json, .md, README and LICENSE are ignored; any other file that is neither clip
    nor caption is a problem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    find = _clips_by_metadata if (folder / METADATA).exists() else _clips_by_name
    clips, problems = find(folder)
    if not clips and not problems:
        problems = [f"{folder}: no clips in it (known: folders, {' '.join(CLIP_SUFFIXES)})"]
    return clips, problems
