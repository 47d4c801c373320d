"""Stable Diffusion in use: pictures from a single file, and training on clips that starts there."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL, call, change, flags, make_clip, train_quickly, train_small
from PIL import Image
from recorded.rule import checkpoint

import sample
from checkpoints.safetensors_file import load_safetensors, save_safetensors
from checkpoints.tokenizers import save_tokenizer
from checkpoints.weights import load_pipeline
from support.files import read_json, write_json
from tokenizer import CLIPTokenizer
from training.options import TrainOptions, read_record

RECORDED = json.loads((Path(__file__).parent / "recorded" / "single_files.json").read_text())
ONLY_VIDEO = {name: value for name, value in SMALL.items() if name[:4] not in ("vae_", "imag")}
ONLY_VIDEO |= {"image_size": 16, "video_steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small single file of Stable Diffusion 1, one of 2, and a merges file."""
    path = tmp_path_factory.mktemp("files")
    words = ["a red circle", "a blue square", "a green triangle", "moving left", "moving right"]
    save_tokenizer(path / "tokenizer", CLIPTokenizer.train(words, 20, max_length=12))
    for family in ("sd1", "sd2"):
        save_safetensors(path / f"{family}.safetensors", checkpoint(RECORDED[family]["shapes"]))
    shutil.move(path / "tokenizer" / "merges.txt", path / "merges.txt")
    return path


