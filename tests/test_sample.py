"""Drawing clips: the same ones from the same seeds, in files that hold what they should."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import sample
from media.read import read_clip
from sample import generate
from weights import load_pipeline

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle moving down"]


@pytest.fixture(scope="module")
def pipeline(trained):
    return load_pipeline(trained).to("cpu")


def draw(pipeline, prompts, seed=0, batch_size=8, **options):
    sampling = dataclasses.replace(pipeline.sampling, **options)
    return list(generate(pipeline, prompts, sampling, seed, batch_size))


# What a clip depends on


def test_a_clip_does_not_depend_on_the_size_of_a_batch(pipeline):
    alone, together = (draw(pipeline, PROMPTS, 5, size, eta=1.0) for size in (1, 2))
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_prompt_i_is_drawn_with_seed_plus_i(pipeline):
    third = draw(pipeline, PROMPTS, seed=5)[2]
    assert torch.allclose(third, draw(pipeline, PROMPTS[2:], seed=7)[0], atol=1e-5)


def test_the_same_seed_draws_the_same_clip(pipeline):
    assert torch.equal(draw(pipeline, PROMPTS[:1])[0], draw(pipeline, PROMPTS[:1])[0])


def test_another_seed_draws_another_clip(pipeline):
    a, b = (draw(pipeline, PROMPTS[:1], seed)[0] for seed in (0, 1))
    assert (a - b).abs().max() > 0.01


def test_another_prompt_draws_another_clip(pipeline):
    a, b = (draw(pipeline, [prompt])[0] for prompt in PROMPTS[:2])
    assert (a - b).abs().max() > 1e-4


def test_drawing_does_not_touch_the_global_random_state(pipeline):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    draw(pipeline, PROMPTS[:1], eta=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_bar_counts_every_step_of_every_clip(pipeline, monkeypatch):
    bars, tqdm = [], sample.tqdm
    monkeypatch.setattr(sample, "tqdm", lambda **options: (
        bars.append(tqdm(disable=False, **options)) or bars[0]
    ))
    draw(pipeline, PROMPTS, batch_size=2, num_steps=5)
    assert bars[0].n == bars[0].total == 3 * 5


def test_guidance_of_one_is_no_other_clip_than_guidance_near_one(pipeline):
    a, b = (draw(pipeline, PROMPTS[:1], guidance_scale=scale)[0] for scale in (1.0, 1.000001))
    assert torch.allclose(a, b, atol=1e-4)


# Files


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_has_every_frame_and_the_rate(run, tmp_path, capsys, suffix):
    words = ("--output", tmp_path / "out", "--format", suffix, "--frames-per-second", 5)
    call(sample.main, run, *PROMPTS[:2], *words)
    names = [f"a-red-circle-moving-left.{suffix}", f"a-blue-square-moving-up.{suffix}"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    for name in names:
        frames, rate = read_clip(tmp_path / "out" / name)
        assert frames.shape == (3, 16, 16, 3) and rate == pytest.approx(5)


@needs_ffmpeg
def test_an_mp4_has_every_frame(run, tmp_path):
    call(sample.main, run, PROMPTS[0], "--output", tmp_path / "a.mp4")
    assert len(read_clip(tmp_path / "a.mp4")[0]) == 3


def test_a_lossless_file_holds_the_clip_that_was_drawn(run, pipeline, tmp_path):
    call(sample.main, run, PROMPTS[1], "--seed", 9, "--output", tmp_path / "a.webp")
    frames = torch.from_numpy(read_clip(tmp_path / "a.webp")[0].copy())
    drawn = draw(pipeline, PROMPTS[1:2], seed=9)[0]
    # One level of 255, since a rounding may fall either way.
    assert (frames.permute(0, 3, 1, 2) - (drawn + 1) * 127.5).abs().max() <= 1


def test_samples_lie_in_the_run_unless_told_otherwise(run):
    call(sample.main, run, PROMPTS[0])
    assert [file.name for file in (run / "samples").iterdir()] == ["a-red-circle-moving-left.gif"]


def test_one_frame_is_an_image(run, tmp_path):
    call(sample.main, run, PROMPTS[0], "--num-frames", 1, "--output", tmp_path)
    with Image.open(tmp_path / "a-red-circle-moving-left.png") as image:
        assert image.size == (16, 16)


def test_frames_and_size_can_be_others_than_those_of_training(run, tmp_path):
    words = ("--num-frames", 5, "--image-size", 24, "--output", tmp_path / "a.gif")
    call(sample.main, run, PROMPTS[0], *words)
    assert read_clip(tmp_path / "a.gif")[0].shape == (5, 24, 24, 3)


def test_a_file_shows_all_prompts(run, tmp_path):
    call(sample.main, run, *PROMPTS[:3], "--output", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size) == (3, (34, 34))  # 2 x 2, with 2 pixels between


# Prompts


def test_prompts_are_read_from_a_file_after_those_of_the_command(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog  \r\n", encoding="utf-8")
    call(sample.main, run, "a cow", "--prompts-file", tmp_path / "prompts.txt")
    names = [line.rsplit("/", 1)[-1] for line in capsys.readouterr().out.splitlines()]
    assert names == ["a-cow.gif", "a-cat.gif", "a-dog.gif"]


def test_words_never_seen_are_drawn_like_others(run, tmp_path):
    call(sample.main, run, "ein Pferd 🐎 " * 50, "--output", tmp_path / "a.gif")
    assert len(read_clip(tmp_path / "a.gif")[0]) == 3


# Mistakes


@pytest.mark.parametrize("words, message", [
    ((), "needs a prompt"),
    (("x", "--prompts-file", "nowhere.txt"), "nowhere.txt"),
    (("--prompts-file", "empty.txt"), "empty.txt: no prompts in it"),
    (("--prompts-file", "latin.txt"), "latin.txt: not a text file in UTF-8"),
    (("x", "--output", "a.avi"), "a.avi: needs one of the suffixes .gif"),
    (("x", "--output", "a.gif", "--format", "webp"), "--format webp .* a.gif"),
    (("x", "--num-frames", "0"), "num_frames needs >= 1, got 0"),
    (("x", "--num-steps", "0"), "num_steps needs"),
    (("x", "--num-steps", "1001"), "num_steps needs to lie in"),
    (("x", "--image-size", "18"), "image_size needs a multiple of 8, got 18"),
    (("x", "--image-size", "20"), "multiple of 8, got 20"),
    (("x", "--eta", "2"), "eta needs to lie in"),
    (("x", "--frames-per-second", "0"), "frames_per_second needs"),
    (("x", "--batch-size", "0"), "--batch-size"),
    (("x", "--seed", "-1"), "--seed"),
    (("x", "--device", "abacus"), "--device abacus: not usable"),
])
def test_a_mistake_is_named_and_writes_nothing(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        call(sample.main, run, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [
    ("x", "--guidance", "2"), ("x", "--sampler", "euler"), ("x", "--format", "avi"),
    ("x", "--num-frames", "many"),
])
def test_a_wrong_flag_ends_with_status_2(run, words):
    with pytest.raises(SystemExit) as stop:
        call(sample.main, run, *words)
    assert stop.value.code == 2


def test_a_run_without_a_unet_says_what_is_missing(run):
    shutil.rmtree(run / "unet")
    with pytest.raises(ValueError, match="has no unet/; needs a run with a finished image stage"):
        call(sample.main, run, "a cat")


def test_compile_compiles_the_unet_with_frozen_weights(trained, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module, **options: compiled.append((type(module).__name__, options)))
    call(sample.main, trained, "a red circle", "--num-frames", 1, "--compile", "--output",
         tmp_path / "x.png")
    assert compiled == [("UNet", {"options": {"freezing": True}, "dynamic": False})]


def test_zoom_makes_a_square_of_each_pixel(run, tmp_path):
    for zoom in (1, 3):
        path = tmp_path / f"{zoom}.webp"  # lossless
        call(sample.main, run, "a red circle", "--zoom", zoom, "--output", path)
    small, large = (read_clip(tmp_path / f"{zoom}.webp")[0] for zoom in (1, 3))
    assert np.array_equal(large, small.repeat(3, axis=1).repeat(3, axis=2))
