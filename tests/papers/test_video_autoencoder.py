"""The commands, with runs of seconds: train, stop, resume, compare, sample, evaluate, refusals."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import SMALL, call, flags, metrics_of, weights_of

import devices
import vae
from media.read import read_clip
from papers.autoencoder_3d import load_autoencoder
from papers.video_autoencoder import (
    VideoOptions,
    VideoRun,
    load_model,
    main,
)
from run import open_data, read_record
from train import random_clips
from trainer import Trainer
from vae import encode_clip
from weights import save_network

TINY = SMALL | {"num_frames": 4, "time_factor": 2, "vae_batch_size": 2}


def train(path, *arguments, **options):
    call(main, "train", path, *flags(**TINY | options), *arguments)


@pytest.fixture(scope="module")
def lvdm(trained, tmp_path_factory):
    """A run of all stages from an inflated autoencoder, not to be written into."""
    path = tmp_path_factory.mktemp("lvdm") / "run"
    train(path, init=trained)
    return path


def test_a_run_has_a_3d_autoencoder_and_a_unet_for_its_latents(lvdm):
    model = load_model(lvdm)
    assert model.vae.config.time_factor == 2
    assert model.unet.config.temporal == "shift" and model.sampling.num_frames == 4
    assert [entry["step"] for entry in metrics_of(lvdm) if entry["stage"] == "vae"] == [2, 4]
    assert not (lvdm / "training_state.pt").exists()


def test_its_latents_are_standardised_on_the_training_clips(lvdm):
    autoencoder, (options, _) = load_autoencoder(lvdm / "vae"), read_record(lvdm, VideoRun)
    latents = torch.cat([encode_clip(autoencoder, clip) for clip, _ in open_data(options)])
    assert latents.shape == (16, 4, 4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_training_that_was_stopped_goes_on_bit_for_bit(lvdm, trained, tmp_path, monkeypatch):
    save = Trainer.save_state

    def stop(self):
        save(self)
        raise KeyboardInterrupt

    for arguments in ((), ("--resume",)):  # in the vae stage, then in the image stage
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "save_state", stop)
            train(tmp_path / "run", *arguments, init=trained)
    train(tmp_path / "run", "--resume", init=trained)
    mine, other = weights_of(tmp_path / "run"), weights_of(lvdm)
    for part in ("vae", "unet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert mine[name] == other[name]


def test_a_3d_autoencoder_is_kept_as_it_is(lvdm, tmp_path):
    train(tmp_path / "run", "--stage", "vae", init=lvdm)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / "vae" / name).read_bytes() == (lvdm / "vae" / name).read_bytes()
    with pytest.raises(ValueError, match="latent_channels 4, the options say 3"):
        train(tmp_path / "other", "--stage", "vae", init=lvdm, latent_channels=3)


def test_it_trains_from_nothing_with_more_channels_and_attention(tmp_path):
    train(tmp_path / "run", latent_channels=6, temporal="attention")
    unet = load_model(tmp_path / "run").unet
    assert unet.config.in_channels == unet.config.out_channels == 6
    assert any("temporal" in name for name in unet.state_dict())


def test_the_first_steps_may_see_more_and_shorter_clips(tmp_path, monkeypatch):
    real, sizes = random_clips, []

    def record(clips, captions, b, t, generator):
        sizes.append((b, t))
        return real(clips, captions, b, t, generator)

    monkeypatch.setattr("train.random_clips", record)
    train(tmp_path / "run", "--stage", "vae", short_part=0.5)
    assert sizes == [(4, 2), (4, 2), (2, 4), (2, 4)]


def test_other_options_need_another_folder(lvdm, trained):
    with pytest.raises(ValueError, match="was trained with --latent-channels 4, not 8"):
        train(lvdm, init=trained, latent_channels=8)


def test_an_autoencoder_that_does_not_fit_is_refused_before_it_is_trained(trained, tmp_path):
    config = dataclasses.replace(vae.PRESETS["tiny"], block_out_channels=(16, 32, 32, 32))
    save_network(tmp_path / "vae", vae.AutoencoderKL(config))  # 8 pixels a latent, not 4
    with pytest.raises(ValueError, match="its autoencoder has downscale 8, the options say 4"):
        train(tmp_path / "run", init=tmp_path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_image_stage_does_not_train_the_autoencoder_and_may_get_new_steps(lvdm, monkeypatch):
    seen = []
    monkeypatch.setattr("train.train_image", lambda run, autoencoder, *_: seen.append(
        [x.requires_grad for x in autoencoder.parameters()]))
    run = shutil.copytree(lvdm, lvdm.with_name("image"))
    record = json.loads((run / "video_autoencoder.json").read_text())
    (run / "video_autoencoder.json").write_text(json.dumps(record | {"finished": ["vae"]}))
    call(main, "train", run, "--stage", "image", "--image-steps", 7)
    assert not any(seen[0])


def test_frames_that_the_time_factor_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="--num-frames needs a multiple of --time-factor 4, got 6"):
        VideoOptions(num_frames=6)


@pytest.mark.parametrize("options, message", [
    ({"init": "run", "image_size": 34}, "--image-size needs a multiple of 8, got 34"),
    ({"init": "run", "num_steps": 2000}, "num_steps needs"),
    ({"merges": "merges.txt"}, "--merges is of no use here"),
])
def test_options_that_a_later_stage_would_refuse_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**options)


def test_the_video_stage_starts_from_an_image_unet_in_float32(lvdm, monkeypatch):
    models = []
    monkeypatch.setattr(devices, "uses_bf16", lambda device, choice="auto": choice != "fp32")
    monkeypatch.setattr("train.train_video", lambda run, model, *_: models.append(model))
    run = shutil.copytree(lvdm, lvdm.with_name("copy"))
    record = json.loads((run / "video_autoencoder.json").read_text())
    record["finished"].remove("video")
    (run / "video_autoencoder.json").write_text(json.dumps(record))
    call(main, "train", run, "--stage", "video", "--precision", "fp32")
    call(main, "train", run, "--stage", "video", "--precision", "auto")
    kinds = [(next(part.parameters()).dtype) for model in models
             for part in (model.unet, model.text_encoder, model.vae)]
    assert kinds == 4 * [torch.float32] + 2 * [torch.bfloat16]


# Sampling


def test_half_as_many_latent_frames_are_drawn_as_frames(lvdm):
    model = load_model(lvdm)
    *_, latents = model.sample(["a red circle moving left"], [0])
    assert latents.shape == (1, 2, 4, 4, 4)
    assert model.decode(latents).shape == (1, 4, 3, 16, 16)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_clip_has_as_many_frames_as_asked_for(lvdm, tmp_path, count):
    call(main, "sample", lvdm, "a red circle", "--num-frames", count, "--output",
         tmp_path / "clip.webp", "--device", "cpu")
    frames, _ = read_clip(tmp_path / "clip.webp")
    assert len(frames) == count


def test_evaluation_writes_agreement(lvdm, tmp_path, capsys):
    run = shutil.copytree(lvdm, tmp_path / "run")
    call(main, "evaluate", run, "--num-prompts", 4, "--device", "cpu")
    rows = json.loads((run / "evaluation.json").read_text())["agreement"]
    assert [rows[name]["count"] for name in ("seen", "held out", "all")] == [2, 2, 4]
    assert "CPU seconds a clip" in capsys.readouterr().out


# Comparison


def test_compare_measures_2d_and_3d_autoencoders(trained, lvdm, tmp_path, capsys):
    call(main, "compare", trained, trained / "vae", lvdm, "--num-clips", 3, "--num-frames", 5,
         "--image-size", 16, "--sheet", tmp_path / "sheet.png")
    title, *rows = capsys.readouterr().out.splitlines()
    own, same, other = [row.split()[1:] for row in rows]
    assert own == same and [int(own[0]), int(other[0])] == [5 * 64, 3 * 64]
    sheet, _ = read_clip(tmp_path / "sheet.png")
    assert sheet.shape[1:3] == (7 * 18 - 2, 5 * 18 - 2)  # true, two of each; gaps of 2 pixels


@pytest.mark.parametrize("arguments, message", [
    (("compare", "RUN", "--num-clips", 1), "--num-clips needs to lie in .2, .*, got 1"),
    (("compare", "RUN", "--num-frames", 1), "--num-frames needs to lie in .2, .*, got 1"),
    (("sample", "RUN", "x", "--num-frames", 0), "--num-frames needs to lie in .1, .*, got 0"),
    (("sample", "RUN", "x", "--output", "x.avi"), "needs one of the suffixes"),
])
def test_impossible_flags_are_refused(lvdm, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(main, *(lvdm if word == "RUN" else word for word in arguments))


def test_a_2d_run_is_no_model_to_sample_from(trained, tmp_path):
    with pytest.raises(ValueError, match="does not fit its config|not built here"):
        call(main, "sample", trained, "x", "--output", tmp_path / "x.gif")


def test_a_model_of_other_data_is_not_evaluated(lvdm, tmp_path):
    run = shutil.copytree(lvdm, tmp_path / "run")
    record = json.loads((run / "video_autoencoder.json").read_text())
    record["options"]["data"] = "my_clips"
    (run / "video_autoencoder.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="only of MovingShapes"):
        call(main, "evaluate", run)
