"""Find the clips of a folder and their captions.

1.  If the folder has tables, all captions come from them, and a clip that none lists is a problem.
    A table is a .jsonl, .json (a list of objects), .csv or .tsv file with a row per caption, as
    {"file_name": "dogs/1.mp4", "text": "a dog barks"}, or the two files videos.txt and prompt.txt.
2.  Otherwise a caption is the text of the .txt or .caption file beside the clip (1.mp4, 1.txt), or
    the name of its sub-folder (ApplyEyeMakeup/1.avi: "apply eye makeup"), as in UCF-101. The name
    of a single sub-folder is no caption, and neither are names such as "train", "clips" or "001".

A clip is a file that media/read.py reads, or a folder of images, its frames. A folder of images can
also be a class of stills, so it is one clip only if it has its own caption: a row of a table, or
NAME.txt beside the folder NAME.
"""

import csv
import io
import itertools
import json
import os
import re
import unicodedata
from pathlib import Path

from media.read import CLIP_SUFFIXES, IGNORED, VIDEO_SUFFIXES, natural_key

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NAMES = ("filename", "file", "video", "videopath", "filepath", "path", "clip", "image")  # no "_"
# Numbers of clips in WebVid and MSR-VTT. Their tables list more clips than most people download.
IDS = ("videoid", "imageid", "clipid", "id")
TEXTS = ("text", "caption", "captions", "prompt", "sentence", "description")
EXAMPLE = '{"file_name": "...", "text": "..."}'
PROMPTS = ("prompt.txt", "prompts.txt", "captions.txt")  # beside videos.txt
TEXT_SUFFIXES = (".txt", ".caption")
MOVING = (*VIDEO_SUFFIXES, ".gif", ".apng")
STILLS = (".jpg", ".jpeg", ".png", ".webp")  # a thumbnail if beside MOVING of the same stem
# Names of sub-folders that say nothing about their clips
NO_CAPTION = re.compile(
    r"(?i)(train|val(idation)?|test|all|data|part|chunk|(video|clip|image|frame)s?)?[\d_ .-]*")


def _kind(path):
    return path.suffix.lower()


