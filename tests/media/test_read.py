"""Every file here is made by its test; those of videos need ffmpeg and are skipped without it."""

import itertools
import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from media import read
from media.read import iter_clip, read_clip

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")

# Frame i has gray value GRAYS[i]: far enough apart to survive H.264, in no simple order.
GRAYS = (0, 160, 40, 240, 80, 200)
WIDTH, HEIGHT = 24, 16


def gray_frames(grays=GRAYS):
    return np.stack([np.full((HEIGHT, WIDTH, 3), gray, np.uint8) for gray in grays])


def save_animation(path, frames, duration):
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=duration, lossless=True
    )


def encode(path, frames, *options):
    """Encode frames with ffmpeg, by a command line that is not read.py's."""
    t, h, w, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", "10", "-i", "-"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def grays_of(frames):
    """The gray value of each frame, to the nearest of GRAYS."""
    return [min(GRAYS, key=lambda gray: abs(gray - frame.mean())) for frame in frames]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations_are_read_frame_by_frame(tmp_path, suffix):
    save_animation(tmp_path / f"a{suffix}", gray_frames(), duration=40)
    frames, rate = read_clip(tmp_path / f"a{suffix}")
    assert np.array_equal(frames, gray_frames()) and frames.dtype == np.uint8
    assert rate == 25.0


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".webm", ".mov"])
def test_videos_are_read_frame_by_frame(tmp_path, suffix):
    encode(tmp_path / f"a{suffix}", gray_frames())
    frames, rate = read_clip(tmp_path / f"a{suffix}")
    assert frames.shape == (6, HEIGHT, WIDTH, 3)
    assert grays_of(frames) == list(GRAYS)
    assert rate == pytest.approx(10)


