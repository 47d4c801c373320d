"""A decoder with temporal layers: what it keeps of the image decoder, and what it adds."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import call, flags, weights_of
from recorded.rule import fill, normal

import evaluate
import sample
from files import read_json
from papers import video_decoder
from papers.video_decoder import DecoderOptions
from temporal import VARIANTS, temporal_state
from vae import AutoencoderKL, Decoder, VAEConfig, decode_clips
from weights import load_network, load_pipeline, load_vae, save_network, use_decoder

CONFIG = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
SILENT = ("attention", "directed", "conv")
SHORT = {"decoder_steps": 4, "decoder_batch_size": 2, "image_every": 3, "warmup_steps": 1,
         "device": "cpu", "log_every": 2, "save_every": 2}


@pytest.fixture
def image_model():
    return fill(AutoencoderKL(CONFIG)).requires_grad_(False)


def loud(image_model, temporal):
    """A video decoder whose temporal layers do something."""
    model = video_decoder.video_decoder(image_model, temporal, max_frames=6)
    for name in temporal_state(model):
        parameter = model.get_parameter(name)
        parameter.data += 0.3 * normal(*parameter.shape, seed=len(name))
    return model.requires_grad_(False)


def frames_seen(model, i, t=6):
    """The frames of the latents that frame i of the decoded clip depends on."""
    z = normal(1, t, 4, 4, 6).requires_grad_(True)
    model.decode(z)[0, i].square().sum().backward()
    return (z.grad[0].abs().amax((1, 2, 3)) > 0).nonzero().flatten().tolist()


# Before training


@pytest.mark.parametrize("temporal", ("none", *SILENT))
def test_an_untrained_video_decoder_gives_the_bits_of_the_image_decoder(image_model, temporal):
    model, z = video_decoder.video_decoder(image_model, temporal, 6), normal(2, 3, 4, 4, 6)
    assert torch.equal(decode_clips(model, z), decode_clips(image_model, z))


@pytest.mark.parametrize("temporal", VARIANTS)
def test_one_frame_gives_the_bits_of_the_image_decoder_whatever_the_layers_are(
        image_model, temporal):
    z = normal(3, 1, 4, 4, 6)
    assert torch.equal(decode_clips(loud(image_model, temporal), z), decode_clips(image_model, z))


def test_encoder_and_latents_are_those_of_the_image_model(image_model):
    x = normal(2, 3, 8, 12)
    assert torch.equal(loud(image_model, "conv").encode(x).mean, image_model.encode(x).mean)


def test_attention_inside_a_frame_stays_inside_it(image_model):
    assert image_model.config.mid_block_add_attention
    z = normal(2, 3, 4, 4, 6)
    by_frame = torch.stack([image_model.decode(clip) for clip in z])
    torch.testing.assert_close(image_model.decode(z), by_frame, atol=1e-6, rtol=0)


# What a frame depends on, by gradient


def test_directed_attention_sees_a_frame_and_all_before_it(image_model):
    model = loud(image_model, "directed")
    assert [frames_seen(model, i) for i in range(6)] == [list(range(i + 1)) for i in range(6)]


def test_attention_sees_all_frames(image_model):
    assert frames_seen(loud(image_model, "attention"), 2) == list(range(6))


@pytest.mark.parametrize("temporal", ["conv", "shift"])
def test_two_layers_a_block_see_two_frames_more_on_each_side_for_every_block(image_model, temporal):
    # Two levels of two blocks are 4 blocks, 8 layers, 8 frames to each side.
    seen = frames_seen(loud(image_model, temporal), 10, t=22)
    assert seen == list(range(2, 19))


def test_without_temporal_layers_a_frame_sees_itself(image_model):
    assert frames_seen(loud(image_model, "none"), 2) == [2]


@torch.no_grad()
def test_clips_do_not_see_each_other(image_model):
    for temporal in VARIANTS:
        model, z = loud(image_model, temporal), normal(2, 3, 4, 4, 6)
        both = decode_clips(model, z)
        torch.testing.assert_close(both[1:], decode_clips(model, z[1:]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_directed_attention_takes_more_frames_than_it_was_trained_on(image_model):
    model, z = loud(image_model, "directed"), normal(1, 9, 4, 4, 6)
    assert torch.equal(decode_clips(model, z[:, :8]), decode_clips(model, z)[:, :8])
    with pytest.raises(ValueError, match="at most max_frames=6 frames, .* got 9"):
        decode_clips(loud(image_model, "attention"), z)


# Files


@pytest.mark.parametrize("temporal", VARIANTS)
def test_a_decoder_is_the_same_after_it_was_saved_and_loaded(image_model, temporal, tmp_path):
    model, z = loud(image_model, temporal), normal(1, 3, 4, 4, 6)
    save_network(tmp_path, model)
    loaded = load_vae(tmp_path).requires_grad_(False)  # matrix products look at it, too
    assert loaded.config.temporal == temporal
    assert torch.equal(decode_clips(loaded, z), decode_clips(model, z))
    own = {"temporal", "max_frames"} & read_json(tmp_path / "config.json").keys()
    assert own == (set() if temporal == "none" else {"temporal", "max_frames"})


def test_a_decoder_for_other_latents_is_refused(run, tmp_path):
    model = load_pipeline(run)
    other = AutoencoderKL(dataclasses.replace(model.vae.config, scaling_factor=3.0))
    save_network(tmp_path / "other", other)
    with pytest.raises(ValueError, match="has scaling_factor=3.0, the model has .*--decoder"):
        use_decoder(model, run, tmp_path / "other")


def test_frames_without_a_clip_are_refused(image_model):
    with pytest.raises(ValueError, match=r"decode needs clips .* got \(2, 4, 4, 6\)"):
        loud(image_model, "shift").decode(normal(2, 4, 4, 6))


@pytest.mark.parametrize("values", [{"temporal": "time"}, {"max_frames": 0}])
def test_an_unknown_variant_is_refused(values):
    with pytest.raises(ValueError, match="temporal needs one of .* and max_frames >= 1"):
        VAEConfig(**values)


# Training


@pytest.fixture(scope="module")
def with_decoder(trained, tmp_path_factory):
    """A run with a video decoder, not to be written into."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("decoder") / "run")
    call(video_decoder.main, "train", run, *flags(**SHORT))
    return run


