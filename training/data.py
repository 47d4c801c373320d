"""Captioned clips from a folder of your own, by the rules of media/captions.py.

    python train.py RUN --data FOLDER --check     read every clip and list every problem
"""

import hashlib
import os

import torch

from checkpoints.tokenizers import describe_cuts
from checkpoints.weights import load_pipeline
from media.captions import find_clips
from media.read import grid_rate, read_clip


def read_long_enough(path, num_frames, image_size, stride, frame_rate, max_frames):
    """The frames and frame rate of a clip. Raises ValueError if it is too short."""
    frames, rate = read_clip(path, stride, frame_rate, max_frames, image_size)
    if len(frames) < num_frames:
        grid = None if frame_rate else grid_rate(path)
        if grid and num_frames <= len(read_clip(path, stride, grid, max_frames, 1)[0]):
            raise ValueError(f"{path}: needs {num_frames} frames, got {len(frames)}; equal "
                             "successive frames are stored once, so read it with --frame-rate "
                             f"{grid:g}")
        pace = f"stride {stride}" + (f" of {frame_rate:g} frames per second" if frame_rate else "")
        raise ValueError(f"{path}: needs {num_frames} frames at {pace}, got {len(frames)}; "
                         "lower --num-frames or --stride, or raise --frame-rate or --max-frames")
    return frames, rate


class ClipFolder(torch.utils.data.Dataset):
    """A sequence of (frames uint8 (t, 3, image_size, image_size), caption) from a folder.

    An item is a whole clip of t >= num_frames frames, of which a training step selects num_frames.
    Raises ValueError if the folder has a problem. Reading an item raises it if the clip has one.
    """

    def __init__(self, folder, num_frames, image_size, stride=1, frame_rate=None, max_frames=None):
        self.folder, (self.clips, problems) = folder, find_clips(folder)
        if problems:
            raise ValueError(f"{problems[0]} (problem 1 of {len(problems)}; run: python train.py "
                             f"RUN --data {folder} --check)")
        # All clips' first captions, then all second ones, and so on, so captions[i] is one of clip
        # i % len(self). A clip with fewer captions repeats them.
        rounds = max(len(texts) for _, texts in self.clips)
        self.captions = [texts[i % len(texts)] for i in range(rounds) for _, texts in self.clips]
        self.num_frames, self.image_size, self.max_frames = num_frames, image_size, max_frames
        self.how = image_size, stride, frame_rate, max_frames

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        path, captions = self.clips[i]
        frames, _ = read_long_enough(path, self.num_frames, *self.how)
        return torch.from_numpy(frames).movedim(-1, 1), captions[0]  # t h w 3 -> t 3 h w

    def version(self, i):
        """What clip i depends on: names and contents of its files, and how it is read.

        It is the same in another folder, and in a copy, which has another time.
        """
        path, _ = self.clips[i]
        files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
        names = [os.path.relpath(file, self.folder) for file in files]
        return [(name, *map(fingerprint, [file] * file.is_file()))
                for name, file in zip(names, files, strict=True)], *self.how


def fingerprint(path):
    """A hash of a file's size and its first and last 64 KiB, because editing a clip changes one."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        parts = [(file.seek(start), file.read(2**16))[1] for start in (0, max(0, size - 2**16))]
    return hashlib.sha256(repr(size).encode() + b"".join(parts)).hexdigest()


def check(options, new_tokenizer):
    """Read every clip as a training with these TrainOptions would, and print every problem.

    new_tokenizer(options, captions) trains one. Returns the exit code, 1 if there are problems.
    """
    if options.data == "shapes":
        print("shapes are drawn, so there is nothing to check")
        return 0
    clips, problems = find_clips(options.data)
    total = 0
    print("frames    fps  file: caption")
    for path, captions in clips:
        frames, rate = [], None
        try:
            frames, rate = read_long_enough(
                path, options.num_frames, options.image_size, options.stride, options.frame_rate,
                options.max_frames)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        total += len(frames)
        more = f" (and {len(captions) - 1} more)" if len(captions) > 1 else ""
        pace = f"{rate:.4g}" if rate else "-"
        print(f"{len(frames):6} {pace:>6}  {path}: {captions[0]:.50}{more}")
    captions = [text for _, texts in clips for text in texts]
    tokenizer = (new_tokenizer(options, captions) if options.init is None else
                 load_pipeline(options.init, "none", options.merges, dtype=None).tokenizer)
    cuts = describe_cuts(tokenizer, captions, "captions")
    summary = f"{len(clips)} clips, {total} frames, {len(problems)} problems"
    print(*problems, *cuts, summary, sep="\n")
    return 1 if problems else 0
