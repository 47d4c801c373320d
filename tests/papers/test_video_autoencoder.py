"""The commands, with runs of seconds: train, stop, resume, sample, evaluate."""

import pytest
import torch
from helpers import SMALL, call, flags, metrics_of, weights_of

from media.read import read_clip
from papers.autoencoder_3d import load_autoencoder
from papers.video_autoencoder import VideoOptions, load_model, main
from training.options import read_record
from training.run import Run, open_data
from vae import encode_clip

TINY = SMALL | {"num_frames": 4, "time_factor": 2, "vae_batch_size": 2}


def train(path, *arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "draw_previews", lambda *_: None)  # they would take most of the time
        call(main, "train", path, *flags(**TINY | options), *arguments)


@pytest.fixture(scope="module")
def lvdm(trained, tmp_path_factory):
    """A run of all stages from an inflated autoencoder, not to be written into."""
    path = tmp_path_factory.mktemp("lvdm") / "run"
    train(path, init=trained)
    return path


def test_all_stages_leave_a_3d_autoencoder_and_a_unet_with_the_shift(lvdm):
    model = load_model(lvdm)
    assert model.vae.config.time_factor == 2
    assert model.unet.config.temporal == "shift" and model.sampling.num_frames == 4
    assert read_record(lvdm, VideoOptions)[1] == ["vae", "image", "video"]


def test_the_kl_term_has_its_weight(tmp_path):
    losses = []
    for weight in (0.0, 1.0, 3.0):  # a step's loss, from equal weights
        train(tmp_path / str(weight), "--stage", "vae", vae_steps=1, kl_weight=weight)
        losses.append(metrics_of(tmp_path / str(weight))[0]["loss"])
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] > losses[0] + 0.01


def test_its_latents_are_standardised_on_the_training_clips(lvdm):
    autoencoder, (options, _) = load_autoencoder(lvdm / "vae"), read_record(lvdm, VideoOptions)
    latents = torch.cat([encode_clip(autoencoder, clip) for clip, _ in open_data(options)])
    assert latents.shape == (16, 4, 4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_training_that_was_stopped_goes_on_bit_for_bit(lvdm, trained, tmp_path, monkeypatch):
    save = Run.save_state

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    for arguments in ((), ("--resume",)):  # at step 2 of the vae stage, then of the image stage
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "save_state", stop)
            train(tmp_path / "run", *arguments, init=trained)
    train(tmp_path / "run", "--resume", init=trained)
    mine, other = weights_of(tmp_path / "run"), weights_of(lvdm)
    for part in ("vae", "unet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert mine[name] == other[name]


def test_it_trains_from_nothing_with_more_channels_and_attention(tmp_path):
    train(tmp_path / "run", latent_channels=6, temporal="attention")
    unet = load_model(tmp_path / "run").unet
    assert unet.config.in_channels == unet.config.out_channels == 6
    assert any("temporal" in name for name in unet.state_dict())


def test_only_a_2d_autoencoder_is_a_start(lvdm, tmp_path):
    for init, message in ((lvdm, "_class_name='VideoAutoencoder' is not supported"),
                          (tmp_path, "has no config.json")):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", init=init)


@pytest.mark.parametrize("options, message", [
    ({"num_frames": 6}, "--num-frames needs a multiple of --time-factor 4, got 6"),
    ({"init": "run", "image_size": 34}, "--image-size needs a multiple of 8, got 34"),
])
def test_options_that_a_stage_would_refuse_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**options)


@pytest.mark.parametrize("words, frames", [((), 4), (("--num-frames", 5), 6)])
def test_a_sample_has_whole_latent_frames(lvdm, tmp_path, words, frames):
    call(main, "sample", lvdm, "a red circle", "--num-steps", 2, "--output", tmp_path / "a.gif",
         "--device", "cpu", *words)
    assert len(read_clip(tmp_path / "a.gif")[0]) == frames


def test_evaluate_measures_both_autoencoders_and_drawn_clips(trained, lvdm, capsys):
    call(main, "evaluate", lvdm, "--beside", trained, "--num-prompts", 4, "--device", "cpu")
    _, own, other, _, seen, held_out, both = capsys.readouterr().out.splitlines()
    assert own.split()[1] == str(2 * 4 * 4 * 4) and other.split()[1] == str(4 * 4 * 4 * 4)
    assert [row.split()[-6] for row in (seen, held_out, both)] == ["2", "2", "4"]
