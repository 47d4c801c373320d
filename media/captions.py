"""Find the clips of a folder and their captions.

1.  If the folder has tables, all captions come from them, and a clip that no table lists is a
    problem. A table is a .jsonl, .json (a list of objects) or .csv file anywhere in the folder,
    with a row {"file_name": "dogs/1.mp4", "text": "a dog barks"} per caption; NAMES and TEXTS are
    the columns known. videos.txt and prompt.txt are a table as well, line by line.
2.  Otherwise a caption is the text of the .txt or .caption file beside the clip (1.mp4, 1.txt), or
    the name of its sub-folder (ApplyEyeMakeup/1.avi: "apply eye makeup"), as in UCF-101. One
    sub-folder alone is "videos" or "train" more often than a class, so its name is no caption.

A clip is a file that media/read.py reads, or a folder of images, its frames. A folder of images can
also be a class of stills, so it is one clip only if it has its own caption: a row of a table, or
NAME.txt beside the folder NAME.
"""

import csv
import io
import json
import os
import re
import unicodedata
from pathlib import Path

from media.read import CLIP_SUFFIXES, VIDEO_SUFFIXES, natural_key

TABLES = (".jsonl", ".json", ".csv", ".parquet")
NAMES = ("file_name", "filename", "file", "video", "video_path", "path")
# Numbers of clips in WebVid and MSR-VTT. Their tables list more clips than most people download.
IDS = ("videoid", "video_id", "image_id")
TEXTS = ("text", "caption", "captions", "prompt", "sentence")
EXAMPLE = '{"file_name": "...", "text": "..."}'
TEXT_SUFFIXES = (".txt", ".caption")
MOVING = (*VIDEO_SUFFIXES, ".gif", ".apng")
STILLS = (".jpg", ".jpeg", ".png", ".webp")  # a thumbnail if beside MOVING of the same stem
IGNORED = re.compile(r"\..*|.*\.md|(readme|license)(\.(txt|rst|html))?|(eh)?thumbs\.db|desktop\.ini"
                     "|__macosx|@eadir")


def _kind(path):
    return path.suffix.lower()


def _order(path):
    return [natural_key(part) for part in path.parts]


def _walk(folder):
    """(files, folders) below a folder, in natural order.

    Links are followed, those to folders last. Each folder is read once, because a link may lead
    back up.
    """
    files, folders, links, waiting, seen = [], [], [], [folder], set()
    while waiting or links:
        here = (waiting or links).pop()
        if (real := here.resolve()) in seen:
            continue
        seen.add(real)
        for path in here.iterdir():
            if IGNORED.fullmatch(path.name.lower()):
                continue
            if not path.is_dir():
                files.append(path)
                continue
            folders.append(path)
            (links if path.is_symlink() else waiting).append(path)
    moving = {path.with_suffix("") for path in files if _kind(path) in MOVING}
    files = [path for path in files
             if _kind(path) not in STILLS or path.with_suffix("") not in moving]
    return sorted(files, key=_order), sorted(folders, key=_order)


def _fold(name):
    """A name without what archives and systems change: case, composed letters, backslashes."""
    return unicodedata.normalize("NFC", str(name).replace("\\", "/")).casefold()


def _index(pairs):
    """{folded name: [(name, path), ...]} of (name, path)."""
    index = {}
    for name, path in pairs:
        index.setdefault(_fold(name), []).append((str(name), path))
    return index


def _find(name, index):
    """The paths that have exactly this name in an index, otherwise those whose folded name it is."""
    same = index.get(_fold(name), [])
    return [path for exact, path in same if exact == str(name)] or [path for _, path in same]


def _problem(path, caption):
    """What is wrong with a clip and its caption, or None."""
    if not path.exists():
        return "a link to a file that does not exist; download it, or remove the link"
    if not path.is_dir() and _kind(path) not in CLIP_SUFFIXES:
        return f"not a clip (known: {' '.join(CLIP_SUFFIXES)}); convert or remove it"
    # U+FFFD replaces bytes that are not UTF-8; surrogates stand for such bytes in names.
    if not caption.split() or re.search("[\ufffd\ud800-\udfff]", caption):
        return f"needs a caption of words in UTF-8, got {caption!r:.50}"
    return None


