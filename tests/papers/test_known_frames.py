"""What a model is shown, asked and taught about known frames."""

import dataclasses

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from recorded.rule import normal

from diffusion import Diffusion
from model import UNet
from papers.known_frames import (Guidance, draw, known_frames_loss, load_model, nearest_known,
                                 perturb, predict, show_known, widen)
from temporal import VARIANTS

NUMBERS = torch.tensor([[37.0, 30.0, 8.0], [2.0, 0.0, 4.0]])  # timestep, noise level, frame rate


@pytest.mark.parametrize("known, pairs", [
    # one on each side, except for frames 0 and 5, which have both on one side
    ([0, 1, 0, 0, 1, 0], [(1, 4), (1, 1), (1, 4), (1, 4), (4, 4), (4, 1)]),
    ([1, 1, 1, 0, 0], [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0)]),  # the nearest and the farthest
    ([0, 1, 0], [(1, 1), (1, 1), (1, 1)]),  # a single one, twice
])
def test_each_frame_is_shown_two_known_frames(known, pairs):
    assert nearest_known(known) == pairs


def test_shown_channels_are_latents_distances_and_mask():
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)  # frame i is i everywhere
    shown = show_known(latents, torch.tensor([True, False, True]))
    assert shown.shape == (2, 3, 11, 5, 6)
    assert shown[1, 1, :, 2, 3].tolist() == [0.0] * 4 + [2.0] * 4 + [-1 / 8, 1 / 8, 0.0]
    assert shown[0, 2, :, 0, 0].tolist() == [2.0] * 8 + [0.0, 0.0, 1.0]



def test_without_known_frames_zeros_are_shown():
    shown = show_known(normal(1, 3, 4, 2, 2), torch.zeros(3, dtype=torch.bool))
    assert shown.equal(torch.zeros(1, 3, 11, 2, 2))


