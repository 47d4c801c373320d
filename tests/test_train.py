"""Training: what a batch holds, what a whole run leaves behind and what does not change it."""

import functools

import numpy as np
import pytest
import torch
from helpers import call, make_clip, metrics_of, train_quickly, train_small, weights_of
from PIL import Image

import train
import vae
from checkpoints.weights import load_pipeline, load_unet
from pipeline import Pipeline
from shapes import MovingShapes
from support.files import read_json, write_json
from temporal import temporal_state
from training.options import STAGES, read_record
from training.run import Run

# Frame f of clip i holds 100 i + f, so a batch shows where it comes from.
LATENTS = [torch.arange(9.0)[:, None, None, None].expand(9, 4, 2, 2) + 100 * i for i in range(3)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Batches


def test_a_batch_has_successive_frames_and_their_caption():
    x0, texts = train.random_clips(LATENTS, ["zero", "one", "two"], 200, 5, generator())
    first = x0[:, 0, 0, 0, 0]
    assert torch.equal(x0[:, :, 0, 0, 0], first[:, None] + torch.arange(5))
    assert texts == [("zero", "one", "two")[int(value // 100)] for value in first]
    assert set((first % 100).tolist()) == {0, 1, 2, 3, 4}  # all windows that fit into 9 frames


def test_one_of_several_captions_is_drawn_with_a_clip():
    captions = ["zero", "one", "two", "0", "1", "2"]  # two rounds of a caption per clip
    x0, texts = train.random_clips(LATENTS, captions, 200, 5, generator())
    pairs = {(int(clip[0, 0, 0, 0]) // 100, text) for clip, text in zip(x0, texts, strict=True)}
    assert pairs == {(i % 3, text) for i, text in enumerate(captions)}


@pytest.mark.parametrize("fraction", [0.0, 0.3, train.CAPTION_DROPOUT])
def test_captions_are_left_out_as_often_as_asked_for(fraction):
    texts = train.drop_captions(["a", "b"] * 4000, fraction, generator())
    assert {pair for pair in zip(texts, ["a", "b"] * 4000, strict=True)
            if pair[0] != ""} == {("a", "a"), ("b", "b")}
    expected = 0.1 if fraction == train.CAPTION_DROPOUT else fraction
    assert texts.count("") / 8000 == pytest.approx(expected, abs=0.02)


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


# Stages


@pytest.fixture
def batches(run, monkeypatch):
    """Train a stage again with the options given; returns the batches that its loss gets."""

    def train_on(stage="video", **options):
        seen = []
        for loss in ("denoising_loss", "reconstruction_loss"):  # no network is asked
            monkeypatch.setattr(train, loss, lambda *batch: (
                seen.append(batch[1:]) or torch.zeros((), requires_grad=True)))
        record = read_json(run / "train.json")
        write_json(run / "train.json", {"options": record["options"] | options,
                                        "finished": STAGES[: STAGES.index(stage)]})
        train_quickly(run, "--stage", stage)
        return seen

    return train_on


def test_the_vae_stage_sees_frames_in_minus_one_to_one_and_its_weights(batches):
    seen = batches("vae", motion_weight=4.0, kl_weight=0.5)
    frames = torch.cat([clip for clip, _ in MovingShapes(8, 3, 16)])
    known = {frame.numpy().tobytes() for frame in frames}
    for x, noise, *weights in seen:
        assert x.shape == (4, 3, 16, 16) and noise.shape == (4, 4, 4, 4) and weights == [4.0, 0.5]
        levels = ((x + 1) * 127.5).round().to(torch.uint8)
        assert {frame.numpy().tobytes() for frame in levels} <= known
        assert torch.equal(levels.float() / 127.5 - 1, x)


@pytest.mark.parametrize("stage, every, expected", [
    ("image", 3, [(4, 1)] * 4), ("video", 0, [(2, 3)] * 4), ("video", 2, [(2, 3), (6, 1)] * 2),
])
def test_the_image_stage_and_some_steps_of_the_video_stage_see_images(
        batches, stage, every, expected):
    seen = batches(stage, image_every=every)
    assert [tuple(x0.shape[:2]) for _, x0, *_ in seen] == expected


def test_the_first_half_of_the_video_steps_prefers_noise_less_and_less(batches, monkeypatch):
    preferred, draw = [], train.random_timesteps
    monkeypatch.setattr(train, "random_timesteps", lambda *rest: (
        preferred.append(rest[3]) or draw(*rest)
    ))
    batches(video_steps=8, early_noise=4.0, image_every=3)
    assert preferred == [4.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # the third batch has images


def test_new_layers_have_their_own_learning_rate(batches, run, monkeypatch):
    groups, trainer = [], train.Trainer
    monkeypatch.setattr(train, "Trainer", lambda run, stage, given: (
        groups.extend(given) or trainer(run, stage, given)
    ))
    batches(temporal="conv", new_layers_rate=2.5, video_steps=1)
    (old, old_rate), (new, new_rate) = groups
    assert (old_rate, new_rate) == (1.0, 2.5)
    unet = load_unet(run / "unet")
    state = temporal_state(unet)
    assert {p.shape for p in new} == {p.shape for p in state.values()} and len(new) == len(state)
    assert len(old) == len(list(unet.parameters())) - len(state)


@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_text_left_out_is_the_empty_text(batches, run, monkeypatch, stage):
    monkeypatch.setattr(train, "CAPTION_DROPOUT", 1.0)
    contexts = torch.cat([context for *_, context in batches(stage)])
    assert contexts.ndim == 3 and (contexts - contexts[:1]).abs().max() < 1e-5
    if stage == "video":
        (empty,) = load_pipeline(run).encode_text([""])
        assert (contexts - empty).abs().max() < 1e-5


def test_the_video_unet_starts_as_the_image_model(batches, run):
    batches(video_steps=1)  # without gradients: the beginning is saved
    image, video = (load_unet(run / part).state_dict() for part in ("image_unet", "unet"))
    assert image.keys() == video.keys()
    assert all(torch.equal(value, video[name]) for name, value in image.items())


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


def test_training_changes_every_weight_and_the_text_encoder_at_its_own_rate(trained):
    rates = {"vae": [1.0], "image": [1.0, 0.01], "video": [1.0]}  # and only on images
    for stage in STAGES:
        early, late = (torch.load(trained.parent / f"states/{stage}-{step}.pt") for step in (2, 4))
        pairs = zip(early["parameters"], late["parameters"], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)
        groups = late["optimizer"]["param_groups"]
        assert [group["multiplier"] for group in groups] == rates[stage]


def test_latents_of_the_training_clips_have_mean_zero_and_unit_variance(trained):
    autoencoder = load_pipeline(trained).vae
    latents = torch.cat([vae.encode_clip(autoencoder, clip) for clip, _ in MovingShapes(8, 3, 16)])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_stage_after_stage_equals_one_call(trained, tmp_path):
    for stage, frames in zip(STAGES, (1, 1, 3), strict=True):
        train_small(tmp_path / "run", "--stage", stage)
        if stage != "vae":  # after the image stage a run draws images
            assert read_json(tmp_path / "run/sampling.json")["num_frames"] == frames
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_previews_at_each_quarter_of_a_stage_do_not_touch_the_result(trained, tmp_path):
    train_small(tmp_path / "run", save_every=1, previews=True)
    assert weights_of(tmp_path / "run") == weights_of(trained)
    folder = tmp_path / "run/previews"
    assert {file.name for file in folder.iterdir()} == {
        f"{stage}-00000{step}.{'gif' if stage == 'video' else 'png'}"
        for stage in STAGES for step in (1, 2, 3, 4)} | {"captions.txt"}
    assert (folder / "captions.txt").read_text().splitlines() == [
        *dict.fromkeys(MovingShapes(8, 3, 16).captions)]
    with Image.open(folder / "video-000004.gif") as image:  # of eight captions
        assert image.size == (3 * 128 + 2 * 2, 3 * 128 + 2 * 2) and image.n_frames == 3
    with Image.open(folder / "vae-000003.png") as image:
        rows = np.array(image)  # H W 3: eight frames above their reconstructions, enlarged by 8
    assert rows.shape == (2 * 128 + 2, 8 * 128 + 7 * 2, 3)
    frames = torch.cat([clip for clip, _ in MovingShapes(8, 3, 16)])  # 24
    for column, i in enumerate((0, 3, 6, 9, 13, 16, 19, 23)):  # i: 23 / 7 of the column, cut off
        shown = rows[:128:8, 130 * column : 130 * column + 128 : 8]
        assert np.array_equal(shown, frames[i].permute(1, 2, 0))


def test_only_a_preview_of_latents_is_drawn_in_the_precision_of_training(tmp_path, monkeypatch):
    """Stable Diffusion's autoencoder would overflow in float16, so it has its own."""
    seen = {"sample": [], "decode": []}
    for name, method in [(name, getattr(Pipeline, name)) for name in seen]:
        monkeypatch.setattr(Pipeline, name, lambda *args, name=name, method=method: (
            seen[name].append(torch.is_autocast_enabled("cpu")) or method(*args)))
    layouts, wrap = [], train.Trainer.wrap
    monkeypatch.setattr(train.Trainer, "wrap", lambda trainer, network: (
        layouts.extend(p.is_contiguous() for p in network.parameters()) or wrap(trainer, network)))
    train_small(tmp_path / "run", previews=True, precision="bf16", video_steps=1)
    assert set(seen["sample"]) == {True} and set(seen["decode"]) == {False}
    assert all(layouts)  # a CPU's kernels for bfloat16 prefer that


def test_scales_are_measured_on_a_bounded_part_of_the_data(tmp_path, monkeypatch):
    measured, tokenized = [], []
    monkeypatch.setattr(train, "FRAMES", 12)
    monkeypatch.setattr(train, "TEXTS", 3)
    monkeypatch.setattr(vae, "standardise", lambda _, latents: measured.append(latents))
    monkeypatch.setattr(train.text, "standardise", lambda _, ids: tokenized.append(ids))
    for stage in ("vae", "image"):
        train_small(tmp_path / "run", "--stage", stage)
    # 8 clips of 3 frames, 9 texts: every second frame, every third text
    assert (len(measured[0]), len(tokenized[0])) == (12, 3)


def test_a_folder_of_clips_is_checked_and_trained_on(tmp_path, capsys):
    for name in ("a_dog", "a_cat"):
        make_clip(tmp_path / f"clips/{name}/1.gif")
    assert train_small(tmp_path / "run", "--check", data=tmp_path / "clips") == 0
    assert capsys.readouterr().out.endswith("2 clips, 10 frames, 0 problems\n")
    train_small(tmp_path / "run", data=tmp_path / "clips", max_tokens=4)
    assert "tokens" not in capsys.readouterr().err
    pipeline = load_pipeline(tmp_path / "run")
    ids = pipeline.tokenizer(["a dog"])[0]
    assert (ids != pipeline.tokenizer.pad_id).sum() <= 4  # its words have become tokens
    *_, latents = pipeline.sample(["a dog"], [0])
    assert pipeline.decode(latents).shape == (1, 3, 3, 16, 16)


def test_captions_that_are_cut_are_named_before_images_and_before_clips(tmp_path, capsys):
    make_clip(tmp_path / "clips/a.gif")
    (tmp_path / "clips/a.txt").write_text("a dog at noon")
    train_small(tmp_path / "run", "--stage", "vae", data=tmp_path / "clips", max_tokens=5)
    train_quickly(tmp_path / "run", "--stage", "image")
    line = '1 of 1 captions have more than 5 tokens (up to 6), so the model does not see "noon"'
    assert line in capsys.readouterr().err.splitlines()
    (tmp_path / "clips/a.txt").write_text("a dog at noon at noon")  # edited before the video stage
    train_quickly(tmp_path / "run")
    assert "(up to 8)" in capsys.readouterr().err
    train_small(tmp_path / "other", data=tmp_path / "clips", max_tokens=5)
    assert capsys.readouterr().err.count("(up to 8)") == 1  # once for all stages of a call


# The command


def test_a_check_lists_every_problem_and_trains_nothing(tmp_path, capsys):
    make_clip(tmp_path / "clips/cat/a.gif")
    make_clip(tmp_path / "clips/dog/short.gif", num_frames=2)
    (tmp_path / "clips/dog/b.gif").write_bytes(b"GIF89a")
    assert train_small(tmp_path / "run", "--check", data=tmp_path / "clips") == 1
    out = capsys.readouterr().out
    assert "short.gif: needs 3 frames" in out and "3 clips, 5 frames, 2 problems" in out
    with pytest.raises(ValueError, match="no such folder"):
        train_small(tmp_path / "run", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_previews_show_nine_captions_evenly_spaced_with_the_first_and_the_last(run):
    opened = Run(run, read_record(run)[0], [], resume=False)
    opened.draw_previews("image", load_pipeline(run), [f"{i}" for i in range(20) for _ in "ab"])
    assert (run / "previews/captions.txt").read_text().split() == [
        "0", "2", "4", "7", "9", "11", "14", "16", "19"]


def test_a_start_that_fails_leaves_no_record_and_none_of_its_flags(tmp_path, trained, capsys):
    make_clip(tmp_path / "clips/1.gif")
    (tmp_path / "clips/1.txt").write_text("a dog")
    train = functools.partial(train_quickly, tmp_path / "run", "--data", tmp_path / "clips")
    for init in ([], ["--init", trained]):
        with pytest.raises(ValueError, match="needs 8 frames|needs 3 frames at stride 3, got 2"):
            train(*init, *["--stride", 3][: 2 * len(init)], "--image-size", 16)
        assert not (tmp_path / "run/train.json").exists()
    train("--init", trained, "--video-steps", 1)
    assert read_record(tmp_path / "run")[0].stride == 1
    assert ("clips: 1 clips, 3 frames of 16 x 16; steps: video 1; on cpu in float32\n"
            in capsys.readouterr().out)


def test_another_data_path_is_accepted_only_if_its_clips_are_the_same(tmp_path):
    for name, frames in (("a", 5), ("b", 5), ("c", 4)):
        make_clip(tmp_path / name / "1.gif", num_frames=frames)
        (tmp_path / name / "1.txt").write_text("a dog")
    train_small(tmp_path / "run", "--stage", "vae", data=tmp_path / "a")
    with pytest.raises(ValueError, match="c: has other clips than .*a, on which"):
        train_quickly(tmp_path / "run", "--data", tmp_path / "c")
    train_quickly(tmp_path / "run", "--data", tmp_path / "b", "--stage", "image")
    assert read_record(tmp_path / "run")[0].data == str(tmp_path / "b")


def test_a_flag_that_contradicts_the_run_is_refused_and_not_stored(run):
    before = read_record(run)
    with pytest.raises(ValueError, match="--image-size 16, not 32"):
        call(train.main, run, "--image-size", 32)
    assert read_record(run) == before


# The rehearsal


@pytest.fixture
def rehearsed(run, monkeypatch):
    """Rehearse stages of a run of `finished` ones; `fails(unet)` says whether memory runs out."""

    def rehearse(fails, finished=(), stages=STAGES):
        before, shapes, loss = weights_of(run), [], train.denoising_loss

        def limited(unet, diffusion, x0, *rest):
            shapes.append(tuple(x0.shape))
            if fails(unet):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss(unet, diffusion, x0, *rest)

        monkeypatch.setattr(train, "denoising_loss", limited)
        options, _ = read_record(run)
        opened = Run(run, options, list(finished), resume=False)
        record, metrics = read_json(run / "train.json"), metrics_of(run)
        try:
            train.rehearse(opened, stages, MovingShapes(8, 3, 16).captions)
        finally:  # it leaves no trace
            assert weights_of(run) == before
            assert (read_json(run / "train.json"), metrics_of(run)) == (record, metrics)
        return opened.checkpointing, shapes

    return rehearse


def test_a_rehearsal_makes_two_steps_of_each_stage_at_full_shape(rehearsed):
    shapes = 2 * [(4, 1, 4, 4, 4)] + 2 * [(2, 3, 4, 4, 4)]
    assert rehearsed(lambda unet: False) == (False, shapes)


def test_a_stage_that_does_not_fit_is_tried_again_with_checkpointing(rehearsed):
    checkpointing, shapes = rehearsed(
        lambda unet: unet.config.temporal == "shift" and not unet.gradient_checkpointing)
    assert checkpointing and [shape[1] for shape in shapes] == [1, 1, 3, 3, 3]


def test_a_stage_that_does_not_fit_even_so_is_one_line_with_the_remedies(rehearsed):
    with pytest.raises(ValueError, match="the image stage does not fit into the GPU's memory; .*"
                                         "--offload.*--image-batch-size, .*--num-frames or "):
        rehearsed(lambda unet: True)


def test_a_finished_image_stage_is_rehearsed_with_its_model(rehearsed):
    finished = ("vae", "image")
    assert rehearsed(lambda unet: False, finished, ["video"]) == (False, 2 * [(2, 3, 4, 4, 4)])
