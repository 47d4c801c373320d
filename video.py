"""Moving pictures in and out: files to frames, clips to files.

Reading is a chain of generators of (picture, seconds it is shown): a decoder yields every frame of
a file, `_every` or `_resample` drops or repeats some, and `read_clip` crops, resizes and packs the
rest. A frame is made small before the next is decoded, so a long video never sits in memory.

GIF, WebP, PNG and JPEG go through Pillow, arrays through numpy. Anything else is what the programs
ffmpeg and ffprobe are for, if they are installed; nothing here needs them otherwise.
"""

import contextlib
import io
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
import torch
from PIL import GifImagePlugin, Image, ImageOps

from files import atomic

PICTURE_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
CLIP_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, ".npy")

MAX_CLIP_BYTES = 4 * 2**30  # of decoded frames; some 20 minutes of 256 x 256 at 25 per second
SEPARATOR = 2  # pixels between the pictures of a contact sheet
REMEDY = "export or download it again, or remove it"

# What the decoders of Pillow and numpy raise on damaged files; caught around calls of them only.
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, struct.error)


def natural_key(name):
    """A sort key that counts: frame2 before frame10."""
    parts = re.split(r"(\d+)", name.lower())  # texts at even, numbers at odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@contextlib.contextmanager
def _reading(path):
    """Turn what Pillow raises on a damaged or a gigantic picture into one line about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"{path}: refused, a picture of more than {limit}; shrink it") from None
    except Image.UnidentifiedImageError:
        what = "its content is no GIF, WebP, PNG or JPEG, whatever its name says"
        raise ValueError(f"{path}: {what}; {REMEDY}") from None
    except PermissionError:  # says enough, and the file may be whole
        raise
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None


def _rgb(picture):
    """A picture of any mode as RGB, black where it is transparent."""
    if picture.mode.startswith("I;16"):  # convert() would clip 16 bits to 8, not scale them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:  # convert() alone would show colours that are hidden
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("RGB")


def _picture_frames(path):
    """The frames of a GIF, WebP, PNG or JPEG, animated or still."""
    with _reading(path):
        image = Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG"))
    with image:
        with _reading(path):
            num_frames = getattr(image, "n_frames", 1)
        for index in range(num_frames):
            with _reading(path):
                image.seek(index)
                # A camera held upright writes a lying picture and a note to turn it.
                picture = _rgb(image if num_frames > 1 else ImageOps.exif_transpose(image))
                shown = Fraction(image.info.get("duration", 0)).limit_denominator(1000) / 1000
            yield picture, shown or None


def _folder_frames(path):
    """The frames of a folder of pictures, in natural order of their names."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    strange = [file.name for file in files if file.suffix.lower() not in PICTURE_SUFFIXES]
    if strange:
        raise ValueError(f"{path}: a folder of frames holds only pictures, got {min(strange)}")
    for file in sorted(files, key=lambda file: natural_key(file.name)):
        for picture, _ in _picture_frames(file):
            yield picture, None


def _array_frames(path):
    """The frames of a .npy array, (t, h, w, 3) or gray (t, h, w), uint8 or float in [0, 1]."""
    try:
        # A map, not a load: a header that promises terabytes is then an error, not an allocation.
        array = np.lib.format.open_memmap(path, mode="r")
    except (*DAMAGED, OverflowError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: no whole array of numbers ({error}); save it again") from None
    gray = array.ndim == 3 and array.shape[-1] != 3  # (h, w, 3) is a picture without its t
    if not (gray or array.ndim == 4 and array.shape[-1] == 3) or array.size == 0:
        raise ValueError(f"{path}: needs shape (t, h, w, 3) or (t, h, w), got {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: needs uint8, or float in [0, 1], got {array.dtype}")
    for index, frame in enumerate(array):
        if frame.dtype != np.uint8:
            if not (frame.min() >= 0 and frame.max() <= 1):  # so put, NaN fails, too
                raise ValueError(f"{path}: frame {index} has values outside [0, 1]; scale them")
            frame = np.round(frame.astype(np.float32) * 255).astype(np.uint8)
        yield Image.fromarray(np.ascontiguousarray(frame)).convert("RGB"), None


def _require_ffmpeg(what, otherwise):
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise ValueError(f"{what} needs the {program} program: install ffmpeg, or {otherwise}")


def _video_frames(path):
    """The frames of a video, decoded by ffmpeg; each is shown for the mean time of a frame."""
    _require_ffmpeg(path, "convert the clip to GIF")
    # Only files: a playlist that calls itself .mp4 must not make ffmpeg fetch its entries. V is a
    # video stream which is not a cover picture.
    source = ["-v", "error", "-protocol_whitelist", "file"]
    probe = "-select_streams V:0 -show_entries stream=avg_frame_rate -of default=nk=1:nw=1".split()
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
    ) as process:  # fmt: skip
        # Whoever leaves early closes the pipe, and at that ffmpeg ends.
        for picture in _ppm_pictures(path, process.stdout):
            yield picture, shown
        process.wait()
        log.seek(0)
        errors = log.read().decode(errors="replace").strip().splitlines() or ["no frame in it"]
    # A Matroska file that is cut off is no error to ffmpeg, but it says so.
    if process.returncode or "prematurely" in errors[-1]:
        raise ValueError(f"{path}: damaged, or no video ({errors[-1]}); {REMEDY}")