@needs_ffmpeg
def test_a_rotated_video_is_read_upright(tmp_path):
    frames = gray_frames()
    frames[:, : HEIGHT // 2] = 255  # white on top
    encode(tmp_path / "flat.mp4", frames)
    command = ["ffmpeg", "-v", "error", "-i", "flat.mp4", "-c", "copy", "-metadata:s:v:0"]
    subprocess.run([*command, "rotate=180", "a.mp4"], cwd=tmp_path, check=True)
    turned, rate = read_clip(tmp_path / "a.mp4")
    assert rate == read_clip(tmp_path / "flat.mp4")[1] is not None
    assert turned[0, HEIGHT - 2].mean() > 240 and turned[0, 1].mean() < 15


@needs_ffmpeg
def test_pixels_that_are_not_square_are_made_square(tmp_path):
    encode(tmp_path / "a.mp4", gray_frames(), "-vf", "setsar=2")
    assert read_clip(tmp_path / "a.mp4")[0].shape == (6, HEIGHT, 2 * WIDTH, 3)


def test_a_folder_of_frames_is_sorted_as_people_count(tmp_path):
    for number, frame in zip((1, 2, 3, 10, 11, 100), gray_frames(), strict=True):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    frames, rate = read_clip(tmp_path)
    assert grays_of(frames) == list(GRAYS) and rate is None


def test_frames_of_two_sizes_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"one size, got \(8, 8\) and \(8, 9\)"):
        read_clip(tmp_path, image_size=4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_arrays_are_read_in_every_dtype(tmp_path, dtype):
    frames = gray_frames()
    np.save(tmp_path / "a.npy", frames if dtype == np.uint8 else (frames / 255).astype(dtype))
    assert np.array_equal(read_clip(tmp_path / "a.npy")[0], frames)


def test_a_gray_array_has_three_equal_channels(tmp_path):
    np.save(tmp_path / "a.npy", gray_frames()[..., 0])
    assert np.array_equal(read_clip(tmp_path / "a.npy")[0], gray_frames())


def test_stride_keeps_every_kth_frame_and_divides_the_rate(tmp_path):
    save_animation(tmp_path / "a.gif", gray_frames(), duration=100)
    frames, rate = read_clip(tmp_path / "a.gif", stride=4)
    assert grays_of(frames) == [GRAYS[0], GRAYS[4]] and rate == 2.5


@pytest.mark.parametrize("frame_rate, order", [
    (10, [0, 1, 2, 3, 4, 5]), (4, [0, 2, 5]), (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
])
def test_a_frame_rate_picks_what_is_on_screen_at_its_times(tmp_path, frame_rate, order):
    save_animation(tmp_path / "a.gif", gray_frames(), duration=100)
    frames, rate = read_clip(tmp_path / "a.gif", frame_rate=frame_rate)
    assert grays_of(frames) == [GRAYS[i] for i in order] and rate == frame_rate


def test_a_frame_rate_counts_each_frames_own_duration(tmp_path):
    save_animation(tmp_path / "a.gif", gray_frames()[:3], duration=[300, 50, 150])
    frames, _ = read_clip(tmp_path / "a.gif", frame_rate=10)  # shown until 0.3, 0.35, 0.5 s
    assert grays_of(frames) == [GRAYS[i] for i in (0, 0, 0, 1, 2)]


def test_every_image_comes_with_its_duration(tmp_path):
    save_animation(tmp_path / "a.gif", gray_frames()[:3], duration=[300, 50, 150])
    durations = [duration for _, duration in iter_clip(tmp_path / "a.gif")]
    assert durations == [Fraction(3, 10), Fraction(1, 20), Fraction(3, 20)]


def test_a_frame_rate_for_a_file_without_one_names_the_file(tmp_path):
    np.save(tmp_path / "a.npy", gray_frames())
    with pytest.raises(ValueError, match="a.npy: frame_rate needs .* use a stride"):
        read_clip(tmp_path / "a.npy", frame_rate=8)


def test_a_still_is_one_frame_at_any_frame_rate(tmp_path):
    Image.fromarray(gray_frames()[1]).save(tmp_path / "a.png")
    assert np.array_equal(read_clip(tmp_path / "a.png", frame_rate=8)[0], gray_frames()[1:2])


def test_stride_and_frame_rate_together_are_refused(tmp_path):
    save_animation(tmp_path / "a.gif", gray_frames(), duration=100)
    with pytest.raises(ValueError, match="frame_rate needs > 0, at most 1000, and stride 1"):
        read_clip(tmp_path / "a.gif", stride=2, frame_rate=5)


def test_nothing_is_decoded_after_max_frames(tmp_path):
    np.save(tmp_path / "a.npy", np.array([0.0, 0.5, np.nan])[:, None, None] * np.ones((3, 4, 5)))
    for max_frames in (1, 2):
        assert len(read_clip(tmp_path / "a.npy", max_frames=max_frames)[0]) == max_frames


@needs_ffmpeg
def test_leaving_a_video_early_ends_its_ffmpeg(tmp_path, monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    encode(tmp_path / "a.mp4", gray_frames(GRAYS * 100))
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    frames = iter_clip(tmp_path / "a.mp4")
    assert len(list(itertools.islice(frames, 2))) == 2
    assert started[-1].returncode is None  # more than a pipe holds is still to come
    frames.close()
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize("upright", [False, True])
def test_image_size_cuts_out_the_middle_square(tmp_path, upright):
    frame = np.zeros((6, 10, 3), np.uint8)
    frame[:, 2:8] = (10, 200, 30)
    frame = frame.swapaxes(0, 1).copy() if upright else frame
    Image.fromarray(frame).save(tmp_path / "a.png")
    frames, _ = read_clip(tmp_path / "a.png", image_size=6)
    assert np.array_equal(frames, np.broadcast_to(np.uint8([10, 200, 30]), (1, 6, 6, 3)))


def test_resizing_averages_and_does_not_skip_pixels(tmp_path):
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, ::2] = 200  # stripes: nearest neighbours would be all 0 or all 200
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert np.abs(read_clip(tmp_path / "a.png", image_size=8)[0].astype(int) - 100).max() <= 6


def test_transparent_pixels_are_black_whatever_colour_they_hide(tmp_path):
    frame = np.zeros((4, 5, 4), np.uint8)
    frame[..., 0], frame[:, 2:, 3] = 255, 255
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert read_clip(tmp_path / "a.png")[0][0, 0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, :8] = 255  # left; on top when turned
    Image.fromarray(frame).save(tmp_path / "a.jpg", exif=exif, quality=100)
    frames, _ = read_clip(tmp_path / "a.jpg")
    assert frames.shape == (1, 16, 8, 3)
    assert frames[0, :8].min() > 250 and frames[0, 8:].max() < 5


@pytest.mark.parametrize("size", [(16, 8), (8, 4)])
def test_of_a_photograph_with_more_pictures_the_first_is_read(tmp_path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    more = [Image.new("RGB", size, "gray")]  # as phones add a depth map or a preview
    Image.new("RGB", (16, 8), "white").save(tmp_path / "a.jpg", "MPO", save_all=True,
                                            append_images=more, exif=exif)
    frames, _ = read_clip(tmp_path / "a.jpg")
    assert frames.shape == (1, 16, 8, 3) and frames.min() > 250


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_clip(tmp_path / "a.png")[0][0, 0, :, 0].tolist() == [0, 128, 255]


def broken_files(folder):
    """Write a file of every kind of bad day; yield (its name, what the error says)."""
    save_animation(folder / "whole.gif", np.random.default_rng(0).integers(
        0, 255, (3, 40, 40, 3), dtype=np.uint8), duration=100)
    (folder / "cut.gif").write_bytes((folder / "whole.gif").read_bytes()[:3000])
    yield "cut.gif", "cannot be read"
    (folder / "text.gif").write_text("hello")
    yield "text.gif", "cannot be read .cannot identify image file"
    (folder / "empty.webp").touch()
    yield "empty.webp", "an empty file"
    (folder / "folder.gif").mkdir()
    yield "folder.gif", "contains no frames"
    (folder / "a.xyz").write_text("hello")
    yield "a.xyz", "needs a folder or one of .gif"
    for side in (10000, 60000):  # Pillow warns of the one and refuses the other
        screen = struct.pack("<6sHHBBB", b"GIF89a", side, side, 0, 0, 0)
        frame = struct.pack("<cHHHHBB", b",", 0, 0, side, side, 0, 2)
        (folder / f"bomb{side}.gif").write_bytes(screen + frame + b"\0;")
        yield f"bomb{side}.gif", "cannot be read .Image size .* exceeds limit of"
    np.save(folder / "pickle.npy", np.array([{}]), allow_pickle=True)
    yield "pickle.npy", "cannot be read"
    np.save(folder / "rank.npy", np.zeros((4, 5), np.uint8))
    yield "rank.npy", r"needs shape \(t, h, w, 3\) or \(t, h, w\), got \(4, 5\)"
    np.save(folder / "image.npy", np.zeros((4, 5, 3), np.uint8))
    yield "image.npy", r"got \(4, 5, 3\)"
    np.save(folder / "dtype.npy", np.zeros((2, 4, 5), np.int64))
    yield "dtype.npy", "got int64"
    np.save(folder / "nan.npy", np.full((2, 4, 5), np.nan))
    yield "nan.npy", r"needs values in \[0, 1\], got others in frame 0"
    with open(folder / "lies.npy", "wb") as file:  # a terabyte, says the header
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 600, 600, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    yield "lies.npy", "cannot be read"


def test_a_bad_file_is_one_line_with_its_name(tmp_path):
    for name, message in broken_files(tmp_path):
        with pytest.raises(ValueError, match=f"{name}: .*{message}") as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_video_that_is_cut_off_is_an_error_and_not_a_shorter_clip(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    encode(tmp_path / f"whole{suffix}", noise)
    data = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"a{suffix}: damaged"):
        read_clip(tmp_path / f"a{suffix}")


def test_a_clip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_CLIP_BYTES", 3 * HEIGHT * WIDTH * 4)
    np.save(tmp_path / "a.npy", gray_frames())
    with pytest.raises(ValueError, match="a.npy: needs <= .* raise the stride"):
        read_clip(tmp_path / "a.npy")


def test_without_ffmpeg_a_video_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"not read")
    with pytest.raises(ValueError, match="a.mp4 needs the ffmpeg program: install .* to GIF"):
        read_clip(tmp_path / "a.mp4")
