"""Read clips: a video, an animation, an image, an array or a folder of images as frames.

Generators of (image, duration in seconds) form a chain: a decoder yields every frame of a file,
iter_clip drops or repeats frames, read_clip crops, resizes and packs them. Each image is resized
before the next is decoded, so a long video does not fill the memory. Pillow decodes GIF, WebP, PNG
and JPEG, numpy decodes arrays; only videos need the programs ffmpeg and ffprobe.
"""

import contextlib
import itertools
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

from files import open_regular

IMAGE_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg")
MAX_CLIP_BYTES = 4 * 2**30  # of decoded frames: 14 minutes of 256 x 256 at 25 frames per second
REMEDY = "export or download it again, or remove it"

# What Pillow and numpy raise on files that are damaged, of another format or gigantic; caught
# around calls of them only.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, OverflowError,
              struct.error, tokenize.TokenError, Image.DecompressionBombWarning,
              Image.DecompressionBombError)


def natural_key(name):
    """A sort key that compares numbers by value: frame2 before frame10. No two names are equal."""
    parts = re.split(r"(\d+)", name.lower())  # the numbers have the odd indices
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


@contextlib.contextmanager
def _reading(path):
    """Turn what a decoder raises into one line about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except PermissionError:  # its own message is clear, and the file may be complete
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read ({error}); {REMEDY}") from None


def _rgb(image):
    """An image of any mode as RGB, black where it is transparent."""
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:  # convert() alone would show the colours of hidden pixels
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def _image_frames(path):
    """The frames of a GIF, WebP, PNG or JPEG, animated or still."""
    with open_regular(path) as file:
        with _reading(path):
            opened = Image.open(file, formats=("GIF", "WEBP", "PNG", "JPEG"))
            # An MPO is a JPEG with more pictures of the same moment: a depth map, a preview.
            num_frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        for index in range(num_frames):
            with _reading(path):
                opened.seek(index)
                # A photograph in portrait format is stored rotated, with the angle in its EXIF.
                image = _rgb(opened if num_frames > 1 else ImageOps.exif_transpose(opened))
                duration = Fraction(opened.info.get("duration", 0)).limit_denominator(1000) / 1000
            yield image, duration or None


def _folder_frames(path):
    """The frames of a folder of images, in natural order of their names."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        raise ValueError(f"{path}: a folder of frames needs only images, got {min(others)}")
    for file in sorted(files, key=lambda file: natural_key(file.name)):
        yield from ((image, None) for image, _ in _image_frames(file))


def _array_frames(path):
    """The frames of a .npy array, (t, h, w, 3) or gray (t, h, w), uint8 or float in [0, 1]."""
    with _reading(path):
        # Mapped, not loaded: a header that promises terabytes is an error, not an allocation.
        array = np.lib.format.open_memmap(path, mode="r")
    gray = array.ndim == 3 and array.shape[-1] != 3  # (h, w, 3) is an image without an axis t
    if not (gray or array.ndim == 4 and array.shape[-1] == 3) or array.size == 0:
        raise ValueError(f"{path}: needs shape (t, h, w, 3) or (t, h, w), got {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: needs uint8, or float in [0, 1], got {array.dtype}")
    for index, frame in enumerate(array):
        if frame.dtype != np.uint8:
            if not (frame.min() >= 0 and frame.max() <= 1):  # written so that NaN fails
                raise ValueError(f"{path}: needs values in [0, 1], got others in frame {index}; "
                                 "scale them")
            frame = np.round(frame.astype(np.float32) * 255).astype(np.uint8)
        yield Image.fromarray(np.ascontiguousarray(frame)).convert("RGB"), None


def require_ffmpeg(what, otherwise):
    """Raise ValueError, with the remedy `otherwise`, if the programs are not installed."""
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise ValueError(f"{what} needs the {program} program: install ffmpeg, or {otherwise}")