def _ppm_pictures(path, stream):
    """The pictures of a stream of PPMs: lines P6, "width height" and 255, then the pixels."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{path}: refused, frames of {width} x {height} pixels; shrink it")
        stream.readline()
        pixels = stream.read(3 * width * height)
        if len(pixels) == 3 * width * height:  # else ffmpeg has died, and its log says why
            yield Image.frombytes("RGB", (width, height), pixels)


def _decode(path):
    """A generator of (RGB picture, seconds or None) for every frame that a file or folder holds."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder_frames(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file; {REMEDY}")
    if suffix in PICTURE_SUFFIXES:
        return _picture_frames(path)
    if suffix in VIDEO_SUFFIXES:
        return _video_frames(path)
    if suffix == ".npy":
        return _array_frames(path)
    raise ValueError(f"{path}: needs a folder or one of {' '.join(CLIP_SUFFIXES)}, got {suffix!r}")


def _every(frames, stride):
    for picture, shown in itertools.islice(frames, 0, None, stride):
        yield picture, shown and shown * stride


def _resample(path, frames, frame_rate):
    """Yield what is on screen at the times 0, 1/frame_rate, 2/frame_rate, ... until the end."""
    step, time, end = 1 / Fraction(frame_rate), Fraction(0), Fraction(0)
    for index, (picture, shown) in enumerate(frames):
        if shown is None:  # a still lasts one frame at any rate
            second = next(frames, None)
            if index or second:
                raise ValueError(f"{path}: its frame rate is unknown; use a stride instead")
            shown = step
        end = end + shown
        while time < end:
            yield picture, step
            time = time + step


def iter_clip(path, stride=1, frame_rate=None, max_frames=None):
    """Yield (RGB picture, seconds it is shown as a Fraction or None), as `read_clip` reads them.

    Close it (contextlib.closing) if you leave early: a decoder may be running behind it.
    """
    if stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"stride and max_frames need to be >= 1, got {stride} and {max_frames}")
    if frame_rate is not None and not (stride == 1 and 0 < frame_rate < math.inf):
        raise ValueError(f"frame_rate needs > 0 and stride 1, got {frame_rate} and {stride}")
    size = None
    with contextlib.closing(_decode(Path(path))) as frames:
        kept = _every(frames, stride) if frame_rate is None else _resample(path, frames, frame_rate)
        for picture, shown in itertools.islice(kept, max_frames):
            size = size or picture.size
            if picture.size != size:
                raise ValueError(f"{path}: frames of two sizes, {size} and {picture.size}")
            yield picture, shown
    if size is None:
        raise ValueError(f"{path}: no frames in it; {REMEDY}")


def centre_square(picture, image_size):
    """The largest square in the middle of a picture, resized to image_size pixels."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Pillow widens the filter when it shrinks, so nothing aliases. Bicubic and not Lanczos: less
    # ringing around hard edges, which a model would learn to draw.
    return picture.resize(
        (image_size, image_size), Image.BICUBIC, box=(left, top, left + side, top + side)
    )


def read_clip(path, stride=1, frame_rate=None, max_frames=None, image_size=None):
    """Read a video, an animation, a picture, an array or a folder of frames.

    Every stride-th frame, or the frame on screen every 1/frame_rate seconds; max_frames at most,
    and no more are decoded. With image_size each is cropped to its middle square and resized.

    Returns frames, uint8 (t, h, w, 3), and their number per second, None if the file has no rate.
    Raises ValueError naming the file and a remedy, and OSError as `open` does.
    """
    pixels, seconds = bytearray(), []  # one growing buffer: np.stack would hold every frame twice
    with contextlib.closing(iter_clip(path, stride, frame_rate, max_frames)) as frames:
        for picture, shown in frames:
            if image_size is not None:
                picture = centre_square(picture, image_size)
            width, height = picture.size
            if len(pixels) + 3 * width * height > MAX_CLIP_BYTES:
                limit = f"more than {MAX_CLIP_BYTES / 2**30:g} GiB of frames"
                raise ValueError(f"{path}: {limit}; raise the stride or lower the image size")
            pixels += picture.tobytes()
            seconds.append(shown)
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)
    return frames, None if None in seconds else float(len(seconds) / sum(seconds))


def to_uint8(clip):
    """A tensor (..., 3, h, w) in [-1, 1] as a numpy array (..., h, w, 3), uint8; others clamped."""
    pixels = (clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()


def contact_sheet(clips):
    """One picture of clips: a row for each, a column for each frame, white lines between them.

    Takes a tensor (n, t, 3, h, w) or a list of (t, 3, h, w), in [-1, 1]; the lengths may differ.
    Returns (1, 3, H, W), a clip of one frame.
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
    return torch.cat([contact_sheet(clips[:, i].split(columns)) for i in range(clips.shape[1])])


