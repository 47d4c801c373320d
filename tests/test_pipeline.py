"""Sampling from text: what a clip depends on, guidance, and the settings."""

import dataclasses

import pytest
import torch
from helpers import fresh_pipeline
from recorded.rule import fill, normal

from diffusion import sample_loop
from pipeline import Sampling
from support.cli import Parser, add_flags, given_flags
from vae import encode_clip

PROMPTS = ["a red circle", "a blue square", "a red square"]
SAMPLING = Sampling(num_frames=3, image_size=16, num_steps=2, guidance_scale=2.5)


@pytest.fixture(scope="module")
def pipeline():
    """An untrained model whose output layer is not zero: texts and timesteps change its answers."""
    pipeline = fresh_pipeline()
    fill(pipeline.unet)
    return pipeline.to("cpu")


@pytest.fixture
def calls(pipeline, monkeypatch):
    """(clips, timesteps, context) of each call of the U-Net."""
    seen, forward = [], type(pipeline.unet).forward
    monkeypatch.setattr(type(pipeline.unet), "forward", lambda self, x, timesteps, context: (
        seen.append((x, timesteps, context)) or forward(self, x, timesteps, context)
    ))
    return seen


def last(pipeline, prompts, seeds, **options):
    *_, latents = pipeline.sample(prompts, seeds, dataclasses.replace(SAMPLING, **options))
    return latents


# Settings


@pytest.mark.parametrize("name, values", [
    ("num_frames", (1, 10**6)), ("image_size", (1, 10**6)), ("num_steps", (1, 10**6)),
    ("frames_per_second", (0.1, 50.0)), ("eta", (0.0, 1.0)), ("guidance_scale", (0.0, 1e6)),
    ("guidance_max_snr", (0.0, 1e6)), ("timestep_power", (0.1, 10.0)),
])
def test_flags_may_take_their_limits_and_no_more(capsys, name, values):
    def given(value):
        parser = Parser()
        add_flags(parser, Sampling())
        words = ["--" + name.replace("_", "-"), str(value)]
        return given_flags(parser.parse_args(words), Sampling())

    assert [given(value) for value in values] == [{name: value} for value in values]
    outside = [values[0] - 0.01] + [values[1] + 0.01] * (values[1] < 100)
    for value in outside if type(values[0]) is float else [values[0] - 1]:
        with pytest.raises(SystemExit):
            given(value)


def test_other_models_draw_16_frames_at_256_pixels_with_stable_diffusions_steps_and_guidance():
    assert Sampling() == Sampling(
        num_frames=16, image_size=256, frames_per_second=8.0, num_steps=50, guidance_scale=7.5,
        negative_prompt="",
        guidance_max_snr=None, timestep_power=1.0, sampler="ddim", eta=0.0,
    )


def test_without_settings_a_model_samples_with_its_own(pipeline):
    steps = list(pipeline.sample(PROMPTS[:1], [0]))  # the settings of fresh_pipeline
    assert len(steps) == 7 and steps[0].shape == (1, 5, 4, 10, 10)


def test_a_size_that_the_networks_cannot_halve_is_refused(pipeline):
    with pytest.raises(ValueError, match="image_size needs a multiple of 8, got 20"):
        last(pipeline, PROMPTS[:1], [0], image_size=20)


# Text and guidance


def test_a_model_without_a_tokenizer_names_the_remedy(pipeline):
    with pytest.raises(ValueError, match="has no tokenizer; name a merges file"):
        dataclasses.replace(pipeline, tokenizer=None).encode_text(["a cat"])


def test_one_guided_step_equals_the_formula(pipeline):
    guided = last(pipeline, PROMPTS[:1], [4], num_steps=1)
    x_t = torch.randn((1, 3, 4, 4, 4), generator=torch.Generator().manual_seed(4))
    t = pipeline.diffusion.timestep_pairs(1)[0][0]
    with torch.no_grad():
        text, none = (
            pipeline.unet(x_t, torch.tensor([t]), pipeline.encode_text([prompt]))
            for prompt in (PROMPTS[0], "")
        )
    assert (text - none).abs().max() > 1e-4
    expected = pipeline.diffusion.ddim_step(none + 2.5 * (text - none), x_t, t, -1)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=0)


