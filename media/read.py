"""Clips from files: any video, animation, image, array or folder as frames. write.py is the inverse.

Reading is a chain of generators of (image, seconds it is shown): a decoder yields every frame of
a file, `_every` or `_resample` drops or repeats some, and `read_clip` crops, resizes and packs the
rest. A frame is made small before the next is decoded, so a long video never sits in memory.

GIF, WebP, PNG and JPEG go through Pillow, arrays through numpy. Anything else is what the programs
ffmpeg and ffprobe are for, if they are installed; nothing here needs them otherwise.
"""

import contextlib
import itertools
import math
import re
import shutil
import struct
import subprocess
import tempfile
import tokenize
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
CLIP_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".npy")

MAX_CLIP_BYTES = 4 * 2**30  # of decoded frames; some 20 minutes of 256 x 256 at 25 per second
REMEDY = "export or download it again, or remove it"

# What the decoders of Pillow and numpy raise on damaged files; caught around calls of them only.
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, struct.error)


def natural_key(name):
    """A sort key that counts: frame2 before frame10."""
    parts = re.split(r"(\d+)", name.lower())  # texts at even, numbers at odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@contextlib.contextmanager
def _reading(path):
    """Turn what Pillow raises on a damaged or a gigantic image into one line about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"{path}: refused, an image of more than {limit}; shrink it") from None
    except Image.UnidentifiedImageError:
        what = "its content is no GIF, WebP, PNG or JPEG, whatever its name says"
        raise ValueError(f"{path}: {what}; {REMEDY}") from None
    except PermissionError:  # says enough, and the file may be whole
        raise
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None


def _rgb(image):
    """An image of any mode as RGB, black where it is transparent."""
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:  # convert() alone would show colours that are hidden
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def _image_frames(path):
    """The frames of a GIF, WebP, PNG or JPEG, animated or still."""
    with _reading(path):
        opened = Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG"))
    with opened:
        with _reading(path):
            num_frames = getattr(opened, "n_frames", 1)
        for index in range(num_frames):
            with _reading(path):
                opened.seek(index)
                # A camera that is held upright stores a rotated image and the angle.
                image = _rgb(opened if num_frames > 1 else ImageOps.exif_transpose(opened))
                shown = Fraction(opened.info.get("duration", 0)).limit_denominator(1000) / 1000
            yield image, shown or None


def _folder_frames(path):
    """The frames of a folder of images, in natural order of their names."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    strange = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if strange:
        raise ValueError(f"{path}: a folder of frames holds only images, got {min(strange)}")
    for file in sorted(files, key=lambda file: natural_key(file.name)):
        for image, _ in _image_frames(file):
            yield image, None


def _array_frames(path):
    """The frames of a .npy array, (t, h, w, 3) or gray (t, h, w), uint8 or float in [0, 1]."""
    try:
        # A map, not a load: a header that promises terabytes is then an error, not an allocation.
        array = np.lib.format.open_memmap(path, mode="r")
    except (*DAMAGED, OverflowError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: no whole array of numbers ({error}); save it again") from None
    gray = array.ndim == 3 and array.shape[-1] != 3  # (h, w, 3) is an image without its t
    if not (gray or array.ndim == 4 and array.shape[-1] == 3) or array.size == 0:
        raise ValueError(f"{path}: needs shape (t, h, w, 3) or (t, h, w), got {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: needs uint8, or float in [0, 1], got {array.dtype}")
    for index, frame in enumerate(array):
        if frame.dtype != np.uint8:
            if not (frame.min() >= 0 and frame.max() <= 1):  # written so that NaN fails
                raise ValueError(f"{path}: frame {index} has values outside [0, 1]; scale them")
            frame = np.round(frame.astype(np.float32) * 255).astype(np.uint8)
        yield Image.fromarray(np.ascontiguousarray(frame)).convert("RGB"), None


def require_ffmpeg(what, otherwise):
    """Raise ValueError, saying what to do otherwise, if the programs are not installed."""
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise ValueError(f"{what} needs the {program} program: install ffmpeg, or {otherwise}")


def _video_frames(path):
    """The frames of a video, decoded by ffmpeg; each is shown for the mean time of a frame."""
    require_ffmpeg(path, "convert the clip to GIF")
    # Only files: a playlist that calls itself .mp4 must not make ffmpeg fetch its entries. V is a
    # video stream which is not a cover image.
    source = ["-v", "error", "-protocol_whitelist", "file"]
    probe = ["-select_streams", "V:0", "-show_entries", "stream=avg_frame_rate", "-of", "csv=p=0"]
    rate = subprocess.run(
        ["ffprobe", *source, *probe, f"file:{path}"], capture_output=True, text=True, check=False
    ).stdout
    known = re.match(r"([1-9]\d*)/([1-9]\d*)$", rate)  # "0/0" if it is not
    shown = Fraction(int(known[2]), int(known[1])) if known else None
    # Square the pixels; number the frames instead of timing them, or ffmpeg drops and repeats some
    # to keep a constant rate. PPM carries its size, which is that after any rotation.
    filters = ["-vf", "scale=iw*sar:ih,setsar=1,setpts=N/TB", "-r", "1"]
    output = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    command = ["ffmpeg", "-nostdin", "-xerror", *source, "-i", f"file:{path}", "-map", "0:V:0"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [*command, *filters, *output], stdout=subprocess.PIPE, stderr=log
    ) as process:
        # Whoever leaves early closes the pipe, and at that ffmpeg ends.
        for image in _ppm_images(path, process.stdout):
            yield image, shown
        process.wait()
        log.seek(0)
        errors = log.read().decode(errors="replace").strip().splitlines() or ["no frame in it"]
    # A Matroska file that is cut off is no error to ffmpeg, but it says so.
    if process.returncode or "prematurely" in errors[-1]:
        raise ValueError(f"{path}: damaged, or no video ({errors[-1]}); {REMEDY}")


def _ppm_images(path, stream):
    """The images of a stream of PPMs: lines P6, "width height" and 255, then the pixels."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{path}: refused, frames of {width} x {height} pixels; shrink it")
        stream.readline()
        pixels = stream.read(3 * width * height)
        if len(pixels) == 3 * width * height:  # else ffmpeg has died, and its log says why
            yield Image.frombytes("RGB", (width, height), pixels)


def _decode(path):
    """A generator of (RGB image, seconds or None) for every frame that a file or folder holds."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder_frames(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file; {REMEDY}")
    if suffix in IMAGE_SUFFIXES:
        return _image_frames(path)
    if suffix in VIDEO_SUFFIXES:
        return _video_frames(path)
    if suffix == ".npy":
        return _array_frames(path)
    raise ValueError(f"{path}: needs a folder or one of {' '.join(CLIP_SUFFIXES)}, got {suffix!r}")


