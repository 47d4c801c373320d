"""What a model is shown, asked and taught about known frames."""

import dataclasses

import pytest
import torch
from helpers import build_unet, fresh_pipeline, unet_inputs
from recorded.rule import normal

from diffusion import Diffusion
from papers import known_frames
from papers.known_frames import Guidance, draw, nearest_known, show_known, widen


def test_each_frame_is_shown_one_known_frame_on_each_side():
    known = [False, True, False, False, True, False]
    # Before the first two known frames there is no side to choose from: both are after it.
    assert nearest_known(known) == [(1, 4), (1, 1), (1, 4), (1, 4), (4, 4), (4, 1)]


def test_behind_the_last_known_frame_the_nearest_and_the_farthest_are_shown():
    assert nearest_known([True, True, True, False, False])[3:] == [(2, 0), (2, 0)]


def test_a_single_known_frame_is_shown_twice():
    assert nearest_known([False, True, False]) == [(1, 1), (1, 1), (1, 1)]


def test_shown_channels_are_latents_distances_and_mask():
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(2, 3, 4, 5, 6)  # frame i is i everywhere
    shown = show_known(latents, torch.tensor([True, False, True]))
    assert shown.shape == (2, 3, 11, 5, 6)
    middle = shown[1, 1, :, 2, 3].tolist()
    assert middle == [0.0] * 4 + [2.0] * 4 + [-1 / 8, 1 / 8, 0.0]
    assert shown[0, 2, :, 0, 0].tolist() == [2.0] * 8 + [0.0, 0.0, 1.0]


def test_unknown_latents_are_not_read():
    known = torch.tensor([True, False, False])
    latents = normal(1, 3, 4, 2, 2)
    other = latents.clone()
    other[:, 1:] = float("nan")
    assert show_known(other, known).equal(show_known(latents, known))


def test_nothing_known_shows_zeros():
    assert show_known(normal(1, 3, 4, 2, 2), torch.zeros(3, dtype=torch.bool)).abs().max() == 0


def test_without_hold_only_the_mask_is_shown():
    shown = show_known(normal(1, 3, 4, 2, 2), torch.tensor([True, False, False]), hold=False)
    assert shown.flatten(2).tolist() == [[[1.0] * 4, [0.0] * 4, [0.0] * 4]]


@pytest.mark.parametrize("hold", [True, False])
def test_a_widened_unet_starts_as_the_plain_one(hold):
    unet = build_unet()
    latents, timesteps, context = unet_inputs()
    wide = widen(unet, hold)
    extra = normal(2, 3, wide.config.in_channels - 4, 8, 12, seed=7)
    conditions = torch.tensor([[30.0, 8.0], [0.0, 4.0]])
    plain = unet(latents, timesteps, context)
    drawn = wide(torch.cat([latents, extra], dim=2), timesteps, context, conditions)
    # Zero weights add nothing, but a convolution of more channels may sum in another order.
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-7)


@pytest.mark.parametrize("temporal", ["attention", "directed"])
def test_layers_with_parameters_for_each_frame_get_more_and_keep_the_old(temporal):
    unet = build_unet(temporal=temporal, max_frames=3)
    wide = widen(unet, max_frames=6)
    latents, timesteps, context = unet_inputs()
    x = torch.cat([latents, latents.new_zeros(2, 3, 11, 8, 12)], dim=2)
    conditions = torch.zeros(2, 2)
    torch.testing.assert_close(wide(x, timesteps, context, conditions),
                               unet(latents, timesteps, context), rtol=0, atol=1e-6)
    assert wide(torch.cat([x, x], dim=1), timesteps, context, conditions).isfinite().all()


def test_new_weights_and_embeddings_of_conditions_are_zero_at_first():
    wide = widen(build_unet())
    assert wide.conv_in.weight[:, 4:].abs().max() == 0
    for embedding in wide.condition_embeddings:
        assert embedding.linear_2.weight.abs().max() == embedding.linear_2.bias.abs().max() == 0


def test_conditions_are_embedded_like_the_timestep_and_added_to_it():
    wide = widen(build_unet())
    latents, timesteps, context = unet_inputs()
    x = torch.cat([latents, latents.new_zeros(2, 3, 11, 8, 12)], dim=2)
    plain = wide(x, timesteps, context, torch.tensor([[5.0, 8.0], [5.0, 8.0]]))
    # The embedding of the frame rate becomes that of the timestep: 8 frames a second are step 8.
    wide.condition_embeddings[1].load_state_dict(wide.time_embedding.state_dict())
    wide.time_embedding.linear_2.weight.data.zero_()
    wide.time_embedding.linear_2.bias.data.zero_()
    told = wide(x, timesteps, context, torch.tensor([[5.0, 37.0], [5.0, 2.0]]))
    assert timesteps.tolist() == [37, 2]
    torch.testing.assert_close(told, plain, rtol=0, atol=1e-6)


