"""The inputs, the loss and the drawing of a model for known frames."""

import dataclasses

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from recorded.rule import normal

from diffusion import Diffusion
from model import UNet
from papers.known_frames import (Guidance, draw, known_frames_loss, nearest_known, perturb,
                                 show_known, widen)
from temporal import VARIANTS

NUMBERS = torch.tensor([[37.0, 30.0, 8.0], [2.0, 0.0, 4.0]])  # timestep, noise level, frame rate


def test_each_frame_is_shown_two_known_frames():
    # One on each side, except for frames 0 and 5, which have both on one side.
    assert nearest_known([1, 4], 6) == [(4, 1), (1, 1), (1, 4), (1, 4), (4, 4), (4, 1)]
    # The nearest and the farthest, or a single one twice.
    assert nearest_known([0, 1, 2], 5) == [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0)]
    assert nearest_known([1], 3) == [(1, 1), (1, 1), (1, 1)]


def test_shown_channels_are_latents_distances_and_mask():
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)  # frame i is i everywhere
    shown = show_known(latents, [0, 2])
    assert shown.shape == (2, 3, 11, 5, 6)
    assert shown[1, 1, :, 2, 3].tolist() == [0.0] * 4 + [2.0] * 4 + [-1 / 8, 1 / 8, 0.0]
    assert shown[0, 2, :, 0, 0].tolist() == [2.0] * 8 + [0.0, 0.0, 1.0]
    assert show_known(latents, []).equal(torch.zeros(2, 3, 11, 5, 6))
    assert show_known(latents, [0], hold=False)[1, :, 0, 2, 3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temporal", VARIANTS)
def test_a_widened_unet_starts_as_the_plain_one(temporal):
    hold = temporal != "conv"  # once without
    unet = build_unet(temporal=temporal, max_frames=3)
    latents, timesteps, context = unet_inputs()
    wide = widen(unet, hold, max_frames=6)
    x = torch.cat([latents, normal(2, 3, 11 if hold else 1, 8, 12, seed=7)], dim=2)
    # Zero weights add nothing, but a convolution of more channels may sum in another order.
    torch.testing.assert_close(wide(x, NUMBERS, context), unet(latents, timesteps, context),
                               rtol=0, atol=1e-6)
    assert wide(torch.cat([x, x], dim=1), NUMBERS, context).isfinite().all()  # six frames


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
    diffusion, latents, noise = Diffusion(), normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=5)
    seen = perturb(diffusion, latents, torch.tensor([0, 100]), noise)
    assert seen[0].equal(latents[0])
    assert seen[1].equal(diffusion.add_noise(latents, noise, torch.tensor([100, 100]))[1])


def doubling(x, timesteps, context):
    """A stand-in for a U-Net: twice the first channels of the frames in reverse, plus numbers."""
    return 2 * x[:, :, :4].flip(1) + timesteps[:, 1:].sum(1).view(-1, 1, 1, 1, 1)


def test_the_loss_is_the_mean_over_unknown_frames_and_known_ones_overwrite_their_noise():
    diffusion, numbers = Diffusion(), torch.tensor([[10.0, 1.0, 2.0], [700.0, 0.5, 0.0]])
    x0, noise, seen = (normal(2, 3, 4, 2, 2, seed=i) for i in range(3))
    loss = known_frames_loss(doubling, diffusion, x0, noise, numbers, torch.zeros(2), seen, [0],
                             hold=True)
    total = 0.0
    for clip, timestep in enumerate((10, 700)):
        alpha_bar = diffusion.alphas_cumprod[timestep]
        for frame in (1, 2):
            x_t = alpha_bar.sqrt() * x0[clip, frame] + (1 - alpha_bar).sqrt() * noise[clip, frame]
            other = x_t if frame == 1 else seen[clip, 0]
            error = 2 * other + numbers[clip, 1:].sum() - noise[clip, frame]
            total += error.square().sum() / (2 * 2 * 4 * 2 * 2)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.fixture(scope="module")
def model():
    """An untrained model for known frames, whose new weights are not zero."""
    pipeline = fresh_pipeline()
    torch.manual_seed(0)
    pipeline.unet = widen(UNet(dataclasses.replace(pipeline.unet.config, temporal="shift")))
    for parameter in pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return pipeline.to("cpu")


def drawn(model, known, latents=None, num_steps=1, **fields):
    """draw() of two clips of four frames."""
    latents = normal(2, 4, 4, 8, 8) if latents is None else latents
    context = model.encode_text(["a red circle", "a"])
    return draw(model, context, latents, known, 12.0, [1, 2], Guidance(num_steps, **fields))


def test_known_frames_come_back_exactly_and_no_others_are_seen(model):
    latents, other = normal(2, 4, 4, 8, 8), normal(2, 4, 4, 8, 8, seed=3)
    other[:, [0, 2]] = latents[:, [0, 2]]
    result, same = (drawn(model, [0, 2], x, num_steps=2, level=40, text_scale=2.0, known_scale=0.5)
                    for x in (latents, other))
    assert result[:, [0, 2]].equal(latents[:, [0, 2]]) and result.equal(same)
    assert not (result[:, [1, 3]] == latents[:, [1, 3]]).any()


@pytest.mark.parametrize("spacing", ["trailing", "leading"])  # leading with 1 step begins at t = 1
def test_the_model_is_told_timestep_level_and_frame_rate(model, monkeypatch, spacing):
    told, forward = [], model.unet.forward
    monkeypatch.setattr(model, "diffusion",
                        dataclasses.replace(model.diffusion, timestep_spacing=spacing))
    monkeypatch.setattr(model.unet, "forward", lambda x, timesteps, context: (
        told.append(timesteps[0].tolist()) or forward(x, timesteps, context)))
    drawn(model, [0], level=40, text_scale=2.0, known_scale=0.5)
    # With the text, without it, and without known frames, which then have no noise.
    assert told == [[999, 40, 12], [999, 40, 12], [999, 0, 12]]


def test_guidance_by_the_text_ends_at_its_signal_to_noise_ratio(model):
    everywhere, nowhere, up_to_0, up_to_9 = (
        drawn(model, (), num_steps=2, text_scale=scale, max_snr=max_snr)
        for scale, max_snr in ((2.0, None), (1.0, None), (2.0, 0.0), (2.0, 1e9)))
    assert everywhere.equal(up_to_9) and not everywhere.equal(nowhere)
    # The first of the two steps has no signal, so it is the only one that is guided.
    assert not up_to_0.equal(everywhere) and not up_to_0.equal(nowhere)


@pytest.mark.parametrize("field, weight_without", [("known_scale", 0.0), ("text_scale", 1.0)])
def test_guidance_extrapolates(model, field, weight_without):
    # One step from pure noise: x0 is linear in the prediction, so the result is linear in w.
    without, half, whole = (drawn(model, [0], **{field: weight_without + w})
                            for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - without, (whole - without) / 2, rtol=1e-3, atol=1e-4)
    assert (whole - without).abs().max() > 1e-4
