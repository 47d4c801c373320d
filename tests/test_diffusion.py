"""Diffusion against closed forms, and against whole runs of diffusers' samplers.

recorded/README.md says how the recorded numbers were made.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import RECORDED
from recorded.rule import normal

from diffusion import Diffusion, classifier_free_guidance, randn, sample_loop, schedule_for

SD1 = {}  # the defaults
SD2 = {"prediction_type": "v_prediction"}
ZERO_SNR = {**SD2, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
SPACINGS = ["leading", "trailing", "linspace"]
# alpha_bar is 0.36 at t = 0 and 0.36 * 0.64 = 0.2304 at t = 1, with roots 0.6 and 0.48.
ROUND = {"num_train_timesteps": 2, "trained_betas": (0.64, 0.36)}
REST = math.sqrt(1 - 0.2304)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# Schedules


@pytest.mark.parametrize("name, options", [
    ("linear", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ("scaled_linear", SD1),
    ("squaredcos_cap_v2", {"beta_schedule": "squaredcos_cap_v2"}),
    ("zero snr", ZERO_SNR),
])
def test_alpha_bar_equals_that_of_diffusers(name, options):
    actual = Diffusion(**options).alphas_cumprod[[0, 1, 500, 998, 999]]
    expected = tensor(*RECORDED["alphas_cumprod"][name])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)  # diffusers' is float32


def test_trained_betas_replace_the_schedule():
    diffusion = Diffusion(num_train_timesteps=3, trained_betas=(0.5, 0.2, 0.1))
    expected = tensor(0.5, 0.5 * 0.8, 0.5 * 0.8 * 0.9)
    torch.testing.assert_close(diffusion.alphas_cumprod, expected)


def test_zero_terminal_snr_moves_and_stretches_the_signal_from_its_first_value_to_zero():
    before, after = (Diffusion(**kind).alphas_cumprod.sqrt() for kind in (SD1, ZERO_SNR))
    torch.testing.assert_close(after, before[0] * (before - before[-1]) / (before[0] - before[-1]))
    assert after[-1] == 0


def test_without_options_the_schedule_is_stable_diffusions():
    for kind in ("epsilon", "v_prediction"):
        assert schedule_for(kind) == Diffusion(prediction_type=kind)


@pytest.mark.parametrize("prediction, zero_terminal, k, spacing", [
    ("epsilon", False, 4.0, "leading"), ("v_prediction", True, 1.0, "trailing"),
    ("v_prediction", True, 4.0, "trailing"),
])
def test_a_divisor_divides_every_signal_to_noise_ratio(prediction, zero_terminal, k, spacing):
    diffusion = schedule_for(prediction, zero_terminal, k)
    base = Diffusion(**ZERO_SNR) if zero_terminal else Diffusion()
    expected = [base.snr(t) / k for t in range(1000)]
    assert [diffusion.snr(t) for t in range(1000)] == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert (diffusion.prediction_type, diffusion.timestep_spacing) == (prediction, spacing)
    assert diffusion.set_alpha_to_one  # the last step ends at x0


@pytest.mark.parametrize("options, message", [
    ({"prediction_type": "sample"}, "prediction_type needs one of .* got 'sample'"),
    ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({"trained_betas": (0.1, 0.2)}, "betas need num_train_timesteps"),
    ({"num_train_timesteps": 1}, "betas need num_train_timesteps >= 2"),
    ({"num_train_timesteps": 2, "trained_betas": (0.1, 1.1)}, r"values in \(0, 1\]"),
    ({"num_train_timesteps": 2, "trained_betas": (0.0, 0.1)}, r"values in \(0, 1\]"),
    ({"num_train_timesteps": 2, "trained_betas": (1.0, 0.5)}, "only the last may be 1"),
    ({"beta_end": float("nan")}, r"values in \(0, 1\]"),
])
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


# Noise in and out


def test_noise_is_added_as_worked_out_by_hand():
    x0, noise = tensor([10, 20], [1, 2]), tensor([5, -5], [1, 0])
    noisy = Diffusion(**ROUND).add_noise(x0, noise, torch.tensor([0, 1]))
    expected = tensor([0.6 * 10 + 0.8 * 5, 0.6 * 20 - 0.8 * 5], [0.48 + REST, 0.96])
    torch.testing.assert_close(noisy, expected)


def test_the_target_is_the_noise_or_v():
    x0, noise, timesteps = tensor([10]), tensor([5]), torch.tensor([0])
    assert torch.equal(Diffusion(**ROUND).target(x0, noise, timesteps), noise)
    v = Diffusion(**ROUND, **SD2).target(x0, noise, timesteps)
    torch.testing.assert_close(v, tensor([0.6 * 5 - 0.8 * 10]))


@pytest.mark.parametrize("prediction", [SD1, SD2, ZERO_SNR], ids=["epsilon", "v", "zero snr"])
def test_a_perfect_prediction_gives_back_x0_and_noise(prediction):
    diffusion = Diffusion(**prediction)
    x0, noise = normal(2, 3, seed=1).double(), normal(2, 3, seed=2).double()
    for t in (0, 500, 999):
        timesteps = torch.tensor([t, t])
        x_t = diffusion.add_noise(x0, noise, timesteps)
        predicted = diffusion.predict(diffusion.target(x0, noise, timesteps), x_t, t)
        torch.testing.assert_close(predicted, (x0, noise))


def test_coefficients_are_the_float64_roots_rounded_to_the_dtype_of_the_latents():
    diffusion, timesteps = Diffusion(**SD2), torch.arange(1000)
    for dtype, precision in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8)):
        one, zero = torch.ones(1000, 1, dtype=dtype), torch.zeros(1000, 1, dtype=dtype)
        signal = diffusion.add_noise(one, zero, timesteps)[:, 0]
        noise_scale = -diffusion.target(one, zero, timesteps)[:, 0]
        alpha_bar = diffusion.alphas_cumprod
        assert signal.dtype == noise_scale.dtype == dtype
        for actual, square in ((signal, alpha_bar), (noise_scale, 1 - alpha_bar)):
            torch.testing.assert_close(actual.double(), square.sqrt(), rtol=precision, atol=0)


def test_the_signal_to_noise_ratio_by_hand():
    assert Diffusion(**ROUND).snr(1) == pytest.approx(0.2304 / 0.7696)


# Timesteps


def steps_of(num_steps, spacing="leading", total=1000, **options):
    pairs = Diffusion(num_train_timesteps=total, timestep_spacing=spacing).timestep_pairs(
        num_steps, **options)
    assert [t_prev for _, t_prev in pairs] == [t for t, _ in pairs[1:]] + [-1]
    return [t for t, _ in pairs]


@pytest.mark.parametrize("spacing, num_steps, first", [
    ("leading", 50, [981, 961, 941]), ("leading", 30, [958, 925, 892]), ("leading", 1, [1]),
    ("leading", 1000, [999, 998, 997]), ("trailing", 10, [999, 899, 799]), ("trailing", 1, [999]),
    ("trailing", 3, [999, 666, 332]), ("linspace", 10, [999, 888, 777]),
])
def test_timesteps_begin_where_stable_diffusion_begins(spacing, num_steps, first):
    assert steps_of(num_steps, spacing)[:3] == first


@pytest.mark.parametrize("total", [2, 7, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_has_that_many_falling_timesteps(spacing, total):
    for num_steps in range(1, total + 1, max(1, total // 50)):
        steps = steps_of(num_steps, spacing, total)
        assert len(steps) == num_steps
        assert all(a > b for a, b in itertools.pairwise([total, *steps, -1]))


@pytest.mark.parametrize("num_steps", [50, 80, 160, 400])
def test_trailing_rounds_halves_as_diffusers_does(num_steps):
    """80 steps of 12.5 end on halves: 1 - i / 80 instead of a difference would round otherwise."""
    expected = (np.round(np.arange(1000, 0, -1000 / num_steps)) - 1).tolist()
    assert steps_of(num_steps, "trailing") == expected


def test_the_power_of_timesteps_by_hand():
    assert steps_of(4, power=0.5) == [999, 865, 706, 499]  # 1000 sqrt(1 - i / 4), rounded, - 1
    assert steps_of(50, power=2)[-2:] == [1, 0]  # 1000 (2 / 50)^2 = 1.6, 1000 (1 / 50)^2 = 0.4


@pytest.mark.parametrize("num_steps, power, message", [
    (0, 1.0, r"num_steps needs to lie in \[1, 1000\], got 0"),
    (1001, 1.0, r"num_steps needs to lie in \[1, 1000\], got 1001"),
    (900, 0.6, "timestep_power 0.6 needs fewer than 900 steps"),
])
def test_impossible_numbers_of_steps_are_refused(num_steps, power, message):
    with pytest.raises(ValueError, match=message):
        Diffusion().timestep_pairs(num_steps, power)


# Steps


def test_a_ddim_step_by_hand():
    x_t = tensor([0.48 * 10 + REST * 5])  # from alpha_bar 0.2304 to 0.36
    stepped = Diffusion(**ROUND).ddim_step(tensor([5]), x_t, 1, 0)
    torch.testing.assert_close(stepped, tensor([0.6 * 10 + 0.8 * 5]))


@pytest.mark.parametrize("set_alpha_to_one, expected", [(False, 0.6 * 10 + 0.8 * 5), (True, 10)])
def test_the_last_step_goes_to_the_first_alpha_bar_or_to_one(set_alpha_to_one, expected):
    diffusion = Diffusion(**ROUND, set_alpha_to_one=set_alpha_to_one)
    stepped = diffusion.ddim_step(tensor([5]), tensor([0.48 * 10 + REST * 5]), 1, -1)
    torch.testing.assert_close(stepped, tensor([expected]))


@pytest.mark.parametrize("t, t_prev", [(981, 961), (500, 0), (1, 0), (20, -1)])
def test_ddim_with_eta_one_is_ddpm(t, t_prev):
    diffusion = Diffusion(set_alpha_to_one=True)  # as in DDPM
    output, x_t = normal(2, 3, seed=1).double(), normal(2, 3, seed=2).double()
    a, b = generators(7, 7)  # the same noise
    ddim = diffusion.ddim_step(output, x_t, t, t_prev, eta=1.0, generator=a)
    torch.testing.assert_close(ddim, diffusion.ddpm_step(output, x_t, t, t_prev, generator=b))


def test_a_ddpm_step_is_bayes_rule(monkeypatch):
    """x_prev given x_t and x0 is the product of two Gaussians, q(x_prev | x0) q(x_t | x_prev)."""
    diffusion, t, t_prev, x0, x_t = Diffusion(), 700, 650, 0.3, 0.8
    alpha_bar, alpha_bar_prev = diffusion.alphas_cumprod[[t, t_prev]].tolist()
    alpha = alpha_bar / alpha_bar_prev
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (math.sqrt(alpha_bar_prev) * x0 / (1 - alpha_bar_prev)
            + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    eps = (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    for noise in (0.0, 1.0):
        monkeypatch.setattr("diffusion.randn", lambda shape, *_, n=noise: torch.full(shape, n))
        stepped = diffusion.ddpm_step(tensor([eps]), tensor([x_t]), t, t_prev).item()
        assert stepped == pytest.approx(mean + noise / math.sqrt(precision), rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 11])  # where rounding makes the rest -1e-17
def test_zero_terminal_snr_can_be_sampled_with_full_noise(num_steps):
    *_, sample = sample_loop(
        Diffusion(**ZERO_SNR), lambda x, t: 0 * x, normal(1, 4), num_steps, eta=1.0)
    assert sample.isfinite().all()


# Whole samplers


TRAJECTORIES = {
    "ddim sd1": (SD1, "ddim", 0.0),
    "ddim sd2": (SD2, "ddim", 0.0),
    "ddim zero snr": (ZERO_SNR, "ddim", 0.0),
    "ddim sd1 eta": (SD1, "ddim", 0.7),
    "ddim trained betas": (
        {"trained_betas": tuple(0.0001 + 0.02 * (i / 999) ** 3 for i in range(1000)),
         "set_alpha_to_one": True, "steps_offset": 0}, "ddim", 0.0),
    "ddpm sd1": (SD1, "ddpm", 0.0),
    "ddpm sd2": ({**SD2, "timestep_spacing": "trailing"}, "ddpm", 0.0),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_whole_run_equals_that_of_diffusers_at_each_of_its_steps(name):
    options, sampler, eta = TRAJECTORIES[name]
    diffusion, generator, seen = Diffusion(**options), generators(3)[0], []

    def model(x_t, t):
        seen.append(t)
        return torch.tanh(x_t + t / 1000)

    states = list(sample_loop(diffusion, model, normal(1, 4), 10, sampler, eta, generator))
    assert seen == [t for t, _ in diffusion.timestep_pairs(10)]
    expected = torch.tensor(RECORDED["trajectories"][name])
    torch.testing.assert_close(torch.cat(states), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.0, 7.5])
def test_guidance_is_that_of_the_paper_at_every_scale(scale):
    unconditional, conditional = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 0.0, 4.0])
    w = scale - 1  # eq. 6: (1 + w) eps(z, c) - w eps(z)
    expected = (1 + w) * conditional - w * unconditional
    assert torch.equal(classifier_free_guidance(unconditional, conditional, scale), expected)


# Randomness


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_a_clip_does_not_depend_on_the_clips_beside_it(sampler, eta):
    def sample(*seeds):
        each = generators(*seeds)
        start = randn((len(seeds), 3, 4, 2, 5), each)
        return list(
            sample_loop(Diffusion(), lambda x, t: x.tanh(), start, 4, sampler, eta, each))[-1]

    assert torch.equal(sample(11, 12, 13)[1:2], sample(12))


def test_noise_has_unit_variance_and_frames_and_clips_share_none():
    noise = randn((2, 3, 4, 100, 101), torch.Generator().manual_seed(0))
    covariance = torch.cov(noise.flatten(0, 1).flatten(1))  # of the six frames
    torch.testing.assert_close(covariance, torch.eye(6), atol=0.015, rtol=0)