def test_a_level_of_zero_adds_no_noise_to_known_frames():
    diffusion, latents = Diffusion(), normal(2, 3, 4, 2, 2)
    noise = normal(2, 3, 4, 2, 2, seed=5)
    seen = known_frames.perturb(diffusion, latents, torch.tensor([0, 100]), noise)
    assert seen[0].equal(latents[0])
    assert seen[1].equal(diffusion.add_noise(latents, noise, torch.tensor([100, 100]))[1])


class Numbers(torch.nn.Module):
    """A U-Net that answers the first channels of what it sees, times 2, plus its conditions."""

    def __init__(self):
        super().__init__()
        self.config = dataclasses.replace(widen(build_unet()).config)

    def forward(self, x, timesteps, context, conditions):
        self.seen = x
        return 2 * x[:, :, :4] + conditions.sum(1).view(-1, 1, 1, 1, 1)


def test_the_loss_is_the_mean_over_unknown_frames():
    unet, diffusion = Numbers(), Diffusion()
    x0, noise, seen = (normal(2, 3, 4, 2, 2, seed=i) for i in range(3))
    timesteps, conditions = torch.tensor([10, 700]), torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    known = torch.tensor([True, False, False])
    loss = known_frames.known_frames_loss(unet, diffusion, x0, noise, timesteps, None, seen, known,
                                          conditions)
    total = 0.0
    for clip in range(2):
        alpha_bar = diffusion.alphas_cumprod[timesteps[clip]]
        for frame in (1, 2):
            x_t = alpha_bar.sqrt() * x0[clip, frame] + (1 - alpha_bar).sqrt() * noise[clip, frame]
            error = 2 * x_t + conditions[clip].sum() - noise[clip, frame]
            total += error.square().sum() / (2 * 2 * 4 * 2 * 2)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_the_model_sees_known_frames_without_the_noise_of_the_timestep():
    unet, seen = Numbers(), normal(2, 3, 4, 2, 2, seed=2)
    known = torch.tensor([True, False, True])
    known_frames.predict(unet, normal(2, 3, 4, 2, 2), torch.tensor([9, 9]), None, seen, known,
                         torch.zeros(2, 2))
    assert unet.seen[:, 0, :4].equal(seen[:, 0]) and unet.seen[:, 2, :4].equal(seen[:, 2])
    assert unet.seen[:, 1, :4].equal(normal(2, 3, 4, 2, 2)[:, 1])


@pytest.fixture(scope="module")
def model():
    """An untrained model for known frames, whose new weights are not zero."""
    pipeline = fresh_pipeline()
    pipeline.unet = widen(pipeline.unet)
    for parameter in pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return pipeline.to("cpu")


def test_known_frames_come_back_exactly(model):
    latents, known = normal(2, 4, 4, 8, 8), torch.tensor([True, False, True, False])
    context = model.encode_text(["a red circle", "a"])
    how = Guidance(num_steps=2, level=40, text=2.0, known=0.5)
    drawn = draw(model, context, latents, known, 8.0, [1, 2], how)
    assert drawn[:, known].equal(latents[:, known])
    assert not drawn[:, ~known].isnan().any() and not drawn[:, ~known].equal(latents[:, ~known])


def test_a_window_does_not_depend_on_frames_it_may_not_see(model):
    latents, known = normal(1, 4, 4, 8, 8), torch.tensor([True, False, True, False])
    other = latents.clone()
    other[:, ~known] = 100.0
    context = model.encode_text(["a red circle"])
    results = [draw(model, context, x, known, 8.0, [1], Guidance()) for x in (latents, other)]
    assert results[0].equal(results[1])


def test_guidance_by_the_text_ends_at_its_ratio_of_signal_to_noise(model):
    latents, known = normal(1, 3, 4, 8, 8), torch.zeros(3, dtype=torch.bool)
    context = model.encode_text(["a red circle"])
    everywhere, nowhere, up_to_0, up_to_9 = (
        draw(model, context, latents, known, 8.0, [3], Guidance(2, text=scale, max_snr=max_snr))
        for scale, max_snr in ((2.0, None), (1.0, None), (2.0, 0.0), (2.0, 1e9)))
    assert everywhere.equal(up_to_9) and not everywhere.equal(nowhere)
    # The first of the two steps has no signal at all: it alone is guided.
    assert not up_to_0.equal(everywhere) and not up_to_0.equal(nowhere)


def test_guidance_by_known_frames_is_lvdms_formula(model):
    latents, known = normal(1, 3, 4, 8, 8), torch.tensor([True, False, False])
    context = model.encode_text(["a red circle"])
    # One step from pure noise: x0 is linear in the prediction, and so is the result in w.
    a, b, c = (draw(model, context, latents, known, 8.0, [3], Guidance(1, known=w))
               for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(b - a, (c - a) / 2, rtol=1e-3, atol=1e-4)
    assert (c - a).abs().max() > 1e-3


def test_a_run_without_known_frames_is_refused_with_the_command_that_trains_one(trained):
    with pytest.raises(ValueError, match=r"without known frames.*papers.long_video train RUN"):
        known_frames.load_model(trained)
