"""Written clips, read again by media/read.py."""

import os

import numpy as np
import pytest
import torch
from clips import GRAYS, HEIGHT, WIDTH, fake, gray_frames, needs_ffmpeg
from PIL import Image

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


# Formats


def test_a_gif_keeps_equal_frames(tmp_path):
    frames = gray_frames((0, 160, 160, 160, 0, 0))
    frames[:, :5, :7] = (255, 30, 30)  # flat colours are exact in a palette
    write_clip(tmp_path / "a.gif", to_clip(frames))
    back, rate = read_clip(tmp_path / "a.gif")
    assert np.array_equal(back, frames)
    assert rate == pytest.approx(8)  # the default; in hundredths of a second: 12, 13, 12, ...


def test_a_gif_repeats_forever(tmp_path):
    write_clip(tmp_path / "a.gif", to_clip(gray_frames()))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0


def test_a_gif_has_one_palette_for_all_its_frames(tmp_path):
    write_clip(tmp_path / "a.gif", torch.rand(4, 3, 20, 20) * 2 - 1, frames_per_second=50)
    frames, rate = read_clip(tmp_path / "a.gif")
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) <= 256 and len(frames) == 4
    assert rate == 50


def test_each_part_of_a_gif_has_its_own_exact_256_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 16, 3), dtype=np.uint8)
    write_parts(tmp_path / "a.gif", map(to_clip, colours))
    assert np.array_equal(read_clip(tmp_path / "a.gif")[0], colours.reshape(6, 8, 16, 3))


def test_rounding_of_durations_does_not_add_up_over_parts(tmp_path):
    write_parts(tmp_path / "a.gif", gray_clips(*[[0]] * 30), frames_per_second=30)
    assert read_clip(tmp_path / "a.gif")[1] == 30


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
    fake(monkeypatch, tmp_path, ffmpeg="""
with open(sys.argv[-1].removeprefix("file:"), "wb") as file:
    file.write(sys.stdin.buffer.read())
""")  # and without ffprobe, which only reading needs
    frames = gray_frames()
    write_parts(tmp_path / "a.mp4", [to_clip(frames[:4]), to_clip(frames[4:])])
    assert (tmp_path / "a.mp4").read_bytes() == frames.tobytes()


# Several clips


def test_a_contact_sheet_has_a_row_per_clip_and_white_lines():
    long, short = to_clip(gray_frames((0, 80, 40))), to_clip(gray_frames((160, 200)))
    sheet = to_uint8(contact_sheet([long, short]))[0, ..., 0]
    assert sheet.shape == (2 * HEIGHT + 2, 3 * WIDTH + 4)
    corners = sheet[:: HEIGHT + 2, :: WIDTH + 2]
    assert corners.tolist() == [[0, 80, 40], [160, 200, 255]]  # a missing frame is white
    assert (sheet[HEIGHT : HEIGHT + 2] == 255).all() and (sheet[:, WIDTH : WIDTH + 2] == 255).all()


@pytest.mark.parametrize("name, rows, frames", [
    ("a.gif", [(10, 20)], [[[10]], [[20]]]),
    ("a.gif", [(10, 20), (30, 40), (50, 60)],  # in a near-square grid, where white is empty
     [[[10, 30], [50, 255]], [[20, 40], [60, 255]]]),
    ("a.PNG", [(10,)], [[[10]]]),
    ("a.png", [(10, 20, 30)], [[[10, 20, 30]]]),  # a row of its frames
    ("a.png", [(10, 20), (30, 40)], [[[10, 20], [30, 40]]]),  # a row for each
    ("a.png", [(10 * i,) for i in range(9)],  # images: eight in a row
     [[list(range(0, 80, 10)), [80] + [255] * 7]]),
])
def test_a_file_shows_all_clips(tmp_path, name, rows, frames):
    assert write_samples(gray_clips(*rows), None, tmp_path / name, None, 8) == [tmp_path / name]
    corners = read_clip(tmp_path / name)[0][:, :: HEIGHT + 2, :: WIDTH + 2, 0]
    assert corners.tolist() == frames


@pytest.mark.parametrize("folder", ["samples", "a.gif"])  # a folder may be called like a clip
def test_a_folder_has_a_file_for_each_prompt(tmp_path, folder):
    output = tmp_path / folder
    output.mkdir()
    paths = write_samples(gray_clips((0, 40), (80, 0)), ["A cat!", "a dog"], output, ".gif", 0.5)
    assert paths == [output / "a-cat.gif", output / "a-dog.gif"]
    assert [read_clip(path)[0][:, 0, 0, 0].tolist() for path in paths] == [[0, 40], [80, 0]]
    assert read_clip(paths[0])[1] == 0.5


def test_prompts_become_names():
    names = file_names(["A cat!", "a  cat?", "Zwölf/../Bären", "", "a cat 2", "...", "a cat"],
                       ".gif")
    assert names == [
        "a-cat.gif", "a-cat-2.gif", "zwölf-bären.gif", "no-text.gif", "a-cat-2-2.gif",
        "no-text-2.gif", "a-cat-3.gif",
    ]


@pytest.mark.parametrize("letter", ["x", "猫"])
def test_a_long_prompt_becomes_a_name_that_a_file_may_have(letter):
    (name,) = file_names([1000 * letter], ".gif")
    assert 196 < len(name.removesuffix(".gif").encode()) <= 200


def test_enlarging_makes_a_square_of_each_pixel():
    clip = torch.arange(1.0, 7).reshape(1, 1, 2, 3)
    assert enlarge(clip, 2)[0, 0].tolist() == [
        [1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6],
    ]


# Mistakes


def test_without_ffmpeg_an_mp4_has_a_remedy(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="an .mp4 needs the ffmpeg program; .* write a .gif"):
        write_clip(tmp_path / "b.mp4", torch.zeros(1, 3, 4, 4))


def test_an_ffmpeg_that_fails_at_once_is_named(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, ffmpeg="sys.exit('no libx264')")
    with pytest.raises(ValueError, match="ffmpeg cannot write the .mp4 .no libx264"):
        write_clip(tmp_path / "b.mp4", torch.zeros(20, 3, 64, 64))  # more than a pipe holds


def test_an_unknown_suffix_lists_those_that_are_known(tmp_path):
    with pytest.raises(ValueError, match="a.avi: needs one of the suffixes .gif .png .mp4"):
        write_clip(tmp_path / "a.avi", torch.zeros(1, 3, 4, 4))


def test_a_clip_with_nan_keeps_the_old_file_and_leaves_no_other(tmp_path):
    (tmp_path / "a.gif").write_text("old")
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        write_clip(tmp_path / "a.gif", torch.full((1, 3, 4, 4), torch.nan))
    assert os.listdir(tmp_path) == ["a.gif"] and (tmp_path / "a.gif").read_text() == "old"
