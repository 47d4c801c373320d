"""A decoder with temporal layers: what it keeps of the image decoder, and what it adds."""

import dataclasses
import shutil

import pytest
import torch
from helpers import call, flags, weights_of
from recorded.rule import fill, normal

from checkpoints.weights import load_vae, save_network
from media.read import read_clip
from papers import video_decoder
from papers.video_decoder import VARIANTS, Decoder, load_model, load_video_vae, video_vae
from temporal import temporal_state
from vae import AutoencoderKL, VAEConfig, decode_clips, encode_clip

CONFIG = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
SHORT = {"decoder_steps": 4, "decoder_batch_size": 2, "image_every": 3, "warmup_steps": 1,
         "device": "cpu", "save_every": 2}
each_variant = pytest.mark.parametrize("temporal", VARIANTS)


@pytest.fixture
def image_model():
    return fill(AutoencoderKL(CONFIG)).requires_grad_(False)


def loud(image_model, temporal):
    """A video decoder whose temporal layers are not identities."""
    model = video_vae(image_model, temporal, max_frames=6)
    for name in temporal_state(model):
        parameter = model.get_parameter(name)
        parameter.data += 0.3 * normal(*parameter.shape, seed=len(name))
    return model.requires_grad_(False)


def frames_seen(model, i, t=6):
    """The frames of the latents that frame i of the decoded clip depends on, by its gradient."""
    z = normal(1, t, 4, 4, 6).requires_grad_(True)
    model.decode(z)[0, i].square().sum().backward()
    return (z.grad[0].abs().amax((1, 2, 3)) > 0).nonzero().flatten().tolist()


@each_variant
def test_only_the_shift_changes_what_an_untrained_decoder_gives(image_model, temporal):
    model, z = video_vae(image_model, temporal, 6), normal(2, 3, 4, 4, 6)
    same = torch.equal(decode_clips(model, z), decode_clips(image_model, z))
    assert same == (temporal != "shift")


@each_variant
def test_an_image_skips_the_layers(image_model, temporal):
    z = normal(3, 1, 4, 4, 6)
    assert torch.equal(decode_clips(loud(image_model, temporal), z), decode_clips(image_model, z))


@each_variant
def test_clips_do_not_see_each_other(image_model, temporal):
    model, z = loud(image_model, temporal), normal(2, 3, 4, 4, 6)
    alone = decode_clips(model, z[1:])
    torch.testing.assert_close(decode_clips(model, z)[1:], alone, atol=1e-6, rtol=0)


def test_attention_sees_all_frames_and_directed_attention_no_later_ones(image_model):
    model = loud(image_model, "directed")
    assert [frames_seen(model, i) for i in range(6)] == [list(range(i + 1)) for i in range(6)]
    assert frames_seen(loud(image_model, "attention"), 2) == list(range(6))


@pytest.mark.parametrize("temporal, reach", [("none", 0), ("shift", 4), ("conv", 8)])
def test_four_blocks_with_one_shift_or_two_convolutions_see_as_many_frames_on_each_side(
        image_model, temporal, reach):
    seen = frames_seen(loud(image_model, temporal), 10, t=22)
    assert seen == list(range(10 - reach, 11 + reach))


@torch.no_grad()
def test_clips_are_decoded_one_by_one_if_they_are_large(image_model, monkeypatch):
    model, z, sizes = loud(image_model, "conv"), normal(3, 2, 4, 4, 6), []
    whole = decode_clips(model, z)
    monkeypatch.setattr("vae.CHUNK_PIXELS", 2 * 8 * 12)  # of one clip
    model.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.testing.assert_close(decode_clips(model, z), whole, atol=1e-6, rtol=0)
    assert sizes == [1, 1, 1]


@torch.no_grad()
def test_only_directed_attention_takes_more_frames_than_it_was_trained_on(image_model):
    model, z = loud(image_model, "directed"), normal(1, 9, 4, 4, 6)
    assert torch.equal(decode_clips(model, z[:, :8]), decode_clips(model, z)[:, :8])
    with pytest.raises(ValueError, match="at most max_frames=6 frames, .* got 9"):
        decode_clips(loud(image_model, "attention"), z)


@each_variant
def test_a_decoder_gives_the_same_bits_after_it_was_saved_and_loaded(
        image_model, temporal, tmp_path):
    model, z = loud(image_model, temporal), normal(1, 3, 4, 4, 6)
    save_network(tmp_path, model)
    loaded = load_video_vae(tmp_path).requires_grad_(False)  # gradients can change last bits
    assert loaded.config == model.config
    assert torch.equal(decode_clips(loaded, z), decode_clips(model, z))


def test_a_variant_that_it_does_not_build_is_refused():
    with pytest.raises(ValueError, match="temporal needs one of .*, got 'joint'"):
        video_decoder.VideoVAEConfig(temporal="joint")


# The commands