def test_with_guidance_the_network_sees_each_clip_twice_without_its_text_and_with_it(
    pipeline, calls
):
    last(pipeline, PROMPTS[:2], [0, 1], guidance_scale=2.0)
    none, *texts = pipeline.encode_text(["", *PROMPTS[:2]])
    for x, timesteps, context in calls:
        assert torch.equal(x[:2], x[2:]) and len(set(timesteps.tolist())) == 1
        torch.testing.assert_close(context, torch.stack([none, none, *texts]), atol=1e-6, rtol=0)


def test_a_negative_prompt_takes_the_place_of_the_empty_text(pipeline):
    prompts, plain = PROMPTS[:2], last(pipeline, PROMPTS[:2], [0, 1], guidance_scale=1.0)
    same, other = (last(pipeline, prompts, [0, 1], guidance_scale=3.0, negative_prompt=text)
                   for text in (prompts[0], PROMPTS[2]))
    assert torch.allclose(same[0], plain[0], atol=1e-5)  # guidance away from a text, towards it
    assert (same[1] - plain[1]).abs().max() > 1e-3 and (other[0] - plain[0]).abs().max() > 1e-3


def test_guidance_ends_where_the_signal_is_stronger_than_its_limit(pipeline, calls):
    snr = [pipeline.diffusion.snr(t) for t, _ in pipeline.diffusion.timestep_pairs(4)]
    last(pipeline, PROMPTS[:2], [0, 1], num_steps=4, guidance_max_snr=snr[1])
    text = pipeline.encode_text(PROMPTS[:2])
    assert [len(x) for x, _, _ in calls] == [4, 4, 2, 2]  # the limit itself is guided
    assert all(torch.equal(context, text) for _, _, context in calls[2:])


def test_a_power_of_the_timesteps_reaches_the_network(pipeline, calls):
    last(pipeline, PROMPTS[:1], [0], num_steps=3, timestep_power=0.6)
    expected = [t for t, _ in pipeline.diffusion.timestep_pairs(3, 0.6)]
    assert [timesteps[0].item() for _, timesteps, _ in calls] == expected


# A clip's prompt and seed


@pytest.mark.parametrize("options", [
    {}, {"sampler": "ddpm"}, {"eta": 1.0, "guidance_scale": 1.0},
], ids=["ddim", "ddpm", "eta 1, no guidance"])
def test_a_clip_depends_on_its_own_prompt_and_seed(pipeline, options):
    together = last(pipeline, PROMPTS, [5, 9, 7], **options)
    for i, seed in enumerate([5, 9, 7]):
        alone = last(pipeline, PROMPTS[i : i + 1], [seed], **options)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"eta": 0.5}])
def test_sampler_and_eta_reach_the_steps(pipeline, calls, options):
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(1, 3, 4, 4, 4, generator=generator)
    context = pipeline.encode_text(PROMPTS[:1])
    with torch.no_grad():
        *_, expected = sample_loop(
            pipeline.diffusion, lambda x, t: pipeline.unet(x, torch.tensor([t]), context), x_t, 2,
            options.get("sampler", "ddim"), options.get("eta", 0.0), [generator])
    drawn = last(pipeline, PROMPTS[:1], [5], guidance_scale=1.0, **options)
    assert [len(x) for x, *_ in calls] == 4 * [1]  # without guidance, one clip per step
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


# Networks and pixels


def test_decoding_undoes_the_encoding_and_its_scale(pipeline):
    clip = (normal(3, 3, 16, 16).clamp(-1, 1) + 1) * 127.5
    latents = encode_clip(pipeline.vae, clip)
    expected = pipeline.vae.decode(latents / 0.7).clamp(-1, 1)  # 0.7: its scaling_factor
    assert torch.equal(pipeline.decode(latents[None])[0], expected)
