"""Written clips, read again by media/read.py."""

import os

import numpy as np
import pytest
import torch
from clips import GRAYS, HEIGHT, WIDTH, fake, gray_frames, needs_ffmpeg

from media.read import read_clip
from media.write import (contact_sheet, enlarge, file_names, to_uint8, write_clip, write_parts,
                         write_samples)


def to_clip(frames):
    return torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1


def gray_clips(*rows):
    """A clip for each row of gray values."""
    return torch.stack([to_clip(gray_frames(row)) for row in rows])


def test_to_uint8_rounds_and_clamps():
    clip = torch.tensor([-9.0, -1.0, 0.001, 1.0, 9.0])[:, None, None].expand(5, 3, 2).movedim(0, 2)
    assert to_uint8(clip)[0, :, 0].tolist() == [0, 0, 128, 255, 255]  # (3, 2, 5) -> (2, 5, 3)


def test_a_gif_keeps_equal_frames_and_repeats_forever(tmp_path):
    frames = gray_frames((0, 160, 160, 160, 0, 0))
    frames[:, :5, :7] = (255, 30, 30)  # flat colours are exact in a palette
    write_clip(tmp_path / "a.gif", to_clip(frames))
    back, rate = read_clip(tmp_path / "a.gif")
    assert np.array_equal(back, frames)
    assert rate == pytest.approx(8)  # the default; in hundredths of a second: 12, 13, 12, ...
    assert b"NETSCAPE2.0\3\1\0\0" in (tmp_path / "a.gif").read_bytes()


def test_each_part_of_a_gif_has_its_own_exact_256_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 16, 3), dtype=np.uint8)
    write_parts(tmp_path / "a.gif", map(to_clip, colours), frames_per_second=30)
    frames, rate = read_clip(tmp_path / "a.gif")
    assert np.array_equal(frames, colours.reshape(6, 8, 16, 3))
    assert rate == 30  # 3.33 hundredths of a second are 3, 4, 3: rounding does not add up


@pytest.mark.parametrize("t, rows, columns", [(1, 1, 1), (8, 1, 8), (10, 3, 4)])
def test_a_png_is_an_image_a_row_or_a_grid(tmp_path, t, rows, columns):
    write_clip(tmp_path / "a.png", to_clip(gray_frames(range(0, 10 * t, 10))))
    sheet = read_clip(tmp_path / "a.png")[0][0, ..., 0]
    assert sheet.shape == (rows * (HEIGHT + 2) - 2, columns * (WIDTH + 2) - 2)
    assert sheet[:: HEIGHT + 2, :: WIDTH + 2].flatten()[:t].tolist() == list(range(0, 10 * t, 10))


@needs_ffmpeg
def test_an_mp4_keeps_order_and_rate_and_is_padded_to_even(tmp_path):
    write_clip(tmp_path / "a.mp4", to_clip(gray_frames()[:, :15, :23]), frames_per_second=12)
    frames, rate = read_clip(tmp_path / "a.mp4")
    assert frames.shape == (6, 16, 24, 3) and rate == 12.0
    assert frames[:, :14, :22].mean((1, 2, 3)) == pytest.approx(np.array(GRAYS), abs=15)


def test_an_mp4_is_what_ffmpeg_makes_of_every_frame_of_every_part(tmp_path, monkeypatch):
    """It needs no ffprobe."""
    fake(monkeypatch, tmp_path, ffmpeg="from pathlib import Path\n"
         "Path(sys.argv[-1].removeprefix('file:')).write_bytes(sys.stdin.buffer.read())")
    frames = gray_frames()
    write_parts(tmp_path / "a.mp4", [to_clip(frames[:4]), to_clip(frames[4:])])
    assert (tmp_path / "a.mp4").read_bytes() == frames.tobytes()


def test_a_contact_sheet_has_a_row_per_clip_and_white_lines():
    long, short = to_clip(gray_frames((0, 80, 40))), to_clip(gray_frames((160, 200)))
    sheet = to_uint8(contact_sheet([long, short]))[0, ..., 0]
    assert sheet.shape == (2 * HEIGHT + 2, 3 * WIDTH + 4)
    corners = sheet[:: HEIGHT + 2, :: WIDTH + 2]
    assert corners.tolist() == [[0, 80, 40], [160, 200, 255]]  # a missing frame is white
    assert (sheet[HEIGHT : HEIGHT + 2] == 255).all() and (sheet[:, WIDTH : WIDTH + 2] == 255).all()