def test_more_frames_than_the_decoder_takes_are_refused_before_denoising(run, tmp_path):
    call(video_decoder.main, "train", run, *flags(**SHORT | {"decoder_steps": 1}),
         "--temporal", "attention")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(
        ValueError, match="--num-frames 4: the decoder has parameters for 3 frames"
    ):
        patch.setattr("papers.drawing.generate", None)
        call(video_decoder.main, "sample", run, "a red circle", "--num-frames", 4, "--output",
             tmp_path / "a.gif")


@pytest.fixture(scope="module")
def with_decoder(trained, tmp_path_factory):
    """A run with a video decoder, not to be written into."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("decoder") / "run")
    call(video_decoder.main, "train", run, *flags(**SHORT))
    return run


def test_training_changes_the_whole_decoder_and_nothing_else(trained, with_decoder):
    before = load_vae(with_decoder / "vae").state_dict()
    after = load_video_vae(with_decoder / "video_decoder/vae").state_dict()
    changed = {name for name, value in after.items()
               if name not in before or not torch.equal(value, before[name])}
    assert {"decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight",
            "decoder.up_blocks.2.resnets.temporal.attention.to_out.0.weight"} <= changed
    assert all(name.startswith("decoder.") for name in changed)
    assert weights_of(trained).items() <= weights_of(with_decoder).items()  # the run's own files


def latents_seen(run, monkeypatch, **options):
    """The latents that a training decodes, step by step, in units of the U-Net's."""
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, z: seen.append(z) or forward(self, z))
    call(video_decoder.main, "train", run, *flags(**SHORT | options))
    shutil.rmtree(run / "video_decoder")
    monkeypatch.undo()
    model = load_vae(run / "vae").requires_grad_(False)
    back = model.post_quant_conv.weight[:, :, 0, 0].inverse() * model.config.scaling_factor
    return [torch.einsum("ij,btjhw->btihw", back, z - model.post_quant_conv.bias[:, None, None])
            for z in seen]


def test_the_decoder_learns_the_frames_whose_latents_it_sees(run, monkeypatch):
    loss, targets = video_decoder.reconstruction_error, []
    monkeypatch.setattr(video_decoder, "reconstruction_error",
                        lambda y, x, weight: targets.append(x) or loss(y, x, weight))
    latents = latents_seen(run, monkeypatch, decoder_steps=2, image_every=2, noise=0.0)
    for x, z in zip(targets, latents, strict=True):  # a step on clips, a step on images
        expected = encode_clip(load_vae(run / "vae"), (x + 1) * 127.5)
        torch.testing.assert_close(z.flatten(0, 1), expected, atol=1e-4, rtol=0)


def test_noise_differs_from_clip_to_clip_and_a_quarter_has_none(run, monkeypatch):
    options = {"decoder_steps": 2, "decoder_batch_size": 40, "image_every": 2}
    clean = latents_seen(run, monkeypatch, noise=0.0, **options)
    noisy = latents_seen(run, monkeypatch, noise=0.4, **options)
    assert [z.shape[:2] for z in noisy] == [(40, 3), (120, 1)]  # the second has images
    deviations = (noisy[0] - clean[0]).flatten(1).std(1)
    some = deviations > 1e-4
    assert 4 <= 40 - some.sum() <= 16  # 10 are expected
    assert deviations.max() < 0.4 * 1.3 and deviations[some].min() < 0.1
    assert deviations[some].mean() == pytest.approx(0.2, abs=0.06)  # uniform in [0, 0.4]


def test_sample_decodes_with_the_video_decoder(with_decoder, tmp_path):
    model = load_model(with_decoder)
    prompt, sampling = "a red circle moving left", dataclasses.replace(model.sampling, num_steps=2)
    *_, latents = model.sample([prompt], [3], sampling)
    call(video_decoder.main, "sample", with_decoder, prompt, "--seed", 3, "--num-steps", 2,
         "--output", tmp_path / "clip.png", "--device", "cpu")
    sheet, _ = read_clip(tmp_path / "clip.png")
    # Frames enlarged by 8, with gaps of 2 pixels
    frames = [sheet[0, ::8, 130 * i : 130 * i + 128 : 8] for i in range(3)]
    expected = ((model.decode(latents)[0] + 1) * 127.5).round().movedim(1, -1).numpy()
    assert all((frame == true).all() for frame, true in zip(frames, expected, strict=True))


def test_evaluate_measures_both_decoders_on_the_same_latents(with_decoder, monkeypatch):
    rows = {}
    monkeypatch.setattr(video_decoder, "print_table", lambda _, table: rows.update(table))
    call(video_decoder.main, "evaluate", with_decoder, "--num-prompts", 2, "--device", "cpu")
    sources = ("noise 0", "noise 0.1", "noise 0.2", "drawn")
    assert list(rows) == [f"{name}, {source}" for name in ("2-D", "video") for source in sources]
    assert rows["2-D, noise 0"] != rows["2-D, noise 0.2"]
    assert rows["2-D, noise 0"] != rows["video, noise 0"]
