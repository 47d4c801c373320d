"""Training: what a batch holds, what a whole run leaves behind and what does not change it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, call, metrics_of, train_small, weights_of

import train
import vae
from media.write import write_clip
from options import STAGES, TrainOptions
from weights import load_pipeline


def fake_run(**options):
    return SimpleNamespace(options=TrainOptions(**options), to_device=lambda *tensors: tensors)


CAPTIONS = ["zero", "one", "two"]
TEXTS = {"": torch.tensor([-1]), **{name: torch.tensor([i]) for i, name in enumerate(CAPTIONS)}}
# Frame f of clip i holds 100 i + f, so a batch shows where it comes from.
LATENTS = [torch.arange(9.0)[:, None, None, None].expand(9, 4, 2, 2) + 100 * i for i in range(3)]


def batches(stage, **options):
    return train.denoising_batches(fake_run(**options), stage, LATENTS, CAPTIONS, TEXTS, 1000)


def test_a_batch_has_successive_frames_and_their_caption():
    make_batch = batches("video", video_batch_size=200, num_frames=5, caption_dropout=0.0)
    x0, _, _, context = make_batch(0, 0)
    first = x0[:, 0, 0, 0, 0]
    assert torch.equal(x0[:, :, 0, 0, 0], first[:, None] + torch.arange(5))
    assert torch.equal((first // 100).long(), context[:, 0])
    assert set((first % 100).tolist()) == {0, 1, 2, 3, 4}  # all windows that fit into 9 frames


def test_captions_are_left_out_as_often_as_asked_for():
    make_batch = batches("image", image_batch_size=5000, caption_dropout=0.2)
    x0, _, _, context = make_batch(0, 0)
    dropped = context[:, 0] == -1
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal((x0[~dropped, 0, 0, 0, 0] // 100).long(), context[~dropped, 0])


def test_frames_of_a_clip_share_the_part_of_the_noise_asked_for():
    _, noise, _, _ = batches("video", video_batch_size=2000, num_frames=3, shared_noise=0.3)(0, 0)
    a, b = noise[:, 0].flatten(), noise[:, 2].flatten()
    assert ((a * b).mean().item(), a.var().item()) == pytest.approx((0.3, 1.0), abs=0.05)


def test_some_steps_of_the_video_stage_see_as_many_pictures():
    make_batch = batches("video", video_batch_size=2, num_frames=5, image_every=3)
    shapes = [tuple(make_batch(step, 0)[0].shape[:2]) for step in range(6)]
    assert shapes == [(2, 5), (2, 5), (10, 1)] * 2


def test_without_image_every_all_steps_see_clips():
    make_batch = batches("video", video_batch_size=2, num_frames=5, image_every=0)
    assert {tuple(make_batch(step, 0)[0].shape[:2]) for step in range(20)} == {(2, 5)}


@pytest.mark.parametrize("step, prefer", [(0, 3.0), (25, 1.5), (50, 0.0), (90, 0.0)])
def test_early_steps_prefer_noisy_timesteps(step, prefer):
    make_batch = batches("video", video_batch_size=9000, num_frames=2, video_steps=100,
                         early_noise=3.0, image_every=0)
    timesteps = make_batch(step, 0)[2]
    # The mean of u^(1 / (1 + p)), u uniform in [0, 1], is (1 + p) / (2 + p).
    mean = 1000 * (1 + prefer) / (2 + prefer) - 0.5
    assert timesteps.float().mean().item() == pytest.approx(mean, abs=15)
    assert timesteps.min() >= 0 and timesteps.max() <= 999


# A whole run


def test_training_leaves_a_folder_in_the_layout_of_diffusers(trained):
    assert {file.relative_to(trained).as_posix() for file in trained.rglob("*.*")} == {
        "model_index.json", "sampling.json", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "image_unet/config.json", "image_unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "train.json", "metrics.jsonl",
    }


def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = weights_of(run)
    call(train.main, run)
    assert capsys.readouterr().out == f"{run}: all stages are finished\n"
    assert weights_of(run) == before


def test_metrics_have_a_line_for_each_interval_of_each_stage(trained):
    steps = [(entry["stage"], entry["step"]) for entry in metrics_of(trained)]
    assert steps == [(stage, step) for stage in STAGES for step in (2, 4)]


def test_training_changes_every_weight_of_every_network(trained):
    for stage in STAGES:
        early, late = (torch.load(trained.parent / f"states/{stage}-{s}.pt") for s in (2, 4))
        for a, b in zip(early["parameters"], late["parameters"], strict=True):
            assert not torch.equal(a, b)


def test_the_video_stage_leaves_the_text_encoder_alone(trained):
    state = torch.load(trained.parent / "states/video-4.pt")
    assert len(state["parameters"]) == len(list(load_pipeline(trained).unet.parameters()))


def test_latents_of_the_training_clips_have_mean_zero_and_unit_variance(trained):
    autoencoder = load_pipeline(trained).vae
    clips, _ = train.open_data(TrainOptions(num_clips=8, num_frames=3, image_size=16))
    latents = torch.cat([vae.encode_clip(autoencoder, clip) for clip in clips])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_stage_after_stage_equals_one_call(trained, tmp_path):
    for stage in STAGES:
        train_small(tmp_path / "run", "--stage", stage)
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_free_options_and_previews_do_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", log_every=3, save_every=1, preview_every=1)
    assert weights_of(tmp_path / "run") == weights_of(trained)
    names = {f"{stage}-00000{step}" for stage in STAGES for step in (1, 2, 3)}
    assert {file.stem for file in (tmp_path / "run/previews").iterdir()} == names


def test_gradient_checkpointing_does_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", "--gradient-checkpointing")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_another_seed_gives_another_model(trained, tmp_path):
    train_small(tmp_path / "run", seed=1)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(trained)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert ours[name] != theirs[name]


def test_every_clip_is_encoded_once_in_each_stage(tmp_path, monkeypatch):
    calls, encode_clip = [], vae.encode_clip
    monkeypatch.setattr(vae, "encode_clip", lambda *a: calls.append(1) or encode_clip(*a))
    train_small(tmp_path / "run")
    assert len(calls) == len(STAGES) * SMALL["num_clips"]


def test_a_folder_of_clips_is_trained_on(tmp_path):
    for i, name in enumerate(("a dog", "a cat", "a dog again")):
        clip = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 20, 24) * (i + 1) / 3
        write_clip(tmp_path / f"clips/{i}.gif", clip, 10)
        (tmp_path / f"clips/{i}.txt").write_text(name)
    train_small(tmp_path / "run", data=tmp_path / "clips")
    pipeline = load_pipeline(tmp_path / "run")
    ids = pipeline.tokenizer(["a dog again"])[0]
    assert len(ids[ids != pipeline.tokenizer.pad_id]) <= 5  # its words have become tokens
    *_, latents = pipeline.sample(["a dog"], [0])
    assert pipeline.decode(latents).shape == (1, 3, 3, 16, 16)


# The command


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        train_small(tmp_path / "run", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_what_its_options_say(run):
    with pytest.raises(ValueError, match="--image-size 16, not 32"):
        call(train.main, run, "--image-size", 32)


def test_every_option_has_a_help_text_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        call(train.main, "--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainOptions):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