def _every(frames, stride):
    for image, shown in itertools.islice(frames, 0, None, stride):
        yield image, shown and shown * stride


def _resample(path, frames, frame_rate):
    """Yield what is on screen at the times 0, 1/frame_rate, 2/frame_rate, ... until the end."""
    step, time, end = 1 / Fraction(frame_rate), Fraction(0), Fraction(0)
    for index, (image, shown) in enumerate(frames):
        if shown is None:  # a still lasts one frame at any rate
            second = next(frames, None)
            if index or second:
                raise ValueError(f"{path}: its frame rate is unknown; use a stride instead")
            shown = step
        end = end + shown
        while time < end:
            yield image, step
            time = time + step


def iter_clip(path, stride=1, frame_rate=None, max_frames=None):
    """Yield (RGB image, seconds it is shown as a Fraction or None), as `read_clip` reads them.

    Close it (contextlib.closing) if you leave early: a decoder may be running behind it.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"stride and max_frames need to be >= 1, got {stride} and {max_frames}")
    if frame_rate is not None and not (stride == 1 and 0 < frame_rate < math.inf):
        raise ValueError(f"frame_rate needs > 0 and stride 1, got {frame_rate} and {stride}")
    size = None
    with contextlib.closing(_decode(Path(path))) as frames:
        kept = _every(frames, stride) if frame_rate is None else _resample(path, frames, frame_rate)
        for image, shown in itertools.islice(kept, max_frames):
            size = size or image.size
            if image.size != size:
                raise ValueError(f"{path}: frames of two sizes, {size} and {image.size}")
            yield image, shown
    if size is None:
        raise ValueError(f"{path}: no frames in it; {REMEDY}")


def centre_square(image, image_size):
    """The largest square in the middle of an image, resized to image_size pixels."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Pillow widens the filter when it shrinks, so nothing aliases. Bicubic and not Lanczos: less
    # ringing around hard edges, which a model would learn to draw.
    return image.resize(
        (image_size, image_size), Image.BICUBIC, box=(left, top, left + side, top + side)
    )


def read_clip(path, stride=1, frame_rate=None, max_frames=None, image_size=None):
    """Read a video, an animation, an image, an array or a folder of frames.

    Every stride-th frame, or the frame on screen every 1/frame_rate seconds; max_frames at most,
    and no more are decoded. With image_size each is cropped to its middle square and resized.

    Returns frames, uint8 (t, h, w, 3), and their number per second, None if the file has no rate.
    Raises ValueError naming the file and a remedy, and OSError as `open` does.
    """
    pixels, seconds = bytearray(), []  # one growing buffer: np.stack would hold every frame twice
    with contextlib.closing(iter_clip(path, stride, frame_rate, max_frames)) as frames:
        for image, shown in frames:
            if image_size is not None:
                image = centre_square(image, image_size)
            width, height = image.size
            if len(pixels) + 3 * width * height > MAX_CLIP_BYTES:
                limit = f"more than {MAX_CLIP_BYTES / 2**30:g} GiB of frames"
                raise ValueError(f"{path}: {limit}; raise the stride or lower the image size")
            pixels += image.tobytes()
            seconds.append(shown)
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)
    return frames, None if None in seconds else float(len(seconds) / sum(seconds))
