"""ClipFolder: captioned clips from a folder of your own.

1.  If the folder has metadata.jsonl, with a line {"file_name": "dogs/1.mp4", "text": "a dog barks"}
    per clip, all captions come from it, and a clip that it does not list is a problem.
2.  Else a caption is the text of the .txt file beside the clip (1.mp4, 1.txt), or the name of its
    sub-folder (playing_chess/1.mp4: "playing chess"), as in UCF-101.

A clip is a file that media/read.py reads, or a folder of images, its frames. A folder of images can
also be a class of stills. So it is one clip only if it has its own caption: a line in
metadata.jsonl, or NAME.txt beside the folder NAME.

    python data.py check FOLDER     read every clip and list every problem
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import add_flags, given_flags, option, run_main
from media.read import CLIP_SUFFIXES, iter_clip, natural_key, read_clip

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
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"file_name needs to be a path below the folder, got {name!r}")
    return folder / name, entry["text"]


def _clips_by_metadata(folder):
    """find_clips for a folder with metadata.jsonl."""
    source, clips, problems, lines = folder / METADATA, [], [], {}
    for number, line in enumerate(source.read_bytes().split(b"\n"), start=1):
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
                caption = text.read_text("utf-8-sig") if text in texts else name
                clips.append((path, _caption(caption)))
            except ValueError as error:  # also a UnicodeDecodeError
                problems.append(f"{text}: {error}; write a caption in UTF-8")
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


def _check_length(path, count, num_frames, stride, frame_rate):
    """Raise ValueError if a clip has fewer than num_frames frames."""
    if count < num_frames:
        pace = f"stride {stride}" if frame_rate is None else f"{frame_rate:g} per second"
        raise ValueError(f"{path}: needs {num_frames} frames at {pace}, got {count}; "
                         "lower --num-frames or --stride, or raise --frame-rate")


class ClipFolder(torch.utils.data.Dataset):
    """A sequence of (frames uint8 (t, 3, image_size, image_size), caption) from a folder.

    An item is a whole clip of t >= num_frames frames; `random_window` selects num_frames of them.
    Raises ValueError if the folder has a problem, or an item's file when it is read.
    """

    def __init__(self, folder, num_frames, image_size, stride=1, frame_rate=None, max_frames=None):
        if max_frames is not None and max_frames < num_frames:
            raise ValueError(f"max_frames needs >= num_frames = {num_frames}, got {max_frames}")
        self.clips, problems = find_clips(folder)
        if len(problems) > 1:
            problems[0] += f" (+{len(problems) - 1} more; run: python data.py check {folder})"
        if problems:
            raise ValueError(problems[0])
        self.captions = [caption for _, caption in self.clips]
        self.num_frames, self.image_size = num_frames, image_size
        self.stride, self.frame_rate, self.max_frames = stride, frame_rate, max_frames

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        path, caption = self.clips[i]
        frames, _ = read_clip(path, self.stride, self.frame_rate, self.max_frames, self.image_size)
        _check_length(path, len(frames), self.num_frames, self.stride, self.frame_rate)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # t h w c -> t c h w
        return frames.contiguous(), caption


def random_window(num_available, num_frames, generator):
    """A random index where num_frames successive frames start, each with the same probability."""
    if not 0 < num_frames <= num_available:
        raise ValueError(f"random_window needs 0 < num_frames <= {num_available}, got {num_frames}")
    return int(torch.randint(num_available - num_frames + 1, (), generator=generator))


@dataclass(frozen=True)
class CheckOptions:
    num_frames: int = option(1, "frames that each clip needs to have")
    image_size: int = option(256, "pixels of the square cropped from each frame")
    stride: int = option(1, "keep every stride-th frame")
    frame_rate: float | None = option(None, "frames per second to resample to; excludes a stride")


def main():
    parser = argparse.ArgumentParser(description="Check a folder of captioned clips.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="read all clips of a folder and list all problems")
    command.add_argument("folder", type=Path)
    add_flags(command, CheckOptions())
    args = parser.parse_args()
    options = CheckOptions(**given_flags(args, CheckOptions()))

    clips, problems = find_clips(args.folder)
    total = 0
    print("frames       size    fps  file: caption")
    for path, caption in clips:
        count, size, rate = 0, "-", None
        try:
            for image, _ in iter_clip(path, max_frames=1):
                size = f"{image.width}x{image.height}"
            frames, rate = read_clip(path, options.stride, options.frame_rate,
                                     image_size=options.image_size)
            count = len(frames)
            _check_length(path, count, options.num_frames, options.stride, options.frame_rate)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        total += count
        rate = "-" if rate is None else f"{rate:.4g}"
        print(f"{count:6} {size:>10} {rate:>6}  {path.relative_to(args.folder)}: {caption:.50}")
    print(*problems, f"{len(clips)} clips, {total} frames, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