@pytest.mark.parametrize("name, rows, frames", [
    ("a.gif", [(10, 20), (30, 40), (50, 60)],  # in a near-square grid, where white is empty
     [[[10, 30], [50, 255]], [[20, 40], [60, 255]]]),
    ("a.PNG", [(10, 20), (30, 40)], [[[10, 20], [30, 40]]]),  # a row for each
    ("a.png", [(10 * i,) for i in range(9)],  # images: eight in a row
     [[list(range(0, 80, 10)), [80] + [255] * 7]]),
])
def test_a_file_shows_all_clips(tmp_path, name, rows, frames):
    assert write_samples(gray_clips(*rows), None, tmp_path / name, None, 8, 1) == [
        tmp_path / name]
    corners = read_clip(tmp_path / name)[0][:, :: HEIGHT + 2, :: WIDTH + 2, 0]
    assert corners.tolist() == frames


def test_a_folder_has_a_file_for_each_prompt(tmp_path):
    output = tmp_path / "a.gif"  # a folder may be called like a clip
    output.mkdir()
    paths = write_samples(gray_clips((0, 40), (80, 0)), ["A cat!", "a dog"], output, ".gif", 0.5)
    assert paths == [output / "a-cat.gif", output / "a-dog.gif"]
    assert [read_clip(path)[0][:, 0, 0, 0].tolist() for path in paths] == [[0, 40], [80, 0]]
    assert read_clip(paths[0])[1] == 0.5


def test_prompts_become_names():
    prompts = ["A cat!", "a  cat?", "Zwölf/../Bären", "", "a cat 2", "...", "a cat"]
    stems = "a-cat", "a-cat-2", "zwölf-bären", "no-text", "a-cat-2-2", "no-text-2", "a-cat-3"
    assert file_names(prompts, ".gif") == [f"{stem}.gif" for stem in stems]
    # A file's name has at most 255 bytes.
    for name in file_names(["x" * 1000, "猫" * 1000], ".gif"):
        assert 196 < len(name.removesuffix(".gif").encode()) <= 200


def test_enlarging_makes_a_square_of_each_pixel():
    clip = torch.arange(1.0, 7).reshape(1, 1, 2, 3)
    assert enlarge(clip, 2)[0, 0].tolist() == 2 * [[1, 1, 2, 2, 3, 3]] + 2 * [[4, 4, 5, 5, 6, 6]]
    # By default by a whole number, until the shorter side has 128 pixels
    for size, enlarged in (((2, 3), (128, 192)), ((24, 30), (144, 180)), ((200, 128), (200, 128))):
        assert enlarge(torch.zeros(1, 3, *size)).shape[-2:] == enlarged


def test_an_ffmpeg_that_fails_at_once_is_named(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, ffmpeg="sys.exit('no libx264')")
    with pytest.raises(ValueError, match="ffmpeg cannot write the .mp4 .no libx264"):
        write_clip(tmp_path / "b.mp4", torch.zeros(20, 3, 64, 64))  # more than a pipe holds


def test_a_suffix_that_nothing_here_writes_is_refused(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    for name, message in (("a.avi", "a.avi: needs one of the suffixes .gif .png .mp4"),
                          ("a.mp4", "an .mp4 needs the ffmpeg program; .* write a .gif")):
        with pytest.raises(ValueError, match=message):
            write_clip(tmp_path / name, torch.zeros(1, 3, 4, 4))


def test_a_clip_with_nan_keeps_the_old_file_and_leaves_no_other(tmp_path):
    (tmp_path / "a.gif").write_text("old")
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        write_clip(tmp_path / "a.gif", torch.full((1, 3, 4, 4), torch.nan))
    assert os.listdir(tmp_path) == ["a.gif"] and (tmp_path / "a.gif").read_text() == "old"
