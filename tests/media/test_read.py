"""Files made by their tests and read. Most tests of videos are skipped without ffmpeg."""

import subprocess

import numpy as np
import pytest
from clips import GRAYS, HEIGHT, WIDTH, fake, gray_frames, needs_ffmpeg
from PIL import Image

from media import read
from media.read import read_clip


def save_animation(path, frames, duration):
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, lossless=True)


def encode(path, frames, *options, rate="10"):
    """Encode frames with ffmpeg, by a command line that is not read.py's."""
    t, h, w, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", rate, "-i", "-"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def grays_of(frames):
    """The gray value of each frame, to the nearest of GRAYS."""
    return [min(GRAYS, key=lambda gray: abs(gray - frame.mean())) for frame in frames]


def test_animations_are_read_frame_by_frame(tmp_path):
    for name in ("a.gif", "a.webp", "a.png"):
        save_animation(tmp_path / name, gray_frames(), duration=40)
        frames, rate = read_clip(tmp_path / name)
        assert np.array_equal(frames, gray_frames()) and frames.dtype == np.uint8 and rate == 25


def test_a_folder_of_frames_is_sorted_as_people_count(tmp_path):
    """It has no frame rate, so it gets the one that is asked for."""
    for number, frame in zip((1, 2, 3, 10, 11, 100), gray_frames(), strict=True):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    for name in (".DS_Store", "Thumbs.db", "README.txt"):
        (tmp_path / name).touch()
    for frame_rate in (None, 8):
        frames, rate = read_clip(tmp_path, frame_rate=frame_rate)
        assert grays_of(frames) == list(GRAYS) and rate == frame_rate


