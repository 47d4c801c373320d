"""Each picture is drawn of a tiny run; numbers check what the pictures say."""

import shutil

import pytest
import torch
from helpers import call
from PIL import Image

import layers
from evaluate import real_clips
from media.write import side_by_side, write_clip
from shapes import MovingShapes
from shift import temporal_shift
from studies import figures, inside
from studies.sheets import new_figure, show

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def run(trained):
    """A trained run, as the pictures get it."""
    return inside.load(trained)


def test_the_command_draws_every_picture_1200_pixels_wide_in_few_colours(
        trained, tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "MEASURED", 2)
    for name, value in {"LOSS_CLIPS": 2, "LOSS_LEVELS": 3}.items():
        monkeypatch.setattr(figures, name, value)
    call(figures.main, trained, "--output", tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == {
        picture.__name__ for picture in figures.FIGURES}
    for file in tmp_path.iterdir():
        image = Image.open(file)
        assert image.width == 1200 and image.mode == "P" and len(image.getcolors()) > 20


def test_a_table_shows_images_beside_their_labels():
    clips = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[:, :, None, None, None].expand(2, 2, 3, 8, 8)
    show(axes := new_figure(4).subplots(), clips, ["a", "b"], "title")
    image = axes.images[0].get_array()
    assert image[[4, 4, 14, 14], [4, 14, 4, 14], 0].tolist() == [0, 255, 255, 0]
    assert axes.get_yticks().tolist() == axes.get_xticks().tolist() == [5, 15]


def test_previews_are_cut_out_of_their_grid(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    gray = torch.linspace(-1, 1, 9)[:, None, None, None, None].expand(9, 3, 3, 16, 16).clone()
    gray[4] = torch.linspace(-1, 0, 16)  # columns, so that an offset shows
    write_clip(path / "previews" / "video-000002.gif", side_by_side(gray))
    prompt, clips = inside.previews_of(inside.load(path))
    assert prompt == MovingShapes(8).captions[4] and list(clips) == [0, 2]
    assert clips[2].sub(gray[4]).abs().max() < 0.02 and clips[0].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("shifts", [0, 1, 2])
def test_each_shift_adds_a_frame_on_both_sides_per_block(run, shifts):
    reach = inside.reach_of(inside.with_shifts(run.image.unet, shifts), 41)
    seen = [(row > 0).nonzero().flatten() - 20 for row in reach]
    assert [len(row) for row in seen] == [1 + 2 * shifts * n for n in range(1, 9)]
    assert all(row.sum() == 0 for row in seen)  # as many before as after


def test_the_steps_of_a_clip_are_the_samplers_own(run):
    steps = inside.denoise(run.video, PROMPT, 1)
    assert len(steps) == run.video.sampling.num_steps
    drawn = list(run.video.sample([PROMPT], [1]))
    assert all(torch.equal(x_t, x) for (_, x_t, _), x in zip(steps[1:], drawn, strict=False))
    assert torch.allclose(steps[-1][2], drawn[-1], atol=1e-5)  # the last guess is the sample


def test_a_shift_without_a_third_differs_in_that_third_only():
    x = torch.arange(4 * 6.0).view(1, 4, 6) + 1
    shifted = temporal_shift(x)
    for third, parts in (("past", (x, shifted, shifted)), ("future", (shifted, shifted, x))):
        with inside.shift_without(third):
            expected = [part[..., 2 * i : 2 * i + 2] for i, part in enumerate(parts)]
            assert torch.equal(layers.temporal_shift(x), torch.cat(expected, dim=2))
    with inside.shift_without("past", "future"):
        assert torch.equal(layers.temporal_shift(x), x)
    assert layers.temporal_shift is temporal_shift  # outside all is as before


def test_measures_of_real_clips_say_that_all_are_right(run, monkeypatch):
    real = real_clips(16, 8, 32, seed=0, combinations=inside.choose_prompts(16))
    monkeypatch.setattr(inside, "draw", lambda *_: real)
    right, moves, crisp = inside.measure(run.video).splitlines()
    assert right == "100 % right" and 8 < float(moves.split()[1]) < 11.2  # 0.25 to 0.35 of 32
    assert float(crisp.removeprefix("crispness ")) > 0.9