def start(run, files, *arguments, family="sd1", **options):
    options = ONLY_VIDEO | options
    if options["data"] != "shapes":
        del options["num_clips"]
    words = flags(**options)
    path, merges = files / f"{family}.safetensors", files / "merges.txt"
    train_quickly(run, "--init", path, "--merges", merges, *words, *arguments)


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """A run that began as a single file. Not to be written into."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    start(path, files)
    return path


def tensors_of(folder):
    (path,) = folder.glob("*.safetensors")
    return load_safetensors(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Training


def test_only_the_unet_is_trained_and_its_beginning_is_kept(tuned, files):
    before = load_pipeline(files / "sd1.safetensors")
    for part, folder in (("vae", "vae"), ("text_encoder", "text_encoder"), ("unet", "image_unet")):
        assert equal(tensors_of(tuned / folder), getattr(before, part).state_dict()), folder
    after = tensors_of(tuned / "unet")
    assert after.keys() == before.unet.state_dict().keys()
    assert not equal(after, before.unet.state_dict())


def test_the_run_draws_clips_with_the_shift_and_the_schedule_of_its_beginning(tuned, files):
    pipeline = load_pipeline(tuned)
    assert pipeline.unet.config.temporal == "shift" and pipeline.sampling.num_frames == 3
    assert pipeline.diffusion == load_pipeline(files / "sd1.safetensors").diffusion


def test_a_schedule_that_is_asked_for_is_trained_and_written(files, tmp_path):
    start(tmp_path / "run", files, "--prediction-type", "v_prediction", "--zero-terminal-snr",
          video_steps=1)
    diffusion = load_pipeline(tmp_path / "run").diffusion
    assert diffusion.prediction_type == "v_prediction" and diffusion.alpha_bar(999) == 0
    assert diffusion.timestep_spacing == "trailing"


def test_pure_noise_is_left_out_for_a_unet_that_predicts_the_noise(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "v")
    change(tmp_path / "v/scheduler/scheduler_config.json", prediction_type="v_prediction",
           rescale_betas_zero_snr=True)
    train_quickly(tmp_path / "run", "--init", tmp_path / "v", "--prediction-type", "epsilon",
                  "--no-zero-terminal-snr")
    assert load_pipeline(tmp_path / "run").diffusion == load_pipeline(tuned).diffusion


@pytest.mark.parametrize("folder", [False, True], ids=["shapes", "a folder"])
@pytest.mark.parametrize("adopting", [False, True], ids=["new", "--init"])
def test_every_option_is_used_or_refused(files, tmp_path, monkeypatch, folder, adopting):
    used, get = set(), object.__getattribute__

    def spy(self, name):
        file = Path(sys._getframe(1).f_code.co_filename).name
        if file not in ("dataclasses.py", "cli.py"):  # these read all options
            used.add(name)
        return get(self, name)

    monkeypatch.setattr(TrainOptions, "__getattribute__", spy, raising=False)
    make_clip(tmp_path / "clips/1.gif")
    (tmp_path / "clips/1.txt").write_text("a dog")
    data = {"data": tmp_path / "clips" if folder else "shapes", "temporal": "conv"}
    if adopting:
        start(tmp_path / "run", files, **data)
    else:
        train_small(tmp_path / "run", **data)
    options = read_record(tmp_path / "run")[0]
    assert {field.name for field in dataclasses.fields(options)} <= used | {*options.unused()}


@pytest.mark.parametrize("temporal", ["attention", "joint", "directed", "conv", "shift", "none"])
def test_a_run_is_trained_further_with_its_own_layers(files, tmp_path, temporal):
    start(tmp_path / "run", files, temporal=temporal)
    train_quickly(tmp_path / "more", "--init", tmp_path / "run", "--video-learning-rate", 0)
    before, after = (tensors_of(tmp_path / name / "unet") for name in ("run", "more"))
    assert equal(before, after)
    if temporal == "attention":  # another variant leaves them out
        train_quickly(tmp_path / "conv", "--init", tmp_path / "run", "--temporal", "conv")
        assert not any("temporal.0" in name for name in tensors_of(tmp_path / "conv/unet"))


def test_more_frames_than_a_run_has_parameters_for_are_refused_before_anything(files, tmp_path):
    start(tmp_path / "run", files, temporal="attention")
    with pytest.raises(ValueError, match="--num-frames 4: .*run has parameters for 3 frames"):
        train_quickly(tmp_path / "more", "--init", tmp_path / "run", "--num-frames", 4)
    train_quickly(tmp_path / "more", "--init", tmp_path / "run", "--num-frames", 2)


def test_another_run_can_be_the_beginning(trained, tmp_path):
    train_quickly(tmp_path / "run", "--init", trained)
    assert equal(tensors_of(tmp_path / "run/image_unet"), tensors_of(trained / "unet"))
    assert load_pipeline(tmp_path / "run").diffusion == load_pipeline(trained).diffusion


def test_a_stopped_run_goes_on_with_its_own_files(tuned, files, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    record = read_json(run / "train.json")
    assert record["finished"] == ["vae", "image", "video"]
    write_json(run / "train.json", record | {"finished": ["vae", "image"]})
    (files / "sd1.safetensors").rename(files / "away")  # it is not needed any more
    try:
        start(run, files)
    finally:
        (files / "away").rename(files / "sd1.safetensors")
    assert equal(tensors_of(run / "unet"), tensors_of(tuned / "unet"))


# Refusals


def test_a_beginning_without_a_tokenizer_is_refused_before_training(files, tmp_path):
    with pytest.raises(ValueError, match="name a merges file"):
        train_quickly(tmp_path / "run", "--init", files / "sd1.safetensors", *flags(**ONLY_VIDEO))


def test_a_beginning_that_holds_nan_is_refused_before_training(files, tmp_path):
    tensors, name = load_safetensors(files / "sd1.safetensors"), "first_stage_model.quant_conv.bias"
    save_safetensors(tmp_path / "x", tensors | {name: tensors[name] * torch.nan})
    with pytest.raises(ValueError, match=f"holds NaN or infinity in {name};"):
        train_quickly(tmp_path / "run", "--init", tmp_path / "x", *flags(**ONLY_VIDEO))


def test_after_a_beginning_that_was_none_another_can_be_named(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        start(tmp_path / "run", files, family="sd3")
    start(tmp_path / "run", files, "--prediction-type", "epsilon", family="sd2", video_steps=1)
    assert read_json(tmp_path / "run/train.json")["finished"] == ["vae", "image", "video"]
    assert load_pipeline(tmp_path / "run").diffusion.prediction_type == "epsilon"


def test_a_size_that_does_not_suit_the_model_is_refused_before_training(files, tmp_path):
    with pytest.raises(ValueError, match="--image-size needs a multiple of 8, got 20"):
        start(tmp_path / "run", files, image_size=20)
    assert not (tmp_path / "run/unet").exists()


# Sampling


def test_a_checkpoint_draws_images_and_clips_into_samples_here(
        files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for family, frames in (("sd1", []), ("sd2", ["--num-frames", 3])):
        words = ["--merges", files / "merges.txt", "--num-steps", 1, "--image-size", 16, *frames]
        call(sample.main, files / f"{family}.safetensors", "a cat", *words)
    out, errors = capsys.readouterr()
    assert out == "samples/a-cat.png\nsamples/a-cat.gif\n"
    assert Image.open("samples/a-cat.png").size == (128, 128)
    assert Image.open("samples/a-cat.gif").n_frames == 3
    assert errors.count("--prediction-type epsilon") == 1  # the note on Stable Diffusion 2