def ffmpeg_error(log):
    """The last line that ffmpeg wrote into a file, without names of its objects in memory."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\]\s*", "", lines[-1]) if lines else "no frames"


def _video_frames(path):
    """The frames of a video, decoded by ffmpeg; each lasts as long as a frame does on average."""
    require_ffmpeg(path, "convert the clip to GIF")
    # Local files only: a playlist that is named .mp4 must not make ffmpeg fetch its entries. V is
    # a video stream that is not a cover image.
    source = ["-v", "error", "-protocol_whitelist", "file"]
    probe = ["-select_streams", "V:0", "-show_entries", "stream=avg_frame_rate", "-of", "csv=p=0"]
    rate = subprocess.run(["ffprobe", *source, *probe, f"file:{path}"], capture_output=True,
                          text=True, check=False).stdout
    known = re.match(r"([1-9]\d*)/([1-9]\d*)\b", rate)  # "0/0" if it is not
    duration = Fraction(int(known[2]), int(known[1])) if known else None
    # Make pixels square. Number the frames and ignore their times, or ffmpeg drops and repeats
    # some for a constant rate. Each PPM has its own size, which is the one after any rotation.
    filters = ["-vf", "scale=iw*sar:ih,setsar=1,setpts=N/TB", "-r", "1"]
    output = ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    command = ["ffmpeg", "-nostdin", "-xerror", *source, "-i", f"file:{path}", "-map", "0:V:0"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [*command, *filters, *output], stdout=subprocess.PIPE, stderr=log
    ) as process:
        # PPM: lines P6, "width height" and 255, then the pixels. A caller that stops early closes
        # the pipe, which ends ffmpeg.
        while process.stdout.readline() == b"P6\n":
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) == 3 * width * height:  # fewer if ffmpeg failed, and its log says why
                yield Image.frombytes("RGB", (width, height), pixels), duration
        process.wait()
        error = ffmpeg_error(log)
    # ffmpeg returns 0 for a Matroska file that is cut off, but its log says so.
    if process.returncode or "prematurely" in error:
        raise ValueError(f"{path}: damaged, or not a video ({error}); {REMEDY}")


DECODERS = dict.fromkeys(IMAGE_SUFFIXES, _image_frames)
DECODERS |= dict.fromkeys((".mp4", ".avi", ".mkv", ".webm", ".mov"), _video_frames)
DECODERS |= {".npy": _array_frames}
CLIP_SUFFIXES = tuple(DECODERS)


def _decode(path):
    """A generator of (RGB image, duration or None) for every frame of a file or folder."""
    if path.is_dir():
        return _folder_frames(path)
    with open_regular(path) as file:
        if not file.read(1):
            raise ValueError(f"{path}: an empty file; {REMEDY}")
    if (suffix := path.suffix.lower()) not in DECODERS:
        known = " ".join(CLIP_SUFFIXES)
        raise ValueError(f"{path}: needs a folder or one of {known}, got {suffix!r}")
    return DECODERS[suffix](path)


def _resample(path, frames, frame_rate):
    """Yield the frame that is shown at 0, 1/frame_rate, 2/frame_rate, ... seconds until the end."""
    step, time, end = 1 / Fraction(frame_rate), Fraction(0), Fraction(0)
    for index, (image, duration) in enumerate(frames):
        if duration is None:  # a still image is one frame at any rate
            if index or next(frames, None):
                raise ValueError(f"{path}: frame_rate needs a file with a frame rate, got one "
                                 "without; use a stride")
            duration = step
        end = end + duration
        while time < end:
            yield image, step
            time = time + step


def check_pace(stride, frame_rate, max_frames):
    """Raises ValueError for a choice of frames that no clip can have."""
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"stride and max_frames need >= 1, got {stride} and {max_frames}")
    if frame_rate is not None and not (stride == 1 and 0 < frame_rate <= 1000):
        raise ValueError("frame_rate needs > 0, at most 1000, and stride 1, got "
                         f"{frame_rate} and {stride}")


def iter_clip(path, stride=1, frame_rate=None, max_frames=None):
    """Yield (RGB image, its duration in seconds as a Fraction, or None), as `read_clip` reads them.

    Close the generator (contextlib.closing) if you stop early: it may hold a decoder process.
    """
    check_pace(stride, frame_rate, max_frames)
    size = None
    with contextlib.closing(_decode(Path(path))) as frames:
        kept = itertools.islice(frames, 0, None, stride)
        if frame_rate is not None:
            kept = _resample(path, frames, frame_rate)
        for image, duration in itertools.islice(kept, max_frames):
            size = size or image.size
            if image.size != size:
                raise ValueError(f"{path}: needs frames of one size, got {size} and {image.size}")
            yield image, duration and duration * stride
    if size is None:
        raise ValueError(f"{path}: contains no frames; {REMEDY}")


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
    """Read a video, an animation, an image, an array or a folder of images.

    Keeps every stride-th frame, or the frame that is shown every 1/frame_rate seconds, and decodes
    at most the first max_frames of them. image_size: crop to the middle square and resize.

    Returns frames, uint8 (t, h, w, 3), and their number per second, None if the file has no rate.
    Raises ValueError naming the file and a remedy, and OSError as `open` does.
    """
    pixels, durations = bytearray(), []  # one growing buffer: np.stack would hold all frames twice
    with contextlib.closing(iter_clip(path, stride, frame_rate, max_frames)) as frames:
        for image, duration in frames:
            width, height = (image_size, image_size) if image_size else image.size
            if len(pixels) + 3 * width * height > MAX_CLIP_BYTES:
                limit = f"needs <= {MAX_CLIP_BYTES / 2**30:g} GiB of frames, got more"
                raise ValueError(f"{path}: {limit}; raise the stride or lower the image size")
            pixels += (centre_square(image, image_size) if image_size else image).tobytes()
            durations.append(duration)
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)
    return frames, None if None in durations else float(len(durations) / sum(durations))
