"""The plan of a GPU's memory: sums by hand, counted peaks, and what is done if little is free."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import UNETS, build_unet, fresh_pipeline, unet_inputs

import memory
import text
from memory import MARGIN, Needs, Plan, learning, needs_of, plan
from model import UNet
from options import RECIPES

NEEDS = Needs(parameters=1000, activations=9000, kept=500, largest=300)


@pytest.mark.parametrize("way, expected", [
    ((False, False, False), 16 * 1000 + 2 * 1000 + 9000),  # when the backward pass begins
    ((False, True, False), 12 * 1000 + 2 * 1000 + 9000),
    ((True, True, False), 12 * 1000 + 4 * 1000 + 300),  # when all gradients are there
    ((True, True, True), 4 * 1000 + 4 * 1000 + 300),
])
def test_the_peak_by_hand(way, expected):
    assert NEEDS.peak(Plan(*way)) == expected


def test_in_float32_activations_take_twice_as_much_and_weights_have_no_copy():
    assert NEEDS.peak(Plan(False, True), bf16=False) == 12 * 1000 + 2 * 9000


def stage_of(tmp_path, device="cuda", **options):
    """What a plan needs to know of a run, in which nothing is trained yet."""
    options = dataclasses.replace(RECIPES["sd1"], precision="bf16", **options)
    return SimpleNamespace(options=options, path=tmp_path, device=torch.device(device))


# docs/measurements.md says how they were counted, in bytes.
def test_the_needs_of_stable_diffusion_are_the_counted_ones(tmp_path):
    needs = needs_of(learning(stage_of(tmp_path), "video"))
    assert needs.parameters == 859_520_964
    for way, peak in [((False, False, False), 20.01e9), ((False, True, False), 16.57e9),
                      ((True, True, False), 14.33e9), ((True, True, True), 7.45e9)]:
        assert needs.peak(Plan(*way)) == pytest.approx(peak, rel=0.03)


def test_checkpointing_keeps_all_activations_of_a_text_encoder(tmp_path):
    unet, encoder = learning(stage_of(tmp_path, image_size=64), "image")
    alone, texts, both = needs_of([unet]), needs_of([encoder]), needs_of([unet, encoder])
    # 12 layers, 47 bytes for each number of their output.
    assert texts.kept == texts.activations == 12 * 47 * encoder[1][0].numel() * 768
    assert both.kept == alone.kept + texts.kept


@pytest.mark.parametrize("name", UNETS)
def test_activations_are_about_what_autograd_saves(name):
    unet, (latents, timesteps, context) = build_unet(UNETS[name]), unet_inputs()
    weights = {parameter.data_ptr() for parameter in unet.parameters()}
    saved = {}

    def pack(x):
        if x.data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = unet(latents, timesteps, context)
    with torch.device("meta"):
        inputs = tuple(x.to("meta") for x in (latents, timesteps, context))
        needs = needs_of([(UNet(unet.config), inputs)])
    # In float32, where nothing is cast: twice the bytes, or less, of what is in float32 anyway.
    assert kept.requires_grad and 1.2 < sum(saved.values()) / needs.activations < 2.4


@pytest.mark.parametrize("free, expected", [
    (20.5e9, Plan(False, False)), (17e9, Plan(False, True)), (15e9, Plan(True, True)),
])
def test_what_is_fastest_is_taken_of_what_fits(tmp_path, free, expected, capsys):
    needs = Needs(int(860e6), int(4.5e9), int(0.3e9), int(0.6e9))
    assert plan(stage_of(tmp_path), "video", needs, free=MARGIN * free) == expected
    assert f"{MARGIN * free / 1e9:.1f} are free" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_with_the_remedy(tmp_path):
    needs, twelve = Needs(int(860e6), int(4.5e9), int(0.3e9), int(0.6e9)), 12.5e9
    with pytest.raises(ValueError, match=r"the video stage needs about 15\.\d GB of GPU memory .*, "
                                         r"12\.5 are free; use --offload or a smaller --video-bat"):
        plan(stage_of(tmp_path), "video", needs, twelve)
    chosen = plan(stage_of(tmp_path, offload=True), "video", needs, twelve)
    assert chosen == Plan(False, True, True)
    with pytest.raises(ValueError, match="use a smaller --video-batch-size, --num-frames or --im"):
        plan(stage_of(tmp_path, offload=True), "video", needs, 8e9)


def test_who_asks_for_checkpointing_or_not_gets_it(tmp_path):
    needs = Needs(1000, 10, 10, 10)
    for wish in (True, False):
        run = stage_of(tmp_path, gradient_checkpointing=wish)
        assert plan(run, "video", needs, 1e9).checkpointing == wish
    with pytest.raises(ValueError, match="use --offload or --gradient-checkpointing or a smaller"):
        plan(run, "video", needs, 10.0)


def test_the_autoencoder_is_planned_as_it_trains_with_all_activations_stored(tmp_path):
    needs = Needs(1000, 10, 10, 10)
    for wish in (True, False, None):
        run = stage_of(tmp_path, gradient_checkpointing=wish)
        assert not plan(run, "vae", needs, 1e9).checkpointing


def test_a_save_that_was_killed_before_the_weights_can_be_planned(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "image_unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert learning(stage_of(run, num_frames=2, image_size=64), "image")


@pytest.mark.parametrize("stage", ["vae", "image", "video"])
def test_every_stage_has_needs_that_grow_with_its_batch(tmp_path, stage):
    one, two = (needs_of(learning(stage_of(tmp_path, image_size=64, **{f"{stage}_batch_size": n}),
                                  stage)) for n in (1, 2))
    assert one.parameters == two.parameters
    assert two.activations == 2 * one.activations > 0


def test_latents_are_as_large_as_the_autoencoder_of_the_beginning_makes_them(trained):
    run = stage_of(trained, num_frames=2, image_size=64)  # a run with 4 x 4 pixels a latent
    (_, (latents, *_)), = learning(run, "video")
    assert latents.shape[-2:] == (16, 16)


def test_on_a_cpu_nothing_moves_and_only_what_cannot_fit_is_refused(tmp_path, capsys, monkeypatch):
    run = stage_of(tmp_path, "cpu", gradient_checkpointing=False)
    assert plan(stage_of(tmp_path, "cpu"), "video") == Plan(True, False, False)
    assert plan(run, "video") == Plan()
    assert capsys.readouterr().out == ""
    clip = 50 * 16 * 256**2
    for stage, least in (("vae", 32 * 16 * 128 * 256**2), ("image", 32 * 32 * 320 * 32**2),
                         ("video", 32 * 16 * 320 * 32**2)):
        monkeypatch.setattr(memory, "machine_bytes", lambda least=least: least + clip)
        assert plan(run, stage) == Plan()
        monkeypatch.setattr(memory, "machine_bytes", lambda least=least: least + clip - 1)
        with pytest.raises(ValueError, match=f"of memory, the machine has .*; lower --{stage}-bat"):
            plan(run, stage)


def test_a_caption_may_have_more_tokens_than_the_preset(tmp_path):
    positions = text.PRESETS["tiny"].max_position_embeddings
    run = stage_of(tmp_path)
    run.options = dataclasses.replace(RECIPES["tiny"], max_tokens=positions + 1)
    assert needs_of(learning(run, "image")).activations > 0


def test_a_limit_of_the_system_counts_like_the_machine(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("12345678\n")
    (tmp_path / "other").write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max", tmp_path / "other"))
    assert memory.machine_bytes() == 12345678
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "other", tmp_path / "absent"))
    assert memory.machine_bytes() > 2**28


def test_sampling_needs_what_its_clips_and_its_decoder_do(monkeypatch):
    pipeline = fresh_pipeline()  # first levels of 32 and 16 channels, latents of 1/4
    sampling = dataclasses.replace(pipeline.sampling, num_frames=5, image_size=40)
    drawn = 3 * (8 * 32 * 10**2 + 3 * 40**2) + 2 * 3 * 80**2  # numbers for each frame
    needed = 4 * (5 * drawn + 3 * 16 * 40**2)
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed)
    memory.check_sampling(pipeline, sampling, 3, 2, zoom=2)
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match="lower --batch-size, --num-frames, --image-size, --zoom"):
        memory.check_sampling(pipeline, sampling, 3, 2, zoom=2)
