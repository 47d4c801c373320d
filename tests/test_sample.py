"""Drawing clips: the same ones from the same seeds, in files that hold what they should."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import evaluate
import sample
from checkpoints.weights import load_pipeline
from media.read import read_clip
from pipeline import Pipeline
from sample import generate

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle moving down"]


@pytest.fixture(scope="module")
def pipeline(trained):
    return load_pipeline(trained).to("cpu")


def draw(pipeline, prompts, seed=0, batch_size=8, **options):
    sampling = dataclasses.replace(pipeline.sampling, **options)
    return list(generate(pipeline, prompts, sampling, seed, batch_size))


# A clip's prompt and seed


def test_a_clip_does_not_depend_on_the_size_of_a_batch(pipeline):
    alone, together = (draw(pipeline, PROMPTS, 5, size, eta=1.0) for size in (1, 2))
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_bar_counts_every_step_of_every_clip(pipeline, monkeypatch):
    bars, tqdm = [], sample.tqdm
    monkeypatch.setattr(sample, "tqdm", lambda **options: (
        bars.append(tqdm(disable=False, **options)) or bars[0]
    ))
    draw(pipeline, PROMPTS, batch_size=2, num_steps=5)
    assert bars[0].n == bars[0].total == 3 * 5 and not bars[0].leave


def test_prompt_i_is_drawn_with_seed_plus_i(pipeline):
    third = draw(pipeline, PROMPTS, seed=5, batch_size=2)[2]
    assert torch.allclose(third, draw(pipeline, PROMPTS[2:], seed=7)[0], atol=1e-5)
    assert (third - draw(pipeline, PROMPTS[2:], seed=8)[0]).abs().max() > 0.01


# Files


def test_a_folder_gets_an_animation_per_prompt_with_every_frame_and_the_rate(
        run, tmp_path, capsys):
    words = ("--output", tmp_path / "out", "--frames-per-second", 5)
    call(sample.main, run, *PROMPTS[:2], *words)
    paths = [tmp_path / "out" / name
             for name in ("a-red-circle-moving-left.gif", "a-blue-square-moving-up.gif")]
    assert capsys.readouterr().out.split() == [*map(str, paths)]
    for path in paths:
        frames, rate = read_clip(path)
        assert frames.shape == (3, 128, 128, 3) and rate == pytest.approx(5)


def test_a_file_holds_the_clips_that_were_drawn_enlarged(run, pipeline, tmp_path):
    words = ("--num-frames", 2, "--num-steps", 3, "--image-size", 24, "--seed", 9, "--zoom", 3,
             "--batch-size", 1)
    call(sample.main, run, *PROMPTS[:2], *words, "--output", tmp_path / "a.png")  # lossless
    clips = draw(pipeline, PROMPTS[:2], 9, num_frames=2, num_steps=3, image_size=24)
    squares = [clip.repeat_interleave(3, 2).repeat_interleave(3, 3) for clip in clips]
    with Image.open(tmp_path / "a.png") as image:
        shown = torch.from_numpy(np.array(image).astype(int))
    for row, clip in enumerate(squares):  # a row per clip, two pixels between the frames
        for column, frame in enumerate(clip):
            y, x = 74 * row, 74 * column
            part = shown[y : y + 72, x : x + 72].permute(2, 0, 1)
            # One level of 255, because a rounding may fall either way
            assert (part - (frame + 1) * 127.5).abs().max() <= 1


# Prompts


def test_prompts_are_read_from_a_file_after_those_of_the_command(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog  \r\n", encoding="utf-8")
    call(sample.main, run, "a cow", "--num-frames", 1, "--prompts-file", tmp_path / "prompts.txt")
    names = ["a-cow.png", "a-cat.png", "a-dog.png"]  # by default in samples/ of the run
    assert capsys.readouterr().out.split() == [str(run / "samples" / name) for name in names]


def test_a_prompt_that_is_cut_is_named_with_the_words_left_out(run, tmp_path, capsys):
    words = "--num-frames", 1, "--num-steps", 1, "--output", tmp_path / "a.png"
    call(sample.main, run, "a red circle moving left", *words)
    assert not capsys.readouterr().err.count("tokens")
    call(sample.main, run, "a cat", "--negative-prompt", 15 * "red " + "square", *words)
    assert ("1 of 2 prompts have more than 16 tokens (up to 18), so the model does not see "
            '"red square"\n') in capsys.readouterr().err


# Mistakes


@pytest.mark.parametrize("words, message", [
    ((), "needs a prompt"),
    (("--prompts-file", "empty.txt"), "empty.txt: no prompts in it"),
    (("--prompts-file", "latin.txt"), "latin.txt: not a text file in UTF-8"),
    (("x", "--output", "a.avi"), "a.avi: needs one of the suffixes .gif"),
    (("x", "--output", "a.gif", "--format", "png"), "--format png contradicts --output a.gif"),
    (("x", "--negative-prompt", "y", "--guidance-scale", "1"), "negative_prompt needs guidance"),
    (("x", "--num-steps", "1001"), "num_steps needs to lie in"),
    (("x", "--image-size", "20"), "image_size needs a multiple of 8, got 20"),
    (("x", "--device", "abacus"), "--device abacus: not usable"),
])
def test_a_mistake_is_named_and_writes_nothing(trained, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    before = sorted([*tmp_path.rglob("*"), *trained.rglob("*")])
    with pytest.raises(ValueError, match=message):
        call(sample.main, trained, *words)
    assert sorted([*tmp_path.rglob("*"), *trained.rglob("*")]) == before


def test_compile_compiles_the_unet_with_frozen_weights(trained, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module, **options: compiled.append((type(module).__name__, options)))
    call(sample.main, trained, "a red circle", "--num-frames", 1, "--compile", "--output",
         tmp_path / "x.png")
    assert compiled == [("UNet", {"options": {"freezing": True}, "dynamic": False})]


@pytest.mark.parametrize("command, words", [(sample, ["a red circle"]),
                                            (evaluate, ["--num-prompts", 2])])
def test_the_networks_compute_in_the_precision_asked_for(run, monkeypatch, command, words):
    dtypes, decode = [], Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda pipeline, latents: (
        dtypes.append(next(pipeline.unet.parameters()).dtype) or decode(pipeline, latents)))
    call(command.main, run, *words, "--precision", "bf16")
    assert set(dtypes) == {torch.bfloat16}