def _walk(folder, seen):
    """Yield all paths below a folder, links last. It enters no folder twice, as links may ask."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_symlink(), natural_key(p.name))):
        if not IGNORED.fullmatch(path.name.lower()):
            yield path
            if path.is_dir() and path.resolve() not in seen:
                yield from _walk(path, seen)


def _fold(name):
    """A name without what archives and systems change: case, composed letters, backslashes."""
    return unicodedata.normalize("NFC", str(name).replace("\\", "/")).casefold()


def _index(pairs):
    """An index of (name, path) for _find()."""
    index = {}
    for name, path in pairs:
        index.setdefault(_fold(name), []).append((str(name), path))
    return index


def _find(name, index):
    """The paths that have exactly this name in an index, otherwise this name when folded."""
    same = index.get(_fold(name), [])
    return [path for exact, path in same if exact == str(name)] or [path for _, path in same]


def _problem(path, caption):
    """What is wrong with a clip and its caption, or None."""
    if not path.exists():
        return "a link to a file that does not exist; download it, or remove the link"
    if not path.is_dir() and _kind(path) not in CLIP_SUFFIXES:
        return f"not a clip (known: {' '.join(CLIP_SUFFIXES)}); convert or remove it"
    if path.is_dir() and any(_kind(p) in MOVING or p.is_dir() for p in path.iterdir()):
        return "a folder of clips, not of frames; give each clip its own row"
    # Signs of bytes that are not UTF-8: U+0000 (UTF-16), U+FFFD (replaced) and surrogates (names)
    if not caption.split() or re.search("[\0\ufffd\ud800-\udfff]", caption):
        return f"needs a caption of words in UTF-8, got {caption!r:.50}"
    return None


def _text(path):
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _prompts(path):
    """The captions of the list of clips beside it, videos.txt, or None."""
    names = PROMPTS if path.name == "videos.txt" else ()
    return next(filter(Path.is_file, map(path.with_name, names)), None)


def _rows(table):
    """The rows of a table; one that cannot be read is None."""
    text = _text(table) if _kind(table) != ".parquet" else ""
    if _kind(table) in (".csv", ".tsv"):
        header, _, _ = text.partition("\n")  # spreadsheets also write semicolons and tabs
        return csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    if _kind(table) == ".txt":
        lines = (lines.rstrip().split("\n") for lines in (text, _text(_prompts(table))))
        return [{"file": name, "text": text} for name, text in itertools.zip_longest(*lines)]
    rows = _json(text)
    if rows is None or isinstance(rows, dict) and _kind(table) == ".jsonl":
        return [_json(line) for line in text.split("\n") if line.strip()]
    if isinstance(rows, dict):  # of the clip beside, or of a list, or {name: caption or row}
        beside = {"file_name": table.stem} | rows
        lists = [x for x in rows.values() if isinstance(x, list) and any(map(_entry, x))]
        return _entry(beside) and [beside] or [*itertools.chain(*lists)] or [
            {"file_name": name} | (row if isinstance(row, dict) else {"text": row})
            for name, row in rows.items()]
    return rows if isinstance(rows, list) else []


def _entry(row):
    """(names to look for, captions, whether the clip may be missing) of a row, None without them"""
    try:
        row = {key.strip().lower().replace("_", ""): value for key, value in row.items()}
        webvid = row.get("name") if "videoid" in row else None  # the caption's column there
        texts = max((row[text] for text in TEXTS if text in row), key=bool, default=webvid)
        texts = texts or [""] if isinstance(texts, list) else [texts]
        texts = [" ".join(text.split()) for text in texts]
        names = (str(row.get(column) or "").strip().replace("\\", "/") for column in NAMES)
        if name := next(filter(None, names), None):
            return [name], texts, False
        number = str([row[column] for column in IDS if column in row][0])
        return [f"{row.get('pagedir')}/{number}", number], texts, True
    except (LookupError, AttributeError):  # csv: the key of too many values is None
        return None


def _entries(table):
    """The entries of a table, [] if it is no table of captions."""
    try:
        entries = [_entry(row) for row in _rows(table)]
    except (csv.Error, TypeError):
        return []
    return entries if any(entries) else []


def _by_tables(folder, paths, folders, tables):
    """Yield (path, caption, problem or None) from tables, {path: entries}."""
    # A name is relative to the table's folder or to any other; it may lack the suffix.
    short = [(path, path.relative_to(folder)) for path in paths
             if path in folders or _kind(path) in CLIP_SUFFIXES]
    whole = _index((name, path) for path, p in short for name in {p, p.with_suffix("")})
    parts = _index((name, path) for path, p in short for i in range(1, len(p.parts))
                   for end in [Path(*p.parts[i:])] for name in {end, end.with_suffix("")})
    listed = set()
    for table, entries in tables.items():
        for number, entry in enumerate(entries, start=1):
            names, captions, may_miss = entry or ([""], [], False)
            places = [os.path.relpath(table.parent / name, folder) for name in names]
            found = next(filter(None, (_find(name, index) for index in (whole, parts)
                                       for name in (*places, *names))), [folder / places[0]])
            if not entry:
                yield table, "", f"row {number} needs a clip and a caption, as {EXAMPLE}, in UTF-8"
            elif len(found) > 1:
                yield table, "", f"row {number}: {names[-1]} is several clips; write it in full"
            elif os.path.lexists(found[0]):
                listed.add(found[0])
                yield from ((found[0], text, _problem(found[0], text)) for text in captions)
            elif not may_miss:
                yield table, "", f"row {number}: no clip {names[0]}; remove the row or add the clip"
    for path in paths:
        if not (path in folders or listed & {path, *path.parents} or _kind(path) in TEXT_SUFFIXES):
            yield path, "", f"not in {next(iter(tables)).name}; add a row or remove the file"


def _by_name(folder, paths, folders):
    """Yield (path, caption, problem or None) with captions from .txt files or sub-folders."""
    captions = [path for path in paths if _kind(path) in TEXT_SUFFIXES and path.is_file()]
    index = _index((path.with_suffix(""), path) for path in captions)
    of_clips = {path.parent for path in paths if _kind(path) in MOVING}
    frames = {path for path in folders - of_clips if _find(path, index)}
    paths = [path for path in paths if not frames.intersection(path.parents)]
    others = {*captions, *folders} - frames
    texts = {path: _find(path if path in frames else path.with_suffix(""), index)
             for path in paths if path not in others}
    names = {path.parent.name for path, found in texts.items()
             if not found and path.parent != folder and _kind(path) in CLIP_SUFFIXES
             and not NO_CAPTION.fullmatch(path.parent.name)}
    for path, found in texts.items():
        for caption in [" ".join(_text(text).split()) for text in found]:
            yield path, caption, _problem(path, caption)
        if not found:
            name = path.parent.name  # "PlayingChess" and "playing_chess" are "playing chess"
            caption = re.sub("(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).lower()
            problem = _problem(path, caption)
            if (path.parent == folder or name not in names
                    or len(names) < 2 and not path.name.startswith(f"v_{name}_g")):
                problem = problem or (f"clip without a caption; write it into {path.stem}.txt "
                                      '(sub-folders\' names count if two say more than "train")')
            yield path, caption, problem
    for path in sorted({*captions}.difference(*texts.values()).intersection(paths)):
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
    paths = list(_walk(folder, set()))
    folders = {path for path in paths if path.is_dir()}
    moving = {path.with_suffix("") for path in paths if _kind(path) in MOVING}
    tables = {path: _entries(path) for path in paths
              if path.is_file() and (_kind(path) in TABLES or _prompts(path))}
    paths = [path for path in paths if path not in tables
             and not (_kind(path) in STILLS and path.with_suffix("") in moving)]
    problems = [f"{path}: its captions cannot be read; write a line {EXAMPLE} for each clip into "
                "metadata.jsonl, or remove the file" for path in tables if not tables[path]]
    tables, clips = {path: entries for path, entries in tables.items() if entries}, {}
    for path, caption, problem in (_by_tables(folder, paths, folders, tables) if tables
                                   else _by_name(folder, paths, folders)):
        if problem:
            problems.append(f"{path}: {problem}")
        else:
            clips.setdefault(path, {})[caption] = None  # a dictionary drops repeated captions
    if not clips and not problems:
        problems = [f"{folder}: no clips in it (known: folders, {' '.join(CLIP_SUFFIXES)})"]
    return [(path, [*captions]) for path, captions in clips.items()], problems
