"""Each picture is drawn of a tiny run; what pictures say is checked by numbers."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from helpers import call, flags
from PIL import Image

import layers
from files import write_json
from media.read import read_clip
from media.write import side_by_side, write_clip
from papers import long_video
from shapes import MovingShapes
from shift import temporal_shift
from studies import figures, inside
from studies.inside import as_variant, attention_of, denoise, load, reach_of
from studies.sheets import new_figure, pixels, save, show

LONG = {"num_clips": 3, "clip_frames": 20, "num_frames": 4, "num_known": 2, "long_steps": 1,
        "long_batch_size": 2, "decoder_steps": 0, "warmup_steps": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def run(trained):
    """A trained run, as the pictures get it."""
    return load(trained)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few clips, steps and frames."""
    monkeypatch.setattr(figures, "measure", lambda model, num_frames: "no % right")
    for name, value in {"LOSS_CLIPS": 2, "LOSS_LEVELS": 3, "LONG_CLIPS": 2,
                        "LONG_FRAMES": 20}.items():
        monkeypatch.setattr(figures, name, value)


# Each picture


@pytest.mark.parametrize("name", [n for n in figures.FIGURES if n not in ("long", "held_out")])
def test_a_picture_is_drawn_1200_pixels_wide_in_few_colours(run, tmp_path, name):
    with torch.no_grad():
        figures.FIGURES[name](run, tmp_path)
    image = Image.open(tmp_path / f"{name}.png")
    assert image.width == 1200 and image.mode == "P" and len(image.getcolors()) > 20


def test_the_grid_of_held_out_clips_moves(run, tmp_path):
    with torch.no_grad():
        figures.held_out(run, tmp_path)
    frames, rate = read_clip(tmp_path / "held_out.gif")
    assert frames.shape[0] == 3 and frames.shape[2] == 800 and rate == pytest.approx(8, rel=0.05)
    assert (frames[0] != frames[1]).any()


def test_the_command_draws_what_it_is_asked_for_and_always_the_same(trained, tmp_path):
    path = tmp_path / "long"
    call(long_video.main, "train", path, *flags(init=trained, **LONG))
    for output in ("a", "b"):
        call(figures.main, trained, "--long", path, "--only", "shift,long", "--output",
             tmp_path / output)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["long.png", "shift.png"]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("only", ["shift,drift", "long"])
def test_a_picture_that_cannot_be_drawn_is_refused(trained, tmp_path, only):
    with pytest.raises(ValueError, match="--only needs some of shift, .* long needs --long RUN"):
        call(figures.main, trained, "--only", only, "--output", tmp_path)


def test_a_table_of_images_shows_them_at_their_places(tmp_path):
    clips = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[:, :, None, None, None].expand(2, 2, 3, 8, 8)
    figure = new_figure(4)
    show(axes := figure.subplots(), clips, ["a", "b"], "title")
    image = axes.images[0].get_array()
    centres = image[[4, 4, 14, 14], [4, 14, 4, 14], 0].tolist()
    assert centres == [0, 255, 255, 0]
    assert axes.get_yticks().tolist() == axes.get_xticks().tolist() == [5, 15]


def test_few_colours_change_no_pixel_by_much(tmp_path):
    figure = new_figure(3)
    figure.subplots().imshow(np.linspace(0, 1, 64).reshape(8, 8), cmap="viridis")
    save(figure, tmp_path / "a.png")
    saved = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert abs(saved - pixels(figure)).max() <= 16


# What they show


def test_previews_are_cut_out_of_their_grid_and_ends_are_drawn(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    gray = torch.linspace(-1, 1, 8)[:, None, None, None, None].expand(8, 3, 3, 16, 16)
    write_clip(path / "previews" / "video-000002.gif", side_by_side(gray))
    prompt, clips = inside.previews_of(load(path))
    assert list(clips) == [0, 2, 4] and prompt == MovingShapes(8).captions[4]
    assert clips[2].sub(gray[4]).abs().max() < 0.02
    assert clips[0].shape == clips[4].shape == (3, 3, 16, 16) and (clips[0] != clips[4]).any()


@pytest.mark.parametrize(("field", "value"), [("temporal", "conv"), ("data", "clips")])
def test_other_runs_are_refused(run, tmp_path, field, value):
    options = dataclasses.asdict(run.options) | {field: value}
    write_json(tmp_path / "train.json", {"options": options, "finished": ["vae", "image", "video"]})
    with pytest.raises(ValueError, match="needs a finished video stage with --temporal shift on"):
        load(tmp_path)


@pytest.mark.parametrize(("temporal", "frames"), [
    ("none", lambda n: 1), ("shift", lambda n: 1 + 4 * n), ("attention", lambda n: 41),
])
def test_a_frame_sees_so_many_frames_after_n_layers(run, temporal, frames):
    strength = reach_of(as_variant(run.image.unet, temporal, 41), 41)
    seen = [(row > 0).nonzero().flatten() - 20 for row in strength]
    assert [len(row) for row in seen] == [frames(n) for n in range(1, 9)]
    assert all(row.sum() == 0 for row in seen)  # as many before as after


def test_attention_of_each_place_to_all_tokens_sums_to_1(run):
    clip, maps = attention_of(run.video, "a red circle moving left", 1)
    assert clip.shape[0] == maps.shape[1] == 3 and clip.shape[2:] == maps.shape[2:]
    assert maps.sum(0).sub(1).abs().max() < 1e-5
    assert maps.std(0).min() > 1e-6  # over tokens: it is not the same to all of them


def test_a_guess_of_the_clip_is_the_models_own(run):
    sampling = dataclasses.replace(run.video.sampling, guidance_scale=1.0)
    model, outputs = dataclasses.replace(run.video, sampling=sampling), []
    hook = model.unet.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    steps = list(denoise(model, "a red circle moving left", 1))
    hook.remove()
    for (t, x_t, x0), output in zip(steps, outputs, strict=True):
        expected, _ = model.diffusion.predict(output, x_t, t)
        assert torch.allclose(x0, expected, atol=1e-4)


@pytest.mark.parametrize("third", range(3))
def test_a_shift_without_a_third_differs_in_that_third_only(third):
    x = torch.arange(4 * 6.0).view(1, 4, 6) + 1
    with inside.without_third(third):
        changed = layers.temporal_shift(x, 2)
    whole, channels = temporal_shift(x, 2), slice(2 * third, 2 * third + 2)
    expected = whole.clone()
    expected[:, :, channels] = x[:, :, channels] if third < 2 else 0
    assert torch.equal(changed, expected) and not torch.equal(changed, whole)
    assert torch.equal(layers.temporal_shift(x, 2), whole)  # outside all is as before


def test_a_measure_of_clips_says_what_is_right(run, monkeypatch):
    def real(model, prompts, num_frames, seed, batch_size):
        data = MovingShapes(len(prompts), num_frames, 32, seed, prompts)
        return torch.stack([frames for frames, _ in data]) / 127.5 - 1

    monkeypatch.setattr(inside, "draw", real)
    right, moves, crisp = inside.measure(run.video, 8).splitlines()
    travel = float(moves.removeprefix("moves ").removesuffix(" px"))
    assert right == "100 % right" and 8 < travel < 11.2
    assert float(crisp.removeprefix("crispness ")) > 0.9
