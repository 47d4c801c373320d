"""Read the frames of a clip, which is a video, an animation, an image or a folder of images.

Generators of (image, duration in seconds) form a chain. A decoder yields every frame of a file,
`_resample` drops or repeats frames (ffmpeg does in videos), and read_clip crops, resizes and packs
them. Each image is resized before the next one is decoded, so a long video does not fill the
memory. Pillow decodes GIF, WebP, PNG, APNG and JPEG; only videos need ffmpeg and ffprobe.
"""

import contextlib
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
CLIP_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
# Files that systems and authors add to a folder, in lower case
IGNORED = re.compile(r"\..*|.*\.md|(readme|license)(\.(txt|rst|html))?|(eh)?thumbs\.db|desktop\.ini"
                     "|__macosx|@eadir")
# Most bytes of a clip's frames in memory, enough for 14 minutes of 256x256 at 25 frames per second
MAX_CLIP_BYTES = 4 * 2**30
REMEDY = "export or download it again, or remove it"
# Only local files, so a playlist named .mp4 cannot make ffmpeg fetch its entries. In the commands
# below, V selects a video stream that is not a cover image.
SOURCE = ["-v", "error", "-protocol_whitelist", "file"]
# ffmpeg's lines that tell its own users to change its command or to write to its authors
ADVICE = re.compile(r"\b(to ignore|consider|options?|your?|please|use|add)\b|\s'?-[a-z]", re.I)

# Exceptions that Pillow raises for files that are damaged, of another format or too large
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, OverflowError,
              struct.error, Image.DecompressionBombError)


def natural_key(name):
    """A sort key that compares numbers by value: frame2 before frame10. Every name has its own."""
    parts = re.split(r"(\d+)", name.lower())  # the numbers have odd indices
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _rgb(image):
    """An image of any mode as RGB, black where it is transparent."""
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:  # convert() alone would show the colours of hidden pixels
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def _image_frames(path):
    """Decode a GIF, WebP, PNG or JPEG, animated or still."""
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG")) as opened:
            # An MPO is a JPEG with more images of the same moment, such as a depth map.
            num_frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            # An APNG's cover is no part of the animation.
            for index in range(bool(opened.info.get("default_image")), num_frames):
                opened.seek(index)
                # A photograph in portrait format is stored rotated, with the angle in its EXIF.
                image = _rgb(opened if num_frames > 1 else ImageOps.exif_transpose(opened))
                duration = Fraction(opened.info.get("duration", 0)).limit_denominator(1000)
                if num_frames > 1 and duration <= 10:  # browsers show such frames for 100 ms
                    duration = Fraction(100)
                yield image, duration / 1000 or None
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read ({error}); {REMEDY}") from None


def _folder_frames(path):
    """Decode a folder of images, in natural order of their names."""
    files = [file for file in path.iterdir() if not IGNORED.fullmatch(file.name.lower())]
    for file in sorted(files, key=lambda file: natural_key(file.name)):
        yield from ((image, None) for image, _ in _image_frames(file))


def require_programs(*names, purpose, remedy):
    """Raise ValueError if one of the programs is not installed."""
    if missing := [name for name in names if shutil.which(name) is None]:
        raise ValueError(f"{purpose} needs the {missing[0]} program; install ffmpeg or {remedy}")


