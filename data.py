"""ClipFolder: captioned clips from a folder of your own, by the rules of media/captions.py.

    python data.py check FOLDER     read every clip and list every problem
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import add_flags, check_ranges, given_flags, option, run_main
from media.captions import find_clips
from media.read import check_pace, iter_clip, read_clip


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
        check_pace(stride, frame_rate, max_frames)
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

    def version(self, i):
        """What clip i follows from: name, size and time of its file or files, and how it is read.

        A tuple; two that are equal belong to equal clips.
        """
        path, _ = self.clips[i]
        files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return str(path), stats, self.image_size, self.stride, self.frame_rate, self.max_frames


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
    max_frames: int = option(512, "frames kept of a clip")


def main():
    parser = argparse.ArgumentParser(description="Check a folder of captioned clips.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="read all clips of a folder and list all problems")
    command.add_argument("folder", type=Path)
    add_flags(command, CheckOptions())
    args = parser.parse_args()
    options = CheckOptions(**given_flags(args, CheckOptions()))
    check_ranges(options, num_frames=(1, 10**6), image_size=(1, 16384), stride=(1, 10**6),
                 max_frames=(1, 10**6))

    clips, problems = find_clips(args.folder)
    total = 0
    print("frames       size    fps  file: caption")
    for path, caption in clips:
        count, size, rate = 0, "-", None
        try:
            for image, _ in iter_clip(path, max_frames=1):
                size = f"{image.width}x{image.height}"
            frames, rate = read_clip(path, options.stride, options.frame_rate, options.max_frames,
                                     options.image_size)
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
