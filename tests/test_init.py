"""Stable Diffusion in use: pictures from a single file, and training on clips that starts there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, call, flags, train_small
from PIL import Image
from recorded.rule import checkpoint

import sample
import train
from files import load_safetensors, read_json, save_safetensors
from checkpoints.tokenizers import save_tokenizer
from run import merge_options
from tokenizer import CLIPTokenizer
from weights import load_pipeline

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
    words = flags(**ONLY_VIDEO | options)
    path, merges = files / f"{family}.safetensors", files / "merges.txt"
    call(train.main, run, "--init", path, "--merges", merges, *words, *arguments)


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


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_autoencoder_and_text_encoder_stay_what_they_were(tuned, files, part):
    before = getattr(load_pipeline(files / "sd1.safetensors"), part).state_dict()
    assert equal(tensors_of(tuned / part), before)


def test_the_unet_is_trained_and_its_beginning_kept(tuned, files):
    before = load_pipeline(files / "sd1.safetensors").unet.state_dict()
    assert equal(tensors_of(tuned / "image_unet"), before)
    after = tensors_of(tuned / "unet")
    assert after.keys() == before.keys() and not equal(after, before)


def test_the_run_draws_clips_with_the_shift_and_the_schedule_of_its_beginning(tuned, files):
    pipeline = load_pipeline(tuned)
    assert pipeline.unet.config.temporal == "shift" and pipeline.sampling.num_frames == 3
    assert pipeline.diffusion == load_pipeline(files / "sd1.safetensors").diffusion


@pytest.mark.parametrize("given, expected", [
    ([], "v_prediction"), (["--prediction-type", "epsilon"], "epsilon"),
])
def test_stable_diffusion_2_predicts_what_the_flag_says(tmp_path, files, given, expected, capsys):
    start(tmp_path / "run", files, *given, family="sd2", video_steps=1)
    assert load_pipeline(tmp_path / "run").diffusion.prediction_type == expected
    assumed = "v_prediction, which no file of Stable Diffusion 2 says" in capsys.readouterr().err
    assert assumed == (not given)


@pytest.mark.parametrize("options, message", [
    ({"frames_per_second": 60}, "frames_per_second needs"), ({"shift_fold": 1}, "shift_fold"),
    ({"num_steps": 2000}, "num_steps needs to lie in"),
])
def test_what_a_later_stage_would_refuse_is_refused_at_once(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_small(tmp_path / "run", "--init", trained, **options)
    assert not (tmp_path / "run" / "unet").exists()


def test_another_run_can_be_the_beginning(trained, tmp_path):
    train_small(tmp_path / "run", "--init", trained)
    assert equal(tensors_of(tmp_path / "run/image_unet"), tensors_of(trained / "unet"))
    assert load_pipeline(tmp_path / "run").diffusion == load_pipeline(trained).diffusion


def test_what_starts_from_a_run_has_its_preset(trained, files, tmp_path):
    for init, preset in ((trained, "tiny"), (files / "sd1.safetensors", "sd1")):
        options, finished = merge_options(tmp_path / "run", {"init": str(init)})
        assert (options.preset, options.prediction_type, finished) == (preset, None, [])


def test_a_stopped_run_goes_on_with_its_own_files(tuned, files, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    record = read_json(run / "train.json")
    assert record["finished"] == ["vae", "image", "video"]
    (run / "train.json").write_text(json.dumps(record | {"finished": ["vae", "image"]}))
    (files / "sd1.safetensors").rename(files / "away")  # it is not needed any more
    try:
        start(run, files)
    finally:
        (files / "away").rename(files / "sd1.safetensors")
    assert equal(tensors_of(run / "unet"), tensors_of(tuned / "unet"))


def test_another_beginning_is_refused(tuned, files):
    with pytest.raises(ValueError, match=r"was trained with --init .*sd1.safetensors, not .*sd2"):
        start(tuned, files, family="sd2")


def test_a_beginning_without_a_tokenizer_is_refused_before_training(files, tmp_path):
    with pytest.raises(ValueError, match="name a merges file"):
        path = files / "sd1.safetensors"
        call(train.main, tmp_path / "run", "--init", path, *flags(**ONLY_VIDEO))


def test_after_a_beginning_that_was_none_another_can_be_named(files, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        start(tmp_path / "run", files, family="sd3")
    start(tmp_path / "run", files, video_steps=1)
    assert read_json(tmp_path / "run/train.json")["finished"] == ["vae", "image", "video"]


def test_a_size_that_does_not_suit_the_model_is_refused_before_training(files, tmp_path):
    with pytest.raises(ValueError, match="--image-size needs a multiple of 8, got 20"):
        start(tmp_path / "run", files, image_size=20)


def test_a_checkpoint_draws_an_image_into_samples_here(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(sample.main, files / "sd1.safetensors", "a red circle", "--merges", files / "merges.txt",
         "--num-steps", 1, "--image-size", 16)
    assert capsys.readouterr().out == "samples/a-red-circle.png\n"
    assert Image.open("samples/a-red-circle.png").size == (16, 16)


def test_a_checkpoint_draws_a_clip_when_asked_for(files, tmp_path):
    path = tmp_path / "clip.gif"
    call(sample.main, files / "sd2.safetensors", "a red circle", "--merges", files / "merges.txt",
         "--num-steps", 1, "--image-size", 16, "--num-frames", 3, "--output", path)
    assert Image.open(path).n_frames == 3