def _json(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _prompts(path):
    """The file of the captions if path is videos.txt, the list of clips that belongs to it."""
    beside = [path.with_name(name) for name in ("prompt.txt", "prompts.txt")]
    return next((file for file in beside if path.name == "videos.txt" and file.exists()), None)


def _rows(table):
    """Yield (line, row) of a table, None for a row that cannot be read."""
    if _kind(table) == ".jsonl":
        lines = enumerate(table.read_bytes().split(b"\n"), start=1)
        yield from ((number, _json(line)) for number, line in lines if line.strip())
    elif _kind(table) == ".csv":
        text = table.read_text(encoding="utf-8-sig", errors="replace")
        reader = csv.DictReader(io.StringIO(text))
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error:
            yield reader.line_num, None
    elif _kind(table) == ".txt":
        names, texts = (path.read_text(encoding="utf-8-sig", errors="replace").strip().split("\n")
                        for path in (table, _prompts(table)))
        for i in range(max(len(names), len(texts))):
            yield i + 1, dict(zip(("file", "text"), [*names[i : i + 1], *texts[i : i + 1]]))
    elif _kind(table) == ".json":
        rows = _json(table.read_bytes())
        if isinstance(rows, dict):  # MSR-VTT, or one clip's own, or {name: caption or row}
            rows = (rows.get("sentences") or rows.get("annotations")
                    or rows.keys() & {*TEXTS} and [{"file_name": table.stem} | rows]
                    or [{"file_name": name} | (row if isinstance(row, dict) else {"text": row})
                        for name, row in rows.items()])
        yield from enumerate(rows if isinstance(rows, list) else [None], start=1)


def _entry(row):
    """(names to look for, captions, whether the clip may be missing) of a row, None without them"""
    try:
        row = {key.strip().lower(): value for key, value in row.items()}  # csv: too many have None
        columns = (*TEXTS, "name") if "videoid" in row else TEXTS  # WebVid's caption is in "name"
        texts = [row[column] for column in columns if column in row][0]
        texts = [" ".join(text.split()) for text in (texts if isinstance(texts, list) else [texts])]
        if names := [row[column].strip().replace("\\", "/") for column in NAMES if column in row]:
            return names[:1], texts, False
        number = str([row[column] for column in IDS if column in row][0])
        return [f"{row.get('page_dir')}/{number}", number], texts, True
    except (LookupError, AttributeError):
        return None


def _by_tables(folder, files, folders, tables):
    """Yield (path, caption, problem or None) from tables, {path: [(line, entry), ...]}.

    A name is relative to the table's folder, or it is the name of one clip anywhere. It may lack
    the suffix.
    """
    clips = [*folders, *(path for path in files if _kind(path) in CLIP_SUFFIXES)]
    relative = ((path, path.relative_to(folder)) for path in clips)
    index = _index((name, path) for path, short in relative for name in {
        str(short), str(short.with_suffix("")), short.name, short.stem})
    listed = set()
    for table, entries in tables.items():
        for line, entry in entries:
            if entry is None:
                yield table, "", f"line {line} needs {EXAMPLE} in UTF-8"
                continue
            names, captions, may_miss = entry
            places = [os.path.relpath(table.parent / name, folder) for name in names]
            paths = next(filter(None, (_find(name, index) for name in (*places, *names))),
                         [folder / places[0]])
            if len(paths) > 1:
                yield table, "", (f"line {line}: several clips are called {names[-1]}; name the "
                                  "folder, too")
            elif not os.path.lexists(paths[0]):
                if not may_miss:
                    yield table, "", (f"line {line}: there is no clip {names[0]}; remove the line "
                                      "or add the clip")
            else:
                listed.add(paths[0])
                yield from ((paths[0], text, _problem(paths[0], text)) for text in captions)
    for path in files:
        if not listed & {path, *path.parents} and _kind(path) not in TEXT_SUFFIXES:
            yield path, "", f"not in {next(iter(tables)).name}; add a line or remove the file"


def _by_name(folder, files, folders):
    """Yield (path, caption, problem or None) with captions from .txt files or sub-folders."""
    captions = {path for path in files if _kind(path) in TEXT_SUFFIXES}
    index = _index((path.with_suffix(""), path) for path in captions)
    of_clips = {path.parent for path in files if _kind(path) in MOVING}
    frames = {path for path in folders if path not in of_clips and _find(path, index)}
    files = [path for path in files if not frames.intersection(path.parents)]
    texts = {path: _find(path, index) for path in frames} | {
        path: _find(path.with_suffix(""), index) for path in files if path not in captions}
    names = {path.parent.name for path, found in texts.items()
             if not found and path.parent != folder and _kind(path) in CLIP_SUFFIXES}
    for path in sorted(texts, key=_order):
        for text in texts[path]:
            caption = " ".join(text.read_text(encoding="utf-8-sig", errors="replace").split())
            yield path, caption, _problem(path, caption)
        if not texts[path]:
            name = path.parent.name  # "PlayingChess" and "playing_chess" are "playing chess"
            caption = re.sub("(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()
            problem = _problem(path, caption)
            if path.parent == folder or len(names) == 1 and not path.name.startswith(f"v_{name}_g"):
                problem = problem or f"clip without a caption; write it into {path.stem}.txt"
            yield path, caption, problem
    unused = captions.difference(*texts.values())
    for path in (path for path in files if path in unused):
        yield path, "", "caption without a clip; remove it or add the clip"


def find_clips(folder):
    """The clips of a folder and their captions: ([(path, [caption, ...]), ...], [problem, ...]).

    Hidden files, Thumbs.db and the like, .md, README and LICENSE are ignored, and an image beside a
    video of the same stem, its thumbnail. Any other file that is neither clip nor caption is a
    problem. Raises ValueError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    files, folders = _walk(folder)
    rows = {path: [(line, _entry(row)) for line, row in _rows(path)]
            for path in files if _kind(path) in TABLES or _prompts(path)}
    tables = {path: entries for path, entries in rows.items() if any(e for _, e in entries)}
    files = [path for path in files if path not in rows]
    found = [(path, "", f"its captions cannot be read; write a line {EXAMPLE} for each clip into "
              "metadata.jsonl, or remove the file") for path in rows if path not in tables]
    found += (_by_tables(folder, files, folders, tables) if tables
              else _by_name(folder, files, folders))
    clips = {}
    for path, caption, problem in found:
        if not problem:
            clips.setdefault(path, {})[caption] = None  # a dictionary drops repeated captions
    problems = [f"{path}: {problem}" for path, _, problem in found if problem]
    if not clips and not problems:
        problems = [f"{folder}: no clips in it (known: folders, {' '.join(CLIP_SUFFIXES)})"]
    return [(path, [*captions]) for path, captions in clips.items()], problems
