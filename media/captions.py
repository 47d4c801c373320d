"""Find the clips of a folder and their captions.

1.  If the folder has metadata.jsonl, with a line {"file_name": "dogs/1.mp4", "text": "a dog barks"}
    per clip, all captions come from it, and a clip that it does not list is a problem.
2.  Otherwise a caption is the text of the .txt file beside the clip (1.mp4, 1.txt), or the name of
    its sub-folder (playing_chess/1.mp4: "playing chess"), as in UCF-101.

A clip is a file that media/read.py reads, or a folder of images, its frames. A folder of images can
also be a class of stills, so it is one clip only if it has its own caption: a line in
metadata.jsonl, or NAME.txt beside the folder NAME.
"""

import json
from pathlib import Path

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
        else:  # also a link to a folder, because one that leads back up would make an endless walk
            yield path


def _problem(path, caption):
    """What is wrong with a clip and its caption, or None."""
    if not path.exists():
        return "caption without a clip; remove it or add the clip"
    if not path.is_dir() and path.suffix.lower() not in CLIP_SUFFIXES:
        return f"not a clip (known: {' '.join(CLIP_SUFFIXES)}); convert or remove it"
    if not caption.split() or "\ufffd" in caption:  # replaces bytes that are not UTF-8
        return f"needs a caption of words in UTF-8, got {caption!r:.50}"
    return None


def _by_metadata(folder):
    """Yield (path, caption, problem or None) for a folder with metadata.jsonl."""
    source, listed = folder / METADATA, set()
    for number, line in enumerate(source.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, caption = folder / entry["file_name"], " ".join(entry["text"].split())
        except (ValueError, LookupError, TypeError, AttributeError):
            yield source, "", f'line {number} needs {{"file_name": "...", "text": "..."}} in UTF-8'
            continue
        listed.add(path)
        yield path, caption, _problem(path, caption)
    for path in _walk(folder, lambda path: path in listed):
        if path not in listed and path != source and path.suffix != ".txt":
            yield path, "", f"not in {METADATA}; add a line or remove the file"


def _by_name(folder):
    """Yield (path, caption, problem or None) with captions from .txt files or sub-folders."""
    def text_of(path):
        return path.with_name(path.name + ".txt") if path.is_dir() else path.with_suffix(".txt")

    paths = list(_walk(folder, lambda path: text_of(path).is_file()))
    texts = {path for path in paths if path.suffix == ".txt"}
    used = {text_of(path) for path in paths if path not in texts}
    for path in (path for path in paths if path not in used):
        caption = path.parent.name.replace("_", " ")
        if (text := text_of(path)) in texts:
            caption = text.read_text(encoding="utf-8-sig", errors="replace")
        problem = _problem(path, caption)
        if path in texts:
            problem = "caption without a clip; remove it or add the clip"
        elif text not in texts and path.is_dir():
            problem = "a link to a folder is not followed; put the folder itself there"
        elif text not in texts and path.parent == folder:
            problem = problem or f"clip without a caption; write it into {text.name}"
        yield path, " ".join(caption.split()), problem


def find_clips(folder):
    """The clips of a folder and their captions: ([(path, caption), ...], [problem, ...]).

    Hidden files, .json, .md, README and LICENSE are ignored; any other file that is neither clip
    nor caption is a problem. Raises ValueError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found = list((_by_metadata if (folder / METADATA).exists() else _by_name)(folder))
    clips = [(path, caption) for path, caption, problem in found if not problem]
    problems = [f"{path}: {problem}" for path, _, problem in found if problem]
    if not found:
        problems = [f"{folder}: no clips in it (known: folders, {' '.join(CLIP_SUFFIXES)})"]
    return clips, problems