def changed(run):
    """The names of the tensors that training has changed."""
    before = load_vae(run / "vae").state_dict()
    after = load_vae(run / "video_decoder").state_dict()
    return {name for name, value in after.items()
            if name not in before or not torch.equal(value, before[name])}


def test_training_changes_the_decoder_and_its_layers_and_not_the_encoder(trained, with_decoder):
    names = changed(with_decoder)
    assert {"decoder.conv_in.weight", "decoder.up_blocks.2.temporal.0.attention.to_out.0.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight"} <= names
    assert all(name.startswith("decoder.") for name in names)
    model = load_vae(with_decoder / "video_decoder")
    assert {name for name in temporal_state(model) if "to_out" in name or "to_v" in name} <= names
    unchanged = weights_of(trained).items() - weights_of(with_decoder).items()
    assert not unchanged  # the run's own files


def latents_seen(run, monkeypatch, **options):
    """The latents that a training decodes, step by step, in units of the U-Net's."""
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, z: seen.append(z) or forward(self, z))
    call(video_decoder.main, "train", run, *flags(**SHORT | options))
    shutil.rmtree(run / "video_decoder")
    monkeypatch.undo()
    model = load_vae(run / "vae").requires_grad_(False)
    back = model.post_quant_conv.weight[:, :, 0, 0].inverse() * model.config.scaling_factor
    shifted = [z - model.post_quant_conv.bias[:, None, None] for z in seen]
    return [torch.einsum("ij,btjhw->btihw", back, z) for z in shifted]


def test_noise_differs_from_clip_to_clip_and_a_quarter_has_none(run, monkeypatch):
    options = {"decoder_steps": 3, "decoder_batch_size": 64}
    clean = latents_seen(run, monkeypatch, noise=0.0, **options)
    noisy = latents_seen(run, monkeypatch, noise=0.4, **options)
    assert [z.shape[:2] for z in noisy] == [(64, 3), (64, 3), (192, 1)]  # the third is of images
    deviations = (noisy[0] - clean[0]).flatten(1).std(1)
    some = deviations > 1e-4
    assert 8 <= 64 - some.sum() <= 24  # 16 are expected
    assert deviations.max() < 0.4 * 1.3 and deviations[some].min() < 0.1
    assert deviations[some].mean() == pytest.approx(0.2, abs=0.06)  # of [0, 0.4]