def _delays(num_frames, frames_per_second, units):
    """Whole units (per second) that each frame is shown; the rounding does not add up."""
    return np.diff(np.round(np.arange(num_frames + 1) * units / frames_per_second)).astype(int)


def _write_gif(file, clip, frames_per_second):
    """A GIF that loops, block by block: Image.save would merge frames that are equal."""
    if frames_per_second > 50:
        raise ValueError(f"frames_per_second needs <= 50 in a GIF, got {frames_per_second}")
    frames = to_uint8(clip)  # t h w 3
    t, h, w, _ = frames.shape
    # One palette chosen over all frames, or colours flicker. Flat colours stay exact without
    # dither, whose grain would also crawl from frame to frame; k-means buys back the gradients.
    tower = Image.fromarray(frames.reshape(t * h, w, 3)).quantize(256, kmeans=1)
    pictures = [tower.crop((0, i * h, w, (i + 1) * h)) for i in range(t)]
    file.writelines(GifImagePlugin.getheader(pictures[0], info={"loop": 0})[0])
    for picture, delay in zip(pictures, _delays(t, frames_per_second, 100), strict=True):
        file.writelines(GifImagePlugin.getdata(picture, duration=10 * int(delay)))
    file.write(b";")


def _write_webp(file, clip, frames_per_second):
    """A lossless WebP that loops, out of stills: libwebp's animator would merge equal frames.

    Format: https://developers.google.com/speed/webp/docs/riff_container
    """

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    h, w = clip.shape[-2:]
    size = (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    chunks = chunk(b"VP8X", b"\2\0\0\0" + size) + chunk(b"ANIM", bytes(6))  # 2: it is animated
    delays = _delays(len(clip), frames_per_second, 1000)
    for frame, delay in zip(to_uint8(clip), delays, strict=True):
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "WEBP", lossless=True)
        header = bytes(6) + size + int(delay).to_bytes(3, "little") + bytes(1)
        chunks += chunk(b"ANMF", header + still.getvalue()[12:])  # less the still's RIFF header
    file.write(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks)


def _write_png(file, clip, frames_per_second):
    """One frame as a picture; up to eight in a row; more in a near-square grid."""
    if len(clip) > 1:
        columns = len(clip) if len(clip) <= 8 else math.ceil(math.sqrt(len(clip)))
        clip = contact_sheet(clip.split(columns))
    Image.fromarray(to_uint8(clip)[0]).save(file, "PNG")


def _write_mp4(file, clip, frames_per_second):
    """H.264 as every player and browser shows it: 4:2:0, whose sizes are even."""
    t, _, h, w = clip.shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {frames_per_second} -i -"
    coding = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -c:v libx264 -crf 16 -pix_fmt yuv420p"
    command = f"ffmpeg -v error -y {source} {coding} -movflags +faststart -f mp4".split()
    result = subprocess.run(
        [*command, f"file:{file.name}"], input=to_uint8(clip).tobytes(), capture_output=True,
        check=False,
    )  # fmt: skip
    if result.returncode:
        errors = result.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ValueError(f"ffmpeg cannot write an .mp4 ({errors[-1]}); write a .gif")


WRITERS = {".gif": _write_gif, ".webp": _write_webp, ".png": _write_png, ".mp4": _write_mp4}


def require_writer(path):
    """The function that writes a file of this suffix. Raises ValueError if nothing here can."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"{path}: needs one of the suffixes {' '.join(WRITERS)}")
    if suffix == ".mp4":
        _require_ffmpeg("an .mp4", "write a .gif")
    return WRITERS[suffix]


def write_clip(path, clip, frames_per_second=8):
    """Write a clip (t, 3, h, w), float in [-1, 1], as the suffix of `path` says.

    The file appears whole or not at all, with every frame: .gif and .webp (lossless) loop, .mp4
    needs ffmpeg, .png holds one frame as it is, or several side by side.
    """
    writer = require_writer(path)
    if clip.ndim != 4 or clip.shape[1] != 3 or clip.numel() == 0 or not clip.is_floating_point():
        raise ValueError(f"clip needs float (t, 3, h, w), got {clip.dtype} {tuple(clip.shape)}")
    if not clip.isfinite().all():
        raise ValueError("clip needs finite values, got NaN or infinity")
    if not 0 < frames_per_second < math.inf:
        raise ValueError(f"frames_per_second needs to be > 0, got {frames_per_second}")
    with atomic(path) as file:
        writer(file, clip, frames_per_second)
