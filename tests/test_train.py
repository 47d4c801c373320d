"""Training: what a batch holds, what a whole run leaves behind and what does not change it."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import SMALL, call, make_clip, metrics_of, train_small, weights_of
from PIL import Image
from torch import nn

import train
import vae
from files import read_json, write_json
from media.write import write_clip
from options import STAGES, TrainOptions
from shapes import MovingShapes
from shift import temporal_shift
from weights import load_pipeline, load_unet


# Frame f of clip i holds 100 i + f, so a batch shows where it comes from.
LATENTS = [torch.arange(9.0)[:, None, None, None].expand(9, 4, 2, 2) + 100 * i for i in range(3)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_batch_has_successive_frames_and_their_caption():
    x0, texts = train.random_clips(LATENTS, ["zero", "one", "two"], 200, 5, generator())
    first = x0[:, 0, 0, 0, 0]
    assert torch.equal(x0[:, :, 0, 0, 0], first[:, None] + torch.arange(5))
    assert texts == [("zero", "one", "two")[int(value // 100)] for value in first]
    assert set((first % 100).tolist()) == {0, 1, 2, 3, 4}  # all windows that fit into 9 frames


def test_captions_are_left_out_as_often_as_asked_for():
    texts = train.drop_captions(["a"] * 5000, 0.2, generator())
    assert set(texts) == {"", "a"} and texts.count("") / 5000 == pytest.approx(0.2, abs=0.02)
    assert train.drop_captions(["a", "b"], 0.0, generator()) == ["a", "b"]


@pytest.mark.parametrize("prefer", [0.0, 1.5, 3.0])
def test_timesteps_have_the_mean_of_their_density(prefer):
    timesteps = train.random_timesteps(9000, 1000, generator(), prefer)
    # The mean of u^(1 / (1 + p)), u uniform in [0, 1], is (1 + p) / (2 + p).
    mean = 1000 * (1 + prefer) / (2 + prefer) - 0.5
    assert timesteps.float().mean().item() == pytest.approx(mean, abs=15)
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and timesteps.dtype == torch.int64


def test_timesteps_are_uniform_unless_noise_is_preferred():
    uniform = torch.rand(900, generator=generator()) * 1000
    assert torch.equal(train.random_timesteps(900, 1000, generator()), uniform.long())


def test_the_largest_random_number_gives_the_last_timestep(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 1 - 2**-24))
    assert train.random_timesteps(2, 1000, None, 3.0).tolist() == [999, 999]  # and not 1000


@pytest.fixture
def batches(run, monkeypatch):
    """Train a stage anew with the options given; returns the batches that its loss gets."""

    def train_on(stage="video", **options):
        seen = []
        monkeypatch.setattr(  # the U-Net, which would take its time, is not asked
            train, "denoising_loss",
            lambda *batch: seen.append(batch[2:]) or torch.zeros((), requires_grad=True),
        )
        record = read_json(run / "train.json")
        write_json(run / "train.json", {"options": record["options"] | options,
                                        "finished": STAGES[: STAGES.index(stage)]})
        call(train.main, run, "--stage", stage)
        return seen

    return train_on


def test_the_image_stage_sees_single_frames(batches):
    assert {tuple(x0.shape[:2]) for x0, *_ in batches("image")} == {(4, 1)}


def test_some_steps_of_the_video_stage_see_as_many_images(batches):
    seen = batches(image_every=3, video_steps=6)
    assert [tuple(x0.shape[:2]) for x0, *_ in seen] == [(2, 3), (2, 3), (6, 1)] * 2


def test_without_image_every_all_steps_see_clips(batches):
    assert {tuple(x0.shape[:2]) for x0, *_ in batches(image_every=0)} == {(2, 3)}


def test_the_first_half_of_the_video_steps_prefers_noise_less_and_less(batches, monkeypatch):
    preferred, draw = [], train.random_timesteps
    monkeypatch.setattr(train, "random_timesteps", lambda *rest: (
        preferred.append(rest[3]) or draw(*rest)
    ))
    batches(video_steps=8, early_noise=4.0, image_every=3)
    assert preferred == [4.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # the third batch has images


def test_new_layers_have_a_learning_rate_of_their_own(batches, monkeypatch):
    groups, trainer = [], train.Trainer
    monkeypatch.setattr(train, "Trainer", lambda run, stage, given: (
        groups.extend(given) or trainer(run, stage, given)
    ))
    batches(temporal="conv", new_layers_rate=2.5, video_steps=1)
    (old, old_rate), (new, new_rate) = groups
    assert (old_rate, new_rate) == (1.0, 2.5)
    assert len(new) > 0 and {p.shape[2:] for p in new} == {(3, 1), ()}  # kernels over time, biases
    assert (3, 1) not in {p.shape[2:] for p in old}


def test_a_text_dropped_is_the_empty_text(batches, run):
    (empty,) = load_pipeline(run).encode_text([""])
    contexts = torch.cat([context for *_, context in batches(caption_dropout=1.0)])
    assert contexts.ndim == 3 and (contexts - empty).abs().max() < 1e-5


def test_the_image_stage_drops_captions_too(batches):
    contexts = torch.cat([context for *_, context in batches("image", caption_dropout=1.0)])
    assert (contexts - contexts[:1]).abs().max() < 1e-5


def test_the_video_unet_starts_as_the_image_model(batches, run):
    batches(video_steps=1)  # without gradients: what is saved is the beginning
    image, video = (load_unet(run / part).state_dict() for part in ("image_unet", "unet"))
    assert image.keys() == video.keys()
    assert all(torch.equal(value, video[name]) for name, value in image.items())


def test_new_convolutions_can_start_as_the_shift(batches, run):
    batches(temporal="conv", start_as_shift=True, video_steps=1)
    layer = load_unet(run / "unet").down_blocks[0].resnets[0].temporal_after1
    x = torch.randn(1, 3, 32, 2, 2, generator=generator())
    torch.testing.assert_close(layer(x), temporal_shift(x))


# A whole run


def test_training_leaves_a_folder_in_the_layout_of_diffusers(trained):
    assert {file.relative_to(trained).as_posix() for file in trained.rglob("*.*")} == {
        "model_index.json", "sampling.json", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "image_unet/config.json", "image_unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "train.json", "metrics.jsonl", ".lock",
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
    clips = train.open_data(TrainOptions(num_clips=8, num_frames=3, image_size=16))
    latents = torch.cat([vae.encode_clip(autoencoder, clip) for clip, _ in clips])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_stage_after_stage_equals_one_call(trained, tmp_path):
    for stage in STAGES:
        train_small(tmp_path / "run", "--stage", stage)
    assert weights_of(tmp_path / "run") == weights_of(trained)


@pytest.fixture(scope="module")
def previewed(tmp_path_factory):
    """A run of the same options but for those that may differ, with a preview in each stage."""
    path = tmp_path_factory.mktemp("previewed") / "run"
    train_small(path, log_every=3, save_every=1, preview_every=3)
    return path


def test_free_options_and_previews_do_not_touch_the_result(trained, previewed):
    assert weights_of(previewed) == weights_of(trained)
    names = {f"{stage}-000003" for stage in STAGES}
    assert {file.stem for file in (previewed / "previews").iterdir()} == names


def test_a_preview_of_the_autoencoder_has_eight_frames_above_their_reconstructions(previewed):
    with Image.open(previewed / "previews/vae-000003.png") as image:
        rows = np.array(image)  # H W 3
    assert rows.shape == (2 * 16 + 2, 8 * 16 + 7 * 2, 3)
    frames = torch.cat([clip for clip, _ in MovingShapes(8, 3, 16)])  # 24
    for column, i in enumerate((0, 3, 6, 9, 13, 16, 19, 23)):  # i: 23 / 7 of the column, cut off
        shown = rows[:16, 18 * column : 18 * column + 16]
        assert np.array_equal(shown, frames[i].permute(1, 2, 0))


def test_a_preview_of_the_image_stage_is_one_frame_for_each_of_eight_captions(previewed):
    with Image.open(previewed / "previews/image-000003.png") as image:
        assert image.size == (3 * 16 + 2 * 2, 3 * 16 + 2 * 2)


def test_only_the_text_encoder_learns_at_a_rate_of_its_own(trained):
    parts = {stage: [group["part"] for group in torch.load(
        trained.parent / f"states/{stage}-4.pt")["optimizer"]["param_groups"]] for stage in STAGES}
    assert parts == {"vae": [1.0], "image": [1.0, TrainOptions().text_rate], "video": [1.0]}


def test_gradient_checkpointing_does_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", "--gradient-checkpointing")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_another_seed_gives_another_model(trained, tmp_path):
    train_small(tmp_path / "run", seed=1)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(trained)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert ours[name] != theirs[name]


def test_every_clip_is_encoded_once_for_its_scale_and_once_for_both_later_stages(
        tmp_path, monkeypatch):
    calls, encode_clip = [], vae.encode_clip
    monkeypatch.setattr(vae, "encode_clip", lambda *a: calls.append(1) or encode_clip(*a))
    train_small(tmp_path / "run")
    assert len(calls) == 2 * SMALL["num_clips"]


@pytest.mark.parametrize("frames, texts", [(12, 3), (2, 1)])
def test_scales_are_measured_on_a_bounded_part_of_the_data(tmp_path, monkeypatch, frames, texts):
    measured, tokenized = [], []
    monkeypatch.setattr(train, "FRAMES", frames)
    monkeypatch.setattr(train, "TEXTS", texts)
    monkeypatch.setattr(vae, "standardise", lambda _, latents: measured.append(latents))
    monkeypatch.setattr(train.text, "standardise", lambda _, ids: tokenized.append(ids))
    train_small(tmp_path / "run")
    # 8 clips of 3 frames, 9 texts: every second or twelfth clip, every third or ninth text.
    assert len(measured[0]) == (12 if frames == 12 else 3)
    assert len(tokenized[0]) == texts


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
    make_clip(tmp_path / "clips/dog/a.gif")
    with pytest.raises(ValueError, match="frame_rate needs > 0, .* got 0.0 and 1"):
        train_small(tmp_path / "run", data=tmp_path / "clips", frame_rate=0)
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


def test_every_setting_of_samples_gets_into_the_run(run):
    chosen = {"frames_per_second": 12.0, "num_steps": 7, "guidance_scale": 3.0,
              "guidance_max_snr": 2.0, "timestep_power": 0.9}
    record = read_json(run / "train.json")
    assert all(record["options"][name] != value for name, value in chosen.items())
    write_json(run / "train.json", record | {"options": record["options"] | chosen,
                                             "finished": ["vae", "image"]})
    call(train.main, run)
    assert read_json(run / "sampling.json") == chosen | {
        "num_frames": 3, "image_size": 16, "sampler": "ddim", "eta": 0.0}


def test_after_the_image_stage_a_run_draws_images(run):
    record = read_json(run / "train.json")
    write_json(run / "train.json", record | {"finished": ["vae"]})
    call(train.main, run, "--stage", "image")
    assert read_json(run / "sampling.json")["num_frames"] == 1


def test_with_compile_every_network_that_learns_is_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile",
                        lambda module, **options: compiled.append((type(module).__name__, options)))
    train_small(tmp_path / "run", "--compile", vae_steps=1, image_steps=1, video_steps=1)
    names = ["AutoencoderKL", "UNet", "CLIPTextModel", "UNet"]
    assert compiled == [(name, {"dynamic": False}) for name in names]