def test_without_hold_only_the_mask_is_shown():
    shown = show_known(normal(1, 3, 4, 2, 2), torch.tensor([True, False, False]), hold=False)
    assert shown.flatten(2).tolist() == [[[1.0] * 4, [0.0] * 4, [0.0] * 4]]


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("temporal", VARIANTS)
def test_a_widened_unet_starts_as_the_plain_one(temporal, hold):
    unet = build_unet(temporal=temporal, max_frames=3)
    latents, timesteps, context = unet_inputs()
    wide = widen(unet, hold)
    extra = normal(2, 3, 11 if hold else 1, 8, 12, seed=7)
    drawn = wide(torch.cat([latents, extra], dim=2), NUMBERS, context)
    # Zero weights add nothing, but a convolution of more channels may sum in another order.
    torch.testing.assert_close(drawn, unet(latents, timesteps, context), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temporal", VARIANTS)
def test_a_widened_unet_takes_longer_clips(temporal):
    wide = widen(build_unet(temporal=temporal, max_frames=3), max_frames=6)
    assert wide(normal(2, 6, 15, 8, 12), NUMBERS, unet_inputs()[2]).isfinite().all()


@pytest.mark.parametrize("column", [1, 2])
def test_noise_level_and_frame_rate_are_embedded_like_the_timestep(column):
    wide = widen(build_unet())
    context, x = unet_inputs()[2], normal(2, 3, 15, 8, 12)
    expected = wide(x, NUMBERS, context)
    # Exchange the roles of a number and the timestep.
    embedding = wide.condition_embeddings[column - 1]
    embedding.load_state_dict(wide.time_embedding.state_dict())
    torch.nn.init.zeros_(wide.time_embedding.linear_2.weight)
    torch.nn.init.zeros_(wide.time_embedding.linear_2.bias)
    numbers = NUMBERS.clone()
    numbers[:, 0], numbers[:, column] = NUMBERS[:, column], NUMBERS[:, 0]
    torch.testing.assert_close(wide(x, numbers, context), expected, rtol=0, atol=1e-6)


def test_a_level_of_zero_adds_no_noise_to_known_frames():
    diffusion, latents = Diffusion(), normal(2, 3, 4, 2, 2)
    noise = normal(2, 3, 4, 2, 2, seed=5)
    seen = perturb(diffusion, latents, torch.tensor([0, 100]), noise)
    assert seen[0].equal(latents[0])
    assert seen[1].equal(diffusion.add_noise(latents, noise, torch.tensor([100, 100]))[1])


def doubling(x, timesteps, context):
    """A stand-in for a U-Net: the first channels that it sees, times 2, plus level and rate."""
    return 2 * x[:, :, :4] + timesteps[:, 1:].sum(1).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("hold", [True, False])
def test_the_loss_is_the_mean_over_unknown_frames(hold):
    diffusion, numbers = Diffusion(), torch.tensor([[10.0, 1.0, 2.0], [700.0, 0.5, 0.0]])
    x0, noise, seen = (normal(2, 3, 4, 2, 2, seed=i) for i in range(3))
    known = torch.tensor([True, False, False])
    loss = known_frames_loss(doubling, diffusion, x0, noise, numbers, None, seen, known, hold)
    total = 0.0
    for clip, timestep in enumerate((10, 700)):
        alpha_bar = diffusion.alphas_cumprod[timestep]
        for frame in (1, 2):
            x_t = alpha_bar.sqrt() * x0[clip, frame] + (1 - alpha_bar).sqrt() * noise[clip, frame]
            error = 2 * x_t + numbers[clip, 1:].sum() - noise[clip, frame]
            total += error.square().sum() / (2 * 2 * 4 * 2 * 2)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_known_frames_overwrite_the_noise():
    seen, noise = normal(2, 3, 4, 2, 2, seed=2), normal(2, 3, 4, 2, 2)
    predicted = predict(doubling, noise, torch.zeros(2, 3), None, seen,
                        torch.tensor([True, False, True]), hold=True)
    assert predicted[:, [0, 2]].equal(2 * seen[:, [0, 2]])
    assert predicted[:, 1].equal(2 * noise[:, 1])


@pytest.fixture(scope="module", params=[True, False], ids=["hold", "mask"])
def model(request):
    """An untrained model for known frames, whose new weights are not zero."""
    pipeline = fresh_pipeline()
    torch.manual_seed(0)
    config = dataclasses.replace(pipeline.unet.config, temporal="shift")
    pipeline.unet = widen(UNet(config), request.param)
    for parameter in pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return pipeline.to("cpu")


def test_known_frames_come_back_exactly(model):
    latents, known = normal(2, 4, 4, 8, 8), torch.tensor([True, False, True, False])
    context = model.encode_text(["a red circle", "a"])
    how = Guidance(num_steps=2, level=40, text=2.0, known=0.5)
    drawn = draw(model, context, latents, known, 8.0, [1, 2], how)
    assert drawn[:, known].equal(latents[:, known])
    assert not (drawn[:, ~known] == latents[:, ~known]).any()


def test_a_window_does_not_depend_on_frames_it_may_not_see(model):
    latents, known = normal(1, 4, 4, 8, 8), torch.tensor([True, False, True, False])
    other = latents.clone()
    other[:, ~known] = 100.0
    context = model.encode_text(["a red circle"])
    results = [draw(model, context, x, known, 8.0, [1], Guidance()) for x in (latents, other)]
    assert results[0].equal(results[1])


def test_the_model_is_told_timestep_level_and_frame_rate(model, monkeypatch):
    told, forward = [], model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, timesteps, context: (
        told.append(timesteps.tolist()) or forward(x, timesteps, context)))
    how = Guidance(num_steps=1, level=40, text=2.0, known=0.5)
    context = model.encode_text(["a red circle"])
    draw(model, context, normal(1, 3, 4, 8, 8), torch.tensor([True, False, False]), 12.0, [1], how)
    # With the text, without it, and without known frames, which then have no noise.
    assert told == [[[999, 40, 12]], [[999, 40, 12]], [[999, 0, 12]]]


def test_guidance_by_the_text_ends_at_its_signal_to_noise_ratio(model):
    latents, known = normal(1, 3, 4, 8, 8), torch.zeros(3, dtype=torch.bool)
    context = model.encode_text(["a red circle"])
    everywhere, nowhere, up_to_0, up_to_9 = (
        draw(model, context, latents, known, 8.0, [3], Guidance(2, text=scale, max_snr=max_snr))
        for scale, max_snr in ((2.0, None), (1.0, None), (2.0, 0.0), (2.0, 1e9)))
    assert everywhere.equal(up_to_9) and not everywhere.equal(nowhere)
    # The first of the two steps has no signal, so it is the only one that is guided.
    assert not up_to_0.equal(everywhere) and not up_to_0.equal(nowhere)


@pytest.mark.parametrize("field, weight_without", [("known", 0.0), ("text", 1.0)])
def test_guidance_extrapolates(model, field, weight_without):
    latents, known = normal(1, 3, 4, 8, 8), torch.tensor([True, False, False])
    context = model.encode_text(["a red circle"])
    # One step from pure noise: x0 is linear in the prediction, so the result is linear in w.
    without, half, whole = (
        draw(model, context, latents, known, 8.0, [3], Guidance(1, **{field: weight_without + w}))
        for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - without, (whole - without) / 2, rtol=1e-3, atol=1e-4)
    assert (whole - without).abs().max() > 1e-4


def test_a_run_without_known_frames_is_refused_with_the_command_that_trains_one(trained):
    with pytest.raises(ValueError, match=r"without known frames.*papers.long_video train RUN"):
        load_model(trained)
