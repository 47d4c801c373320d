"""Write clips: GIF, animated WebP, PNG contact sheets, MP4.

A clip is a tensor (t, 3, h, w) in [-1, 1]. A file has exactly its frames, all of one duration, and
is written completely or not at all. Pillow's encoders merge equal frames, so this file assembles
GIF and WebP containers itself, frame by frame.
"""

import contextlib
import io
import itertools
import math
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import GifImagePlugin, Image

from files import atomic
from media.read import ffmpeg_error, require_ffmpeg

SEPARATOR = 2  # pixels between the images of a contact sheet
MAX_SIDE = {".gif": 65535, ".webp": 16383, ".png": 10**6}  # pixels, of the formats; H.264: 16384


def to_uint8(clip):
    """A tensor (..., 3, h, w) as a uint8 array (..., h, w, 3); values are clamped to [-1, 1]."""
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


def _durations(first, num_frames, frames_per_second, units):
    """The durations of frames from number `first` on, in whole units (per second).

    Each is the difference of two rounded times, so rounding errors do not add up.
    """
    times = np.round(np.arange(first, first + num_frames + 1) * units / frames_per_second)
    return np.diff(times).astype(int)


def _write_gif(file, parts, frames_per_second):
    """A GIF that loops, with one palette for each part: a palette for each frame would flicker."""
    if frames_per_second > 50:  # browsers show frames of less than 2 / 100 s more slowly
        raise ValueError(f"frames_per_second needs <= 50 in a GIF, got {frames_per_second}")
    count = 0
    for clip in parts:
        t, _, h, w = clip.shape
        # quantize() does not dither here, so flat colours stay exact and no grain moves between
        # frames. k-means improves the palette of gradients.
        column = Image.fromarray(to_uint8(clip).reshape(t * h, w, 3)).quantize(256, kmeans=1)
        images = [column.crop((0, i * h, w, (i + 1) * h)) for i in range(t)]
        if count == 0:  # the first palette is the file's; others stand beside their frames
            file.writelines(GifImagePlugin.getheader(images[0], info={"loop": 0})[0])  # 0: no end
        durations = _durations(count, t, frames_per_second, 100)
        for image, duration in zip(images, durations, strict=True):
            file.writelines(GifImagePlugin.getdata(image, duration=10 * int(duration),
                                                   include_color_table=count > 0))
        count += t
    file.write(b";")


def _write_webp(file, parts, frames_per_second):
    """A lossless WebP that loops, from still images.

    Format: https://developers.google.com/speed/webp/docs/riff_container
    """
    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    count = 0
    for clip in parts:
        h, w = clip.shape[-2:]
        size = (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
        if count == 0:
            file.write(b"RIFF" + bytes(4) + b"WEBP")
            file.write(chunk(b"VP8X", b"\2\0\0\0" + size) + chunk(b"ANIM", bytes(6)))  # 2: animated
        durations = _durations(count, len(clip), frames_per_second, 1000)
        for frame, duration in zip(to_uint8(clip), durations, strict=True):
            still = io.BytesIO()
            Image.fromarray(frame).save(still, "WEBP", lossless=True)
            header = bytes(6) + size + int(duration).to_bytes(3, "little") + bytes(1)
            file.write(chunk(b"ANMF", header + still.getvalue()[12:]))  # without its RIFF header
        count += len(clip)
    length = file.tell() - 8
    file.seek(4)
    file.write(struct.pack("<I", length))


def _write_png(file, parts, frames_per_second):
    """One frame as an image; up to eight in a row; more in a near-square grid."""
    clip = torch.cat(list(parts))
    clip = contact_sheet([clip]) if len(clip) <= 8 else side_by_side(clip[:, None])
    Image.fromarray(to_uint8(clip)[0]).save(file, "PNG")


def _write_mp4(file, parts, frames_per_second):
    """H.264 in 4:2:0, which every player and browser supports; it needs even sizes."""
    first = next(parts)
    h, w = first.shape[-2:]
    source = f"-f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {frames_per_second} -i -"
    coding = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -c:v libx264 -crf 16 -pix_fmt yuv420p"
    command = f"ffmpeg -v error -y {source} {coding} -movflags +faststart -f mp4".split()
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [*command, f"file:{file.name}"], stdin=subprocess.PIPE, stderr=log,
        start_new_session=True,  # Ctrl-C is for us: we stop giving frames, and it ends the file
    ) as process:
        with contextlib.suppress(BrokenPipeError):  # ffmpeg has stopped: its log says why
            for clip in itertools.chain([first], parts):
                process.stdin.write(to_uint8(clip).tobytes())
        with contextlib.suppress(BrokenPipeError):  # closing writes what is left
            process.stdin.close()
        process.wait()
        error = ffmpeg_error(log)
    if process.returncode:
        raise ValueError(f"{file.name}: ffmpeg cannot write it ({error}); make room, or write a "
                         ".gif")


WRITERS = {".gif": _write_gif, ".webp": _write_webp, ".png": _write_png, ".mp4": _write_mp4}


def require_writer(path):
    """The function that writes files with this suffix. Raises ValueError if there is none."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"{path}: needs one of the suffixes {' '.join(WRITERS)}")
    if suffix == ".mp4":
        require_ffmpeg("an .mp4", "write a .gif")
    return WRITERS[suffix]


def write_clip(path, clip, frames_per_second=8):
    """Write a clip (t, 3, h, w), float in [-1, 1], in the format that the suffix of path names.

    .gif and .webp (lossless) loop, .mp4 needs ffmpeg, .png shows several frames side by side.
    """
    write_parts(path, [clip], frames_per_second)


def write_parts(path, parts, frames_per_second=8):
    """Write successive parts of a clip as one file, without keeping them (but for a .png)."""
    path, writer = Path(path), require_writer(path)
    if not 0 < frames_per_second < math.inf:
        raise ValueError(f"frames_per_second needs > 0, got {frames_per_second}")

    def checked():
        for clip in parts:
            shape_fits = clip.ndim == 4 and clip.shape[1] == 3 and clip.numel()
            if not (shape_fits and clip.is_floating_point()):
                raise ValueError("clip needs float (t, 3, h, w), got "
                                 f"{clip.dtype} {tuple(clip.shape)}")
            if not clip.isfinite().all():
                raise ValueError("clip needs finite values, got NaN or infinity")
            if max(clip.shape[-2:]) > (most := MAX_SIDE.get(path.suffix.lower(), 16384)):
                raise ValueError(f"{path}: needs at most {most:,} pixels a side, got "
                                 f"{max(clip.shape[-2:]):,}; lower --zoom or --image-size")
            yield clip

    with atomic(path) as file:
        writer(file, checked(), frames_per_second)


def file_names(prompts, suffix):
    """A file name for each prompt: its words joined by "-", and a number if the name is in use."""
    names = []
    for prompt in prompts:
        stem = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
        # At most 200 bytes: file systems allow 255, and a letter has up to four.
        stem = stem.encode()[:200].decode(errors="ignore") or "no-text"
        count, name = 1, stem + suffix
        while name in names:
            count += 1
            name = f"{stem}-{count}{suffix}"
        names.append(name)
    return names


def enlarge(clip, zoom):
    """A clip (t, 3, h, w) whose every pixel becomes zoom x zoom pixels."""
    return clip.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)


def write_samples(clips, prompts, output, suffix, rate):
    """Write clips to the folder `output`, one file each, or to the one file. Returns the paths."""
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
