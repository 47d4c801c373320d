"""Each picture is drawn of a tiny run; numbers check what the pictures say."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, call
from PIL import Image

import layers
from evaluate import real_clips
from shift import temporal_shift
from studies import figures, inside, notebook
from studies.sheets import new_figure, show

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def run(trained):
    """A trained run, as the pictures get it."""
    return inside.load(trained)


def test_the_command_draws_every_picture_1200_pixels_wide_in_few_colours(
        trained, tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "JUDGED", 2)
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


@pytest.mark.parametrize("t", [1, 8])
def test_real_clips_and_images_are_judged_right(run, monkeypatch, t):
    monkeypatch.setattr(inside, "JUDGED", 16)
    monkeypatch.setattr(inside, "draw", lambda model, prompts, *_: real_clips(
        16, 8, 32, seed=0, combinations=prompts)[:, :t])
    assert inside.judge(run.video, t)[1].all()


def test_the_signal_to_noise_ratio_falls_by_four_from_column_to_column(run):
    figures.noise(run, figure := new_figure(3))
    ratios = [float(label.get_text().split()[0]) for label in figure.axes[0].get_xticklabels()]
    assert ratios[1:-1] == pytest.approx([4.0 ** -k for k in range(-3, 5)], rel=0.1)
    assert ratios[-1] == 0


def test_guidance_shows_what_it_mends_first(run, monkeypatch):
    right = iter(2 * [[1, 0, 0], [1, 0, 1], [1, 1, 1]])  # of each setting; images, then clips
    monkeypatch.setattr(inside, "JUDGED", 3)
    monkeypatch.setattr(inside, "judge", lambda model, t: (
        torch.zeros(3, t, 3, 8, 8), np.array(next(right), dtype=bool)))
    figures.guidance(run, figure := new_figure(8))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[1:] == ['"a red triangle moving left"', '"a red square moving down"']


def test_code_in_the_lesson_is_the_codes_own():
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    code = re.findall("```python\n(.*?)```", (ROOT / "docs/lesson.md").read_text(), re.DOTALL)
    assert code and all(line.strip() in sources for block in code for line in block.splitlines())


def test_the_notebook_runs_in_a_new_clone_and_is_up_to_date(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(inside, "JUDGED", 2)
    shutil.copytree(trained, "latent-shift/runs/demo")
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command[1]))
    commands, scope = [], {}
    file = ROOT / "docs" / "lesson.ipynb"
    found = json.loads(file.read_text())
    for cell in found["cells"][1::2]:
        exec(cell["source"], scope)
    assert commands == ["clone", "train.py"]
    assert found == notebook.make() and file.stat().st_size < 500_000