def test_only_the_new_layers_are_trained_if_asked(run):
    call(video_decoder.main, "train", run, "--only-new", *flags(**SHORT))
    assert changed(run) == temporal_state(load_vae(run / "video_decoder")).keys()
    z = normal(2, 1, 4, 4, 4)  # so images are decoded as before
    assert torch.equal(decode_clips(load_vae(run / "video_decoder"), z),
                       decode_clips(load_vae(run / "vae"), z))


def test_sampling_and_scores_use_the_decoder_of_the_run_and_say_so(with_decoder, tmp_path, capsys):
    clips = {}
    for name, words in (("video", ()), ("image", ("--decoder", with_decoder / "vae"))):
        call(sample.main, with_decoder, "a red circle moving left", "--output",
             tmp_path / f"{name}.png", *words)
        clips[name] = (tmp_path / f"{name}.png").read_bytes()
        said = capsys.readouterr().err
        kind = "video_decoder, temporal layers: directed" if name == "video" else "vae, temp"
        assert f"decoder: {with_decoder}/{kind}" in said
    assert clips["video"] != clips["image"]
    call(evaluate.main, with_decoder, "--num-prompts", 2)
    assert "video_decoder, temporal layers: directed" in capsys.readouterr().out
    (said,) = json.loads((with_decoder / "evaluation.json").read_text())["decoder"]
    assert said.startswith("decoder: ")


def test_both_decoders_are_measured_on_the_same_latents(with_decoder):
    call(video_decoder.main, "evaluate", with_decoder, "--num-prompts", 2, "--device", "cpu")
    result = read_json(with_decoder / "video_decoder" / "evaluation.json")
    sources = ("clean", "noise 0.05", "noise 0.1", "noise 0.2", "images", "drawn")
    rows = [f"{s}, {name}" for s in sources for name in ("2-D", "directed")]
    assert list(result) == ["num_prompts", "seed", *rows]
    known = {s for s in sources if "PSNR" in result[f"{s}, 2-D"]}
    assert known == set(sources) - {"drawn"}
    assert result["clean, 2-D"] != result["noise 0.2, 2-D"]
    assert result["clean, 2-D"] != result["clean, directed"]


def test_a_training_that_was_stopped_ends_with_the_same_bits(with_decoder, run, monkeypatch):
    loss, calls = video_decoder.reconstruction_error, []

    def stop_at_3(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(video_decoder, "reconstruction_error", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        call(video_decoder.main, "train", run, *flags(**SHORT))
    with pytest.raises(ValueError, match="add --resume"):
        call(video_decoder.main, "train", run, *flags(**SHORT))
    with pytest.raises(ValueError, match="was trained with --noise 0.4, not 0.1"):
        call(video_decoder.main, "train", run, "--resume", *flags(noise=0.1))
    call(video_decoder.main, "train", run, "--resume")
    a, b = (load_network(path / "video_decoder", AutoencoderKL)[0].state_dict()
            for path in (run, with_decoder))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("options, message", [
    ({"only_new": True, "temporal": "none"}, "--only-new needs a variant with layers of its own"),
    ({"only_new": True, "temporal": "shift"}, "got --temporal shift"),
    ({"noise": -1.0}, "--noise needs to lie in .0, "),
])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecoderOptions(**options)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    for command in ("train", "evaluate"):
        with pytest.raises(ValueError, match="has no trained vae/"):
            call(video_decoder.main, command, tmp_path)


def test_a_folder_that_names_no_data_needs_some(run):
    (run / "train.json").unlink()
    with pytest.raises(ValueError, match="has no train.json; name the clips with --data"):
        call(video_decoder.main, "train", run, *flags(**SHORT))


def test_a_run_without_a_trained_decoder_is_not_measured(trained):
    with pytest.raises(ValueError, match="run: has no trained video_decoder/; train it first"):
        call(video_decoder.main, "evaluate", trained)


def test_costs_are_counted_at_full_size():
    plain, conv = (video_decoder.costs(kind, 2, 16) for kind in ("none", "conv"))
    assert plain["parameters"] == 49_490_179  # of diffusers' class
    # Two convolutions of 3 c^2 + c numbers in each of 3 blocks a level.
    assert conv["new"] == sum(6 * (3 * c * c + c) for c in (512, 512, 256, 128))
    assert conv["parameters"] == plain["parameters"] + conv["new"]