def ffmpeg_error(log):
    """The last line that ffmpeg wrote into a file, except advice, without addresses in memory."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    lines = [line for line in lines if not ADVICE.search(line)] or ["no frames"]
    return re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\]\s*", "", lines[-1])


def _average_duration(path):
    """Average seconds per frame of a video, None if ffprobe does not know."""
    require_programs("ffprobe", purpose=path, remedy="convert the clip to GIF")
    probe = ["-select_streams", "V:0", "-show_entries", "stream=avg_frame_rate", "-of", "csv=p=0"]
    rate = subprocess.run(["ffprobe", *SOURCE, *probe, f"file:{path}"], capture_output=True,
                          text=True, check=False).stdout
    known = re.match(r"([1-9]\d*)/([1-9]\d*)\b", rate)  # "0/0" means unknown
    return Fraction(int(known[2]), int(known[1])) if known else None


def _video_frames(path, frame_rate):
    """Decode a video with ffmpeg: every frame, or with frame_rate those on screen at its times."""
    require_programs("ffmpeg", purpose=path, remedy="convert the clip to GIF")
    duration = 1 / Fraction(frame_rate) if frame_rate else _average_duration(path)
    # Matroska and WebM round times to 1/1000 s, so frames count 2/1000 s before they are due.
    resample = (f"settb=AVTB,setpts=PTS-STARTPTS+2000,fps={frame_rate}:round=down,"
                if frame_rate else "")
    # Make pixels square. Number the frames and ignore their times; otherwise ffmpeg drops and
    # repeats frames to get a constant rate. Each PPM image has its own size, after any rotation.
    filters = ["-vf", f"{resample}scale=iw*sar:ih,setsar=1,setpts=N/TB", "-r", "1"]
    output = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    command = ["ffmpeg", "-nostdin", "-xerror", *SOURCE, "-i", f"file:{path}", "-map", "0:V:0"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [*command, *filters, *output], stdout=subprocess.PIPE, stderr=log
    ) as process:
        # A PPM image is a line "P6", a line "width height", a line "255" and the pixels. A caller
        # that stops early closes the pipe, which ends ffmpeg.
        while process.stdout.readline() == b"P6\n":
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) == 3 * width * height:  # fewer if ffmpeg failed; its log says why
                yield Image.frombytes("RGB", (width, height), pixels), duration
        process.wait()
        error = ffmpeg_error(log)
    if "matches no streams" in error:
        raise ValueError(f"{path}: has no moving picture, only sound or a cover; remove it")
    # For a Matroska file that is cut off, ffmpeg returns 0 but writes "prematurely" into its log.
    if process.returncode or "prematurely" in error:
        raise ValueError(f"{path}: damaged, or not a video ({error}); {REMEDY}")


def _decode(path, frame_rate):
    """A generator of (RGB image, duration or None) for the frames of a file or folder."""
    if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
        return _video_frames(path, frame_rate)
    frames = _folder_frames(path) if path.is_dir() else _image_frames(path)
    return frames if frame_rate is None else _resample(frames, frame_rate)


def _resample(frames, frame_rate):
    """Yield the frame shown at 0, 1/frame_rate, 2/frame_rate, ... seconds until the end.

    A frame without a duration, of a folder of images or a still, is yielded once.
    """
    step, end = 1 / Fraction(frame_rate), Fraction(0)
    time = min(step / 2, Fraction(1, 200))  # not 0, because GIF rounds its times to 1/100 s
    for image, duration in frames:
        end = end + (duration or step)
        while time < end:
            yield image, step
            time = time + step


def centre_square(image, image_size):
    """The largest square in the middle of an image, resized to image_size pixels."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Pillow widens the filter when it shrinks an image, which prevents aliasing. Bicubic rings
    # less around hard edges than Lanczos does, and a model would learn to draw the ringing.
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), Image.BICUBIC, box=box)


def read_clip(path, stride=1, frame_rate=None, max_frames=None, image_size=None):
    """Read a video, an animation, an image or a folder of images.

    frame_rate resamples the clip to that many frames per second. Then stride keeps every N-th of
    them, and decoding ends after max_frames. image_size crops each frame's middle square and
    resizes it.

    Returns frames, uint8 (t, h, w, 3), and frames per second, None if the file has no rate.
    Raises ValueError naming the file and a remedy.
    """
    path, sizes, durations = Path(path), set(), []
    pixels = bytearray()  # one growing buffer, because np.stack would hold all frames twice
    with contextlib.closing(_decode(path, frame_rate)) as frames:  # closing it ends ffmpeg
        kept = itertools.islice(frames, 0, None, stride)
        for image, duration in itertools.islice(kept, max_frames):
            sizes.add(image.size)
            if image_size is not None:
                image = centre_square(image, image_size)
            pixels += image.tobytes()
            durations.append(duration)
            if len(pixels) > MAX_CLIP_BYTES:
                raise ValueError(f"{path}: needs at most {MAX_CLIP_BYTES / 2**30:g} GiB of frames; "
                                 "raise --stride, or lower --max-frames or --image-size")
    if len(sizes) != 1:
        raise ValueError(f"{path}: needs frames of one size, got {sorted(sizes) or 'no frames'}")
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, image.height, image.width, 3)
    return frames, None if None in durations else float(len(frames) / sum(durations) / stride)


def grid_rate(path):
    """The frame rate that restores equal frames, which were stored once; None if unknown."""
    animated = path.suffix.lower() in IMAGE_SUFFIXES
    delays = [delay for _, delay in _image_frames(path)] if animated else []
    if not delays or None in delays:
        return None
    # Each delay is a number of shortest ones, but rounded to 1/100 s. The rate is rounded down so
    # that no frame is asked for before it is shown.
    counts = itertools.accumulate(round(delay / min(delays)) for delay in delays)
    ends = itertools.accumulate(delays)
    return min(int(100 * count / end) / 100 for count, end in zip(counts, ends, strict=True))
