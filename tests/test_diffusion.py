"""Diffusion against closed forms, and against whole runs of diffusers' samplers.

How the recorded numbers were made stands in recorded/README.md.
"""

import itertools
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded.rule import normal

from diffusion import Diffusion, classifier_free_guidance, randn, sample_loop

RECORDED = json.loads((Path(__file__).parent / "recorded" / "diffusers.json").read_text())
SD1 = {}  # the defaults
SD2 = {"prediction_type": "v_prediction"}
ZERO_SNR = {**SD2, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
SPACINGS = ["leading", "trailing", "linspace"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def coefficients(diffusion, t):
    """sqrt(alpha_bar), sqrt(1 - alpha_bar) at t."""
    alpha_bar = diffusion.alphas_cumprod[t].item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


# Schedules


def by_formula(name, steps=1000):
    """The betas of a schedule, one at a time."""
    for i in range(steps):
        u = i / (steps - 1)
        if name == "linear":
            yield (1 - u) * 0.00085 + u * 0.012
        elif name == "scaled_linear":
            yield ((1 - u) * math.sqrt(0.00085) + u * math.sqrt(0.012)) ** 2
        else:
            angles = [(j / steps + 0.008) / 1.008 * math.pi / 2 for j in (i, i + 1)]
            yield min(1 - math.cos(angles[1]) ** 2 / math.cos(angles[0]) ** 2, 0.999)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alpha_bar_is_the_product_of_one_minus_beta(name):
    alpha_bars = itertools.accumulate((1 - beta for beta in by_formula(name)), lambda a, b: a * b)
    expected = torch.tensor(list(alpha_bars), dtype=torch.float64)
    actual = Diffusion(beta_schedule=name).alphas_cumprod
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_stable_diffusion_ends_with_seven_percent_of_the_signal():
    signal, _ = coefficients(Diffusion(), 999)
    assert signal == pytest.approx(0.068265, abs=1e-6)  # Lin et al. 2023, table 1


@pytest.mark.parametrize("name, options", [
    ("linear", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ("scaled_linear", SD1),
    ("squaredcos_cap_v2", {"beta_schedule": "squaredcos_cap_v2"}),
    ("zero snr", ZERO_SNR),
])
def test_alpha_bar_equals_that_of_diffusers(name, options):
    actual = Diffusion(**options).alphas_cumprod[[0, 1, 500, 998, 999]]
    expected = torch.tensor(RECORDED["alphas_cumprod"][name], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)  # diffusers' is float32


def test_trained_betas_replace_the_schedule():
    diffusion = Diffusion(num_train_timesteps=3, trained_betas=(0.5, 0.2, 0.1))
    expected = torch.tensor([0.5, 0.5 * 0.8, 0.5 * 0.8 * 0.9], dtype=torch.float64)
    torch.testing.assert_close(diffusion.alphas_cumprod, expected)


def test_zero_terminal_snr_ends_in_pure_noise():
    assert Diffusion(**ZERO_SNR).alphas_cumprod[-1] == 0


def test_zero_terminal_snr_keeps_the_first_step():
    before, after = Diffusion().alphas_cumprod, Diffusion(**ZERO_SNR).alphas_cumprod
    torch.testing.assert_close(after[0], before[0])


def test_zero_terminal_snr_moves_and_stretches_the_signal():
    before, after = (Diffusion(**kind).alphas_cumprod.sqrt() for kind in (SD1, ZERO_SNR))
    slopes = after.diff() / before.diff()
    torch.testing.assert_close(slopes, slopes[:1].expand(999))


@pytest.mark.parametrize("options, message", [
    ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({"num_train_timesteps": 2, "trained_betas": (0.1, 1.0)}, "zero terminal SNR"),
    ({"prediction_type": "sample"}, "prediction_type needs one of .* got 'sample'"),
    ({"timestep_spacing": "even"}, "timestep_spacing needs one of .* got 'even'"),
    ({"beta_schedule": "cosine"}, "beta_schedule needs one of .* got 'cosine'"),
    ({"num_train_timesteps": 1}, "num_train_timesteps needs >= 2 and steps_offset >= 0, got 1"),
    ({"steps_offset": -1}, "steps_offset >= 0, got 1000 and -1"),
    ({"trained_betas": (0.1, 0.2)}, "trained_betas needs 1000 values, got 2"),
    ({"num_train_timesteps": 2, "trained_betas": (0.1, 1.1)}, r"betas need to lie in \(0, 1\]"),
    ({"num_train_timesteps": 2, "trained_betas": (1.0, 0.5)}, "only the last may be 1"),
    ({"beta_end": float("nan")}, r"betas need to lie in \(0, 1\]"),
])
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


def test_reads_the_scheduler_config_of_stable_diffusion():
    config = json.loads("""{
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
        "trained_betas": null, "clip_sample": false
    }""")
    names = {field.name for field in fields(Diffusion) if field.init}
    assert Diffusion(**{name: config[name] for name in names & set(config)}) == Diffusion()


# Noise in and out

# alpha_bar is 0.36 at t = 0 and 0.36 * 0.64 = 0.2304 at t = 1, with roots 0.6 and 0.48.
ROUND = {"num_train_timesteps": 2, "trained_betas": (0.64, 0.36)}


def test_noise_is_added_as_worked_out_by_hand():
    diffusion = Diffusion(**ROUND)
    x0, noise = torch.tensor([[10.0, 20.0], [1.0, 2.0]]), torch.tensor([[5.0, -5.0], [1.0, 0.0]])
    noisy = diffusion.add_noise(x0, noise, torch.tensor([0, 1]))
    rest = math.sqrt(1 - 0.2304)
    expected = torch.tensor([[0.6 * 10 + 0.8 * 5, 0.6 * 20 - 0.8 * 5], [0.48 + rest, 0.96]])
    torch.testing.assert_close(noisy, expected)


def test_target_is_the_noise_or_v():
    x0, noise, timesteps = torch.tensor([[10.0]]), torch.tensor([[5.0]]), torch.tensor([0])
    epsilon = Diffusion(**ROUND).target(x0, noise, timesteps)
    v = Diffusion(**ROUND, **SD2).target(x0, noise, timesteps)
    torch.testing.assert_close(torch.cat([epsilon, v]), torch.tensor([[5.0], [0.6 * 5 - 0.8 * 10]]))


@pytest.mark.parametrize("prediction", [SD1, SD2, ZERO_SNR], ids=["epsilon", "v", "zero snr"])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_perfect_prediction_gives_back_x0_and_noise(prediction, t):
    diffusion = Diffusion(**prediction)
    x0, noise = normal(2, 3, seed=1).double(), normal(2, 3, seed=2).double()
    timesteps = torch.tensor([t, t])
    x_t = diffusion.add_noise(x0, noise, timesteps)
    predicted = diffusion.predict(diffusion.target(x0, noise, timesteps), x_t, t)
    torch.testing.assert_close(predicted, (x0, noise))


def test_epsilon_and_v_sample_the_same_clip():
    eps, v = Diffusion(), Diffusion(**SD2)

    def as_v(x_t, t):  # the same opinion about x0, said as v
        signal, sigma = coefficients(v, t)
        noise = torch.tanh(x_t)
        return signal * noise - sigma * (x_t - sigma * noise) / signal

    start = normal(2, 3, seed=1).double()
    *_, expected = sample_loop(eps, lambda x_t, t: torch.tanh(x_t), start, 10)
    *_, actual = sample_loop(v, as_v, start, 10)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("method", ["add_noise", "target"])
def test_coefficients_keep_the_dtype_of_the_latents(method):
    x0 = torch.ones(2, 3, dtype=torch.bfloat16)
    out = getattr(Diffusion(**SD2), method)(x0, x0, torch.tensor([0, 999]))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("prediction", [SD1, ZERO_SNR], ids=["epsilon", "zero snr"])
def test_tables_are_the_float64_roots_rounded_and_made_once(prediction):
    diffusion, x0 = Diffusion(**prediction), torch.ones(1000, 1)
    steps = torch.arange(1000)
    for noise in (0.0, 1.0):
        drawn = diffusion.add_noise(x0 * (1 - noise), x0 * noise, steps).double()[:, 0]
        share = diffusion.alphas_cumprod if noise == 0 else 1 - diffusion.alphas_cumprod
        torch.testing.assert_close(drawn, share.sqrt(), rtol=2**-24, atol=0)
    (tables,) = diffusion._tables.values()
    diffusion.target(x0, x0, steps)
    assert list(diffusion._tables) == [(torch.device("cpu"), torch.float32)]
    assert diffusion._tables[torch.device("cpu"), torch.float32] is tables
    assert diffusion == Diffusion(**prediction)


# Timesteps


@pytest.mark.parametrize("spacing, num_steps, first", [
    ("leading", 50, [981, 961, 941]), ("leading", 30, [958, 925, 892]), ("leading", 1, [1]),
    ("leading", 1000, [999, 998, 997]), ("trailing", 10, [999, 899, 799]), ("trailing", 1, [999]),
    ("trailing", 3, [999, 666, 332]), ("linspace", 10, [999, 888, 777]),
])
def test_timesteps_begin_where_stable_diffusion_begins(spacing, num_steps, first):
    pairs = Diffusion(timestep_spacing=spacing).timestep_pairs(num_steps)
    assert [t for t, _ in pairs[:3]] == first


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_sampler_takes_exactly_the_steps_asked_for(spacing):
    diffusion = Diffusion(timestep_spacing=spacing)
    assert [len(diffusion.timestep_pairs(n)) for n in range(1, 1001)] == list(range(1, 1001))


@pytest.mark.parametrize("total", [2, 7, 100])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_fall_strictly_inside_the_schedule(spacing, total):
    diffusion = Diffusion(num_train_timesteps=total, timestep_spacing=spacing)
    for num_steps in range(1, total + 1):
        steps = [total, *(t for t, _ in diffusion.timestep_pairs(num_steps)), -1]
        assert all(a > b for a, b in itertools.pairwise(steps)), num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_each_step_begins_where_the_one_before_ended(spacing):
    pairs = Diffusion(timestep_spacing=spacing).timestep_pairs(30)
    assert [t_prev for _, t_prev in pairs] == [t for t, _ in pairs[1:]] + [-1]


@pytest.mark.parametrize("num_steps", [50, 80, 160, 400])
def test_trailing_rounds_halves_as_diffusers_does(num_steps):
    """80 steps of 12.5 end on halves: 1 - i / 80 in place of a difference would round otherwise."""
    steps = [t for t, _ in Diffusion(timestep_spacing="trailing").timestep_pairs(num_steps)]
    assert steps == (np.round(np.arange(1000, 0, -1000 / num_steps)) - 1).tolist()


def test_the_power_of_timesteps_by_hand():
    steps = [t for t, _ in Diffusion(timestep_spacing="leading").timestep_pairs(4, 0.5)]
    assert steps == [999, 865, 706, 499]  # 1000 sqrt(1 - i / 4), rounded, - 1
    assert Diffusion().timestep_pairs(50, 2)[-2:] == [(1, 0), (0, -1)]
    with pytest.raises(ValueError, match="timestep_power 0.6 needs fewer than 900 steps"):
        Diffusion().timestep_pairs(900, 0.6)


def test_the_ratio_of_signal_to_noise_by_hand():
    diffusion = Diffusion(**ZERO_SNR)
    signal, sigma = coefficients(diffusion, 300)
    assert diffusion.snr(300) == pytest.approx(signal**2 / sigma**2)
    assert diffusion.snr(999) == 0


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_refuses_an_impossible_number_of_steps(num_steps):
    message = rf"num_steps needs to lie in \[1, 1000\], got {num_steps}"
    with pytest.raises(ValueError, match=message):
        Diffusion().timestep_pairs(num_steps)


# Steps


def test_a_ddim_step_by_hand():
    diffusion = Diffusion(**ROUND)  # from alpha_bar 0.2304 to 0.36
    x0, eps = torch.tensor([[10.0]]), torch.tensor([[5.0]])
    x_t = 0.48 * x0 + math.sqrt(1 - 0.2304) * eps
    stepped = diffusion.ddim_step(eps, x_t, 1, 0)
    torch.testing.assert_close(stepped, torch.tensor([[0.6 * 10 + 0.8 * 5]]))


@pytest.mark.parametrize("set_alpha_to_one, expected", [(False, 0.6 * 10 + 0.8 * 5), (True, 10.0)])
def test_the_last_step_goes_to_the_first_alpha_bar_or_to_one(set_alpha_to_one, expected):
    diffusion = Diffusion(**ROUND, set_alpha_to_one=set_alpha_to_one)
    x_t = torch.tensor([[0.48 * 10 + math.sqrt(1 - 0.2304) * 5]])
    stepped = diffusion.ddim_step(torch.tensor([[5.0]]), x_t, 1, -1)
    torch.testing.assert_close(stepped, torch.tensor([[expected]]))


@pytest.mark.parametrize("t, t_prev", [(981, 961), (500, 0), (1, 0), (20, -1)])
def test_ddim_with_eta_one_is_ddpm(t, t_prev):
    diffusion = Diffusion(set_alpha_to_one=True)  # as DDPM has it
    output, x_t = normal(2, 3, seed=1).double(), normal(2, 3, seed=2).double()
    (a, b) = generators(7, 7)  # the same noise
    ddim = diffusion.ddim_step(output, x_t, t, t_prev, eta=1.0, generator=a)
    torch.testing.assert_close(ddim, diffusion.ddpm_step(output, x_t, t, t_prev, generator=b))


def test_ddpm_step_is_bayes_rule(monkeypatch):
    """x_prev given x_t and x0 is the product of two Gaussians, q(x_prev | x0) q(x_t | x_prev)."""
    diffusion, t, t_prev, x0, x_t = Diffusion(), 700, 650, 0.3, 0.8
    alpha_bar, alpha_bar_prev = diffusion.alphas_cumprod[[t, t_prev]].tolist()
    alpha = alpha_bar / alpha_bar_prev
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (math.sqrt(alpha_bar_prev) * x0 / (1 - alpha_bar_prev)
            + math.sqrt(alpha) * 0.8 / (1 - alpha)) / precision
    x_t = torch.tensor([[x_t]], dtype=torch.float64)
    eps = (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    for noise in (0.0, 1.0):
        monkeypatch.setattr("diffusion.randn", lambda shape, *_, n=noise: torch.full(shape, n))
        stepped = diffusion.ddpm_step(eps, x_t, t, t_prev).item()
        assert stepped == pytest.approx(mean + noise / math.sqrt(precision), rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 11])  # where rounding makes the rest -1e-17
def test_zero_terminal_snr_can_be_sampled_with_full_noise(num_steps):
    model = lambda x, t: torch.zeros_like(x)  # noqa: E731
    *_, sample = sample_loop(Diffusion(**ZERO_SNR), model, normal(1, 4), num_steps, eta=1.0)
    assert sample.isfinite().all()


@pytest.mark.parametrize("step", ["ddim_step", "ddpm_step"])
def test_steps_do_not_write_into_their_arguments(step):
    output, x_t = normal(2, 3, seed=1), normal(2, 3, seed=2)
    getattr(Diffusion(), step)(output, x_t, 500, 480)
    assert torch.equal(output, normal(2, 3, seed=1)) and torch.equal(x_t, normal(2, 3, seed=2))


# Whole samplers


class Perfect:
    """The best possible model of data N(mean, deviation^2), in closed form."""

    def __init__(self, diffusion, mean, deviation):
        self.diffusion, self.mean, self.deviation = diffusion, mean, deviation

    def __call__(self, x_t, t):
        signal, sigma = coefficients(self.diffusion, t)
        gain = signal * self.deviation**2 / (signal**2 * self.deviation**2 + sigma**2)
        x0 = self.mean + gain * (x_t - signal * self.mean)
        eps = (x_t - signal * x0) / sigma
        return eps if self.diffusion.prediction_type == "epsilon" else signal * eps - sigma * x0


@pytest.mark.parametrize("options", [SD1, SD2], ids=["epsilon", "v"])
def test_ddim_follows_the_flow_that_keeps_the_rank_of_a_gaussian(options):
    """The flow is known: a value 1.3 deviations above the mean of its noise level remains so."""
    diffusion = Diffusion(**options)
    signal, sigma = coefficients(diffusion, 999)
    ranks = torch.tensor([[-1.0, 0.0, 1.3]], dtype=torch.float64)
    start = signal * 2.0 + math.hypot(signal * 0.5, sigma) * ranks
    *_, sample = sample_loop(diffusion, Perfect(diffusion, 2.0, 0.5), start, 1000)
    torch.testing.assert_close(sample, 2.0 + 0.5 * ranks, atol=0.005, rtol=0)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_noisy_samplers_reach_the_mean_and_deviation_of_the_data(sampler, eta):
    diffusion = Diffusion(timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(0)
    signal, sigma = coefficients(diffusion, 999)
    start = signal * 2.0 + math.hypot(signal * 0.5, sigma) * randn((1, 20_000), generator)
    *_, sample = sample_loop(
        diffusion, Perfect(diffusion, 2.0, 0.5), start, 500, sampler, eta, generator
    )
    assert (sample.mean().item(), sample.std().item()) == pytest.approx((2.0, 0.5), abs=0.015)


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
def test_a_whole_run_equals_that_of_diffusers(name):
    options, sampler, eta = TRAJECTORIES[name]
    (generator,) = generators(3)
    model = lambda x, t: torch.tanh(x + t / 1000)  # noqa: E731
    states = sample_loop(Diffusion(**options), model, normal(1, 4), 10, sampler, eta, generator)
    torch.testing.assert_close(
        torch.cat(list(states)), torch.tensor(RECORDED["trajectories"][name]), atol=1e-4, rtol=0
    )


def test_the_loop_yields_once_a_step_and_ends_with_the_sample():
    diffusion, seen = Diffusion(), []

    def model(x_t, t):
        seen.append(t)
        return x_t

    states = list(sample_loop(diffusion, model, normal(2, 3), 7))
    assert seen == [t for t, _ in diffusion.timestep_pairs(7)] and len(states) == 7


def test_refuses_an_unknown_sampler():
    with pytest.raises(ValueError, match="sampler needs to be 'ddim' or 'ddpm', got 'plms'"):
        next(sample_loop(Diffusion(), None, normal(1, 2), 5, sampler="plms"))


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
        model = lambda x, t: torch.tanh(x)  # noqa: E731
        return list(sample_loop(Diffusion(), model, start, 4, sampler, eta, each))[-1]

    assert torch.equal(sample(11, 12, 13)[1:2], sample(12))


def test_noise_has_unit_variance_and_frames_and_clips_share_none():
    noise = randn((2, 3, 4, 100, 101), torch.Generator().manual_seed(0))
    covariance = torch.cov(noise.flatten(0, 1).flatten(1))  # of the six frames
    torch.testing.assert_close(covariance, torch.eye(6), atol=0.015, rtol=0)


def test_the_same_seed_gives_the_same_noise():
    a, b = generators(5, 5)
    assert torch.equal(randn((2, 3), a), randn((2, 3), b))


def test_refuses_a_list_of_generators_of_another_length():
    with pytest.raises(ValueError, match="generator needs one of each clip, 2, got 1"):
        randn((2, 3), generators(0))