def test_transparent_pixels_are_black_whatever_colour_they_hide(tmp_path):
    frame = np.zeros((4, 5, 4), np.uint8)
    frame[..., 0], frame[:, 2:, 3] = 255, 255
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert read_clip(tmp_path / "a.png")[0][0, 0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_clip(tmp_path / "a.png")[0][0, 0, :, 0].tolist() == [0, 128, 255]


def test_a_photograph_is_its_first_picture_turned_upright(tmp_path):
    """Phones add a second picture, a preview."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    photograph = Image.new("RGB", (16, 8))
    photograph.paste("white", (0, 0, 8, 8))  # left; on top when turned
    photograph.save(tmp_path / "a.jpg", "MPO", exif=exif, save_all=True,
                    append_images=[Image.new("RGB", (16, 8), "gray")])
    frames, _ = read_clip(tmp_path / "a.jpg")
    assert frames.shape == (1, 16, 8, 3)
    assert frames[0, :8].min() > 250 and frames[0, 8:].max() < 5


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
def test_videos_are_read_frame_by_frame(tmp_path, suffix):
    encode(tmp_path / f"a{suffix}", gray_frames())
    frames, rate = read_clip(tmp_path / f"a{suffix}")
    assert frames.shape == (6, HEIGHT, WIDTH, 3) and rate == pytest.approx(10)
    assert grays_of(frames) == list(GRAYS)


@needs_ffmpeg
def test_pixels_that_are_not_square_are_made_square(tmp_path):
    encode(tmp_path / "a.mp4", gray_frames(), "-vf", "setsar=2")
    assert read_clip(tmp_path / "a.mp4")[0].shape == (6, HEIGHT, 2 * WIDTH, 3)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_that_is_cut_off_is_an_error_and_not_a_shorter_clip(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    encode(path, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"a{suffix}: damaged"):
        read_clip(path)


@needs_ffmpeg
def test_leaving_a_video_early_ends_its_ffmpeg(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", gray_frames(GRAYS * 100))  # more than a pipe holds
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: (
        started.append(popen(*args, **options)) or started[-1]))
    assert grays_of(read_clip(tmp_path / "a.mp4", max_frames=2)[0]) == [0, 160]
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_without_ffprobe_a_video_says_what_to_do(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, ffmpeg="")
    with pytest.raises(ValueError, match="a.mp4 needs the ffprobe program; install .* to GIF"):
        read_clip(tmp_path / "a.mp4")


@needs_ffmpeg
def test_a_frame_rate_follows_the_times_of_a_videos_frames(tmp_path):
    """Four frames last 1 s, then come 20 of 0.1 s, of which a period of 0.5 s shows the last."""
    grays = [*GRAYS[:4], *[80] * 4, 160, *[80] * 4, 0, *[80] * 4, 240, *[80] * 4, 200]
    encode(tmp_path / "a.mp4", gray_frames(grays), "-vf",
           "setpts='if(lt(N,4),N,4+(N-4)*0.1)/TB'", "-vsync", "vfr",
           "-video_track_timescale", "1000")
    frames, rate = read_clip(tmp_path / "a.mp4", frame_rate=2)
    assert rate == 2 and grays_of(frames) == [*np.repeat(GRAYS[:4], 2), 160, 0, 240, 200]


@needs_ffmpeg
@pytest.mark.parametrize("suffix, exact, rate", [
    (".mp4", "30000/1001", 29.97), (".mkv", "24000/1001", 23.976), (".webm", "30", 30)])
def test_its_own_frame_rate_keeps_each_frame_of_a_video_once(tmp_path, suffix, exact, rate):
    encode(tmp_path / f"a{suffix}", gray_frames(), rate=exact)
    assert grays_of(read_clip(tmp_path / f"a{suffix}", frame_rate=rate)[0]) == list(GRAYS)


def test_its_own_frame_rate_keeps_each_frame_of_a_gif_once(tmp_path):
    save_animation(tmp_path / "a.gif", gray_frames(), duration=[30, 40, 30, 30, 40, 30])
    assert grays_of(read_clip(tmp_path / "a.gif", frame_rate=30)[0]) == list(GRAYS)


@pytest.mark.parametrize("log, message", [
    ("Stream map '0:V:0' matches no streams.\nTo ignore this, add a trailing '?' to the map.",
     "a.mp4: has no moving picture"),
    ("moov atom not found\nConsider increasing the value for the 'probesize' option",
     "a.mp4: damaged, or not a video .moov atom not found.;"),
    ("The encoder is experimental, add '-strict -2' if you want to use it.", "video .no frames.;"),
])
def test_ffmpegs_advice_to_its_own_users_is_not_shown(tmp_path, monkeypatch, log, message):
    """With a frame rate, ffprobe is not needed."""
    fake(monkeypatch, tmp_path, ffmpeg=f"sys.exit({log!r})")
    with pytest.raises(ValueError, match=message):
        read_clip(tmp_path / "a.mp4", frame_rate=5)


@pytest.mark.parametrize("stride, frame_rate", [(4, None), (8, 20)])
def test_stride_keeps_every_kth_frame_and_divides_the_rate(tmp_path, stride, frame_rate):
    save_animation(tmp_path / "a.gif", gray_frames(), duration=100)
    frames, rate = read_clip(tmp_path / "a.gif", stride, frame_rate)
    assert grays_of(frames) == [GRAYS[0], GRAYS[4]] and rate == 2.5


@pytest.mark.parametrize("frame_rate, order", [(4, [0, 0]), (20, 6 * [0] + [1, 2, 2, 2])])
def test_a_frame_rate_picks_what_is_on_screen_at_its_times(tmp_path, frame_rate, order):
    save_animation(tmp_path / "a.gif", gray_frames()[:3], duration=[300, 50, 150])
    frames, rate = read_clip(tmp_path / "a.gif", frame_rate=frame_rate)  # until 0.3, 0.35, 0.5 s
    assert grays_of(frames) == [GRAYS[i] for i in order] and rate == frame_rate


@pytest.mark.parametrize("durations, rate", [(0, 10), (10, 10), (20, 50), ([0, 40, 40], 50 / 3)])
@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_a_delay_of_0_or_10_ms_is_100_ms_as_in_browsers(tmp_path, suffix, durations, rate):
    save_animation(tmp_path / f"a{suffix}", gray_frames()[:3], durations)
    assert read_clip(tmp_path / f"a{suffix}")[1] == pytest.approx(rate)
    save_animation(tmp_path / f"a{suffix}", gray_frames()[:1], 0)
    assert read_clip(tmp_path / f"a{suffix}")[1] is None  # a still


def test_the_cover_of_an_apng_is_no_frame(tmp_path):
    images = [Image.fromarray(frame) for frame in gray_frames()]
    images[0].save(tmp_path / "a.apng", "PNG", save_all=True, append_images=images[1:],
                   duration=100, default_image=True)
    frames, rate = read_clip(tmp_path / "a.apng")
    assert grays_of(frames) == list(GRAYS[1:]) and rate == 10


def test_nothing_is_decoded_after_max_frames(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("not an image")
    assert len(read_clip(tmp_path, stride=2, max_frames=2)[0]) == 2


def test_image_size_cuts_out_the_middle_square(tmp_path):
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[:, 2:8] = (10, 200, 30)
    for frame in (wide, wide.swapaxes(0, 1).copy()):
        Image.fromarray(frame).save(tmp_path / "a.png")
        frames, _ = read_clip(tmp_path / "a.png", image_size=6)
        assert np.array_equal(frames, np.broadcast_to(np.uint8([10, 200, 30]), (1, 6, 6, 3)))


def test_resizing_averages_and_does_not_skip_pixels(tmp_path):
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, ::2] = 200  # stripes: nearest neighbours would be all 0 or all 200
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert np.abs(read_clip(tmp_path / "a.png", image_size=8)[0].astype(int) - 100).max() <= 6


def test_a_folder_without_frames_or_with_two_sizes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: needs frames .*, got no frames"):
        read_clip(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"one size, got \[\(8, 8\), \(8, 9\)\]"):
        read_clip(tmp_path, image_size=4)


def test_a_clip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_CLIP_BYTES", 5 * 3 * HEIGHT * WIDTH)
    save_animation(tmp_path / "a.gif", gray_frames(), duration=40)
    assert len(read_clip(tmp_path / "a.gif", max_frames=5)[0]) == 5
    with pytest.raises(ValueError, match="a.gif: needs at most .* raise --stride"):
        read_clip(tmp_path / "a.gif")


def test_a_bad_file_is_one_line_with_its_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    save_animation(tmp_path / "a.gif", noise, duration=100)
    for data in ((tmp_path / "a.gif").read_bytes()[:3000], b"hello", b""):
        (tmp_path / "a.gif").write_bytes(data)
        with pytest.raises(ValueError, match="a.gif: cannot be read") as error:
            read_clip(tmp_path / "a.gif")
        assert "\n" not in str(error.value)
