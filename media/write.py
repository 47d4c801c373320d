"""Write clips as GIF, MP4 or PNG contact sheets.

A clip is a tensor (t, 3, h, w) in [-1, 1]. A written animation has exactly its frames, all of equal
duration. Pillow's encoders merge equal frames, so this file assembles a GIF frame by frame.
"""

import contextlib
import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import GifImagePlugin, Image

from support.files import atomic

SEPARATOR = 2  # pixels between the images of a contact sheet
READABLE = 128  # pixels; smaller clips are enlarged, because viewers show them like stamps


def to_uint8(clip):
    """A tensor (..., 3, h, w) as a uint8 array (..., h, w, 3); clamps values to [-1, 1]."""
    if not clip.isfinite().all():  # they would be written as black
        raise ValueError("the clip to write has values that are NaN or infinite")
    pixels = (clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()  # ... 3 h w -> ... h w 3


def contact_sheet(clips):
    """One image with a row for each clip and a column for each frame, white lines between them.

    clips: (n, t, 3, h, w), or a list of clips whose t may differ. Returns a clip (1, 3, H, W).
    """
    height, width = clips[0].shape[-2] + SEPARATOR, clips[0].shape[-1] + SEPARATOR
    columns = max(len(clip) for clip in clips)
    sheet = torch.ones(1, 3, len(clips) * height - SEPARATOR, columns * width - SEPARATOR)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(clip):
            y, x = row * height, column * width
            sheet[0, :, y : y + height - SEPARATOR, x : x + width - SEPARATOR] = frame
    return sheet


def side_by_side(clips):
    """One clip (t, 3, H, W) that shows clips (n, t, 3, h, w) in a near-square grid."""
    columns = math.ceil(math.sqrt(len(clips)))
    return torch.cat([contact_sheet(frames.split(columns)) for frames in clips.unbind(1)])


def _write_gif(file, parts, frames_per_second):
    """A GIF that loops, with one palette per part, because one per frame would flicker."""
    count = 0
    for clip in parts:
        t, _, h, w = clip.shape
        # quantize() does not dither here, so flat colours stay exact and no grain moves between
        # frames. k-means improves the palette of gradients.
        column = Image.fromarray(to_uint8(clip).reshape(t * h, w, 3)).quantize(256, kmeans=1)
        images = [column.crop((0, i * h, w, (i + 1) * h)) for i in range(t)]
        if count == 0:  # the first palette is the file's; others are stored with their frames
            file.writelines(GifImagePlugin.getheader(images[0], info={"loop": 0})[0])  # without end
        # Durations are whole 1/100 s. Rounding start times instead keeps errors from adding up.
        times = np.round(np.arange(count, count + t + 1) * 100 / frames_per_second)
        for image, duration in zip(images, np.diff(times).astype(int), strict=True):
            file.writelines(GifImagePlugin.getdata(image, duration=10 * int(duration),
                                                   include_color_table=count > 0))
        count += t
    file.write(b";")


def _write_png(file, parts, frames_per_second):
    """Up to eight frames in a row, more in a near-square grid."""
    clip = torch.cat(list(parts))
    clip = contact_sheet([clip]) if len(clip) <= 8 else side_by_side(clip[:, None])
    Image.fromarray(to_uint8(clip)[0]).save(file, "PNG")


def _write_mp4(file, parts, frames_per_second):
    """H.264 in 4:2:0, which every player and browser supports; pads odd sizes to even ones."""
    from media.read import ffmpeg_error  # imported here, because training writes no .mp4

    parts = iter(parts)
    first = next(parts)
    h, w = first.shape[-2:]
    source = f"-f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {frames_per_second} -i -"
    coding = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -c:v libx264 -crf 16 -pix_fmt yuv420p"
    command = f"ffmpeg -v error -y {source} {coding} -movflags +faststart -f mp4".split()
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [*command, f"file:{file.name}"], stdin=subprocess.PIPE, stderr=log,
        start_new_session=True,  # so Ctrl-C does not end ffmpeg before it finishes the file
    ) as process:
        with contextlib.suppress(BrokenPipeError):  # if ffmpeg has stopped, its log says why
            for clip in itertools.chain([first], parts):
                process.stdin.write(to_uint8(clip).tobytes())
        with contextlib.suppress(BrokenPipeError):  # closing writes the rest of the buffer
            process.stdin.close()
        process.wait()
        error = ffmpeg_error(log)
    if process.returncode:
        raise ValueError(f"ffmpeg cannot write the .mp4 ({error}); write a .gif instead")


WRITERS = {".gif": _write_gif, ".png": _write_png, ".mp4": _write_mp4}


def require_writer(path):
    """The function that writes files with this suffix. Raises ValueError if there is none."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"{path}: needs one of the suffixes {' '.join(WRITERS)}")
    if suffix == ".mp4":
        from media.read import require_programs
        require_programs("ffmpeg", purpose="an .mp4", remedy="write a .gif")
    return WRITERS[suffix]


def write_clip(path, clip, frames_per_second=8):
    """Write a clip (t, 3, h, w), float in [-1, 1], in the format that the suffix of path names.

    .gif loops, at most 50 frames per second, because browsers slow down faster ones; .mp4 needs
    ffmpeg; .png shows several frames side by side.
    """
    write_parts(path, [clip], frames_per_second)


def write_parts(path, parts, frames_per_second=8):
    """Write successive parts of a clip as one file, keeping only one in memory (except .png)."""
    writer = require_writer(path)
    with atomic(path) as file:
        writer(file, parts, frames_per_second)


def file_names(prompts, suffix):
    """A file name for each prompt: its words joined by "-", and a number if the name is in use."""
    names = []
    for prompt in prompts:
        stem = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
        # Names have at most 200 bytes, because file systems allow 255. A letter has up to four.
        stem = stem.encode()[:200].decode(errors="ignore") or "no-text"
        count, name = 1, stem + suffix
        while name in names:
            count += 1
            name = f"{stem}-{count}{suffix}"
        names.append(name)
    return names


def enlarge(clip, zoom=0):
    """A clip (..., h, w) with every pixel enlarged to zoom x zoom; 0: to READABLE or more."""
    zoom = zoom or math.ceil(READABLE / min(clip.shape[-2:]))
    return clip.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)


def write_samples(clips, prompts, output, suffix, rate, zoom=0):
    """Write clips into the folder `output`, or all into one file `output`. Returns the paths."""
    clips = (enlarge(clip, zoom) for clip in clips)
    if output.suffix.lower() in WRITERS and not output.is_dir():
        clips = torch.stack(list(clips))  # n t 3 h w
        if output.suffix.lower() == ".png":  # a row for each clip, or eight images in a row
            one = contact_sheet(clips if clips.shape[1] > 1 else clips[:, 0].split(8))
        else:
            one = side_by_side(clips)
        write_clip(output, one, rate)
        return [output]
    paths = [output / name for name in file_names(prompts, suffix)]
    for path, clip in zip(paths, clips, strict=True):
        write_clip(path, clip, rate)
    return paths
