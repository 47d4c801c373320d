"""Diffusion: clean latents become noise in one step, and noise becomes latents in many.

Symbols, here only, and the letters of the papers:

    x0          clean latents               x_0   (DDPM; z_0 in LDM)
    x_t         latents at noise level t    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    eps         Gaussian noise, unit variance
    beta        beta_t, variance added by step t
    alpha_bar   prod_{s<=t} (1 - beta_s)    alpha_bar_t in DDPM, alpha_t in DDIM
    v           sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)
    signal      sqrt(alpha_bar), the factor of x0 in x_t
    noise_scale sqrt(1 - alpha_bar), the factor of eps in x_t
    sigma, eta  standard deviation of a DDIM step's noise, and its ratio to DDPM's (0: no noise)
    SNR         signal-to-noise ratio, alpha_bar / (1 - alpha_bar)

A model gets x_t, t and a text and predicts eps or v; either one gives x0 by linear algebra. A
sampler starts from pure noise at a large t and goes down a list of timesteps. At each one it
computes the model's x0 and moves x_t a step towards it.

DDPM, Ho et al. 2020; DDIM, Song et al. 2020; guidance, Ho & Salimans 2022; zero terminal SNR, Lin
et al. 2023. Latent-Shift changes none of this, and adds noise to each frame as to an image.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule; its fields are named as in Stable Diffusion's scheduler_config.json.

    `alphas_cumprod` (num_train_timesteps,) is alpha_bar in float64. `trained_betas` replace the
    beta_schedule. Raises ValueError for fields that make no schedule.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    trained_betas: tuple[float, ...] | None = None
    alphas_cumprod: torch.Tensor = field(init=False, repr=False, compare=False)
    tables: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "alphas_cumprod", compute_alpha_bar(self))

    def coefficients(self, timesteps, like):
        """signal and noise_scale of timesteps (b,) or of one, in the shape to multiply `like`."""
        key = like.device, like.dtype
        if key not in self.tables:  # once per device; a copy at every step would stall it
            # Cast after the roots, because float32 loses 1 - alpha_bar near alpha_bar = 1.
            roots = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self.tables[key] = [root.to(like.device, like.dtype) for root in roots]
        shape = -1, *[1] * (like.ndim - 1)  # b -> b 1 1 1 1
        signal, noise_scale = self.tables[key]  # num_train_timesteps each
        return signal[timesteps].view(shape), noise_scale[timesteps].view(shape)

    def add_noise(self, x0, noise, timesteps):
        """x_t for clean x0 and noise of shape (b, ...) at timesteps (b,). DDPM, eq. 4."""
        signal, noise_scale = self.coefficients(timesteps, x0)
        return signal * x0 + noise_scale * noise

    def target(self, x0, noise, timesteps):
        """The tensor that the model learns to predict at timesteps (b,): the noise, or v."""
        if self.prediction_type == "epsilon":
            return noise  # eps
        signal, noise_scale = self.coefficients(timesteps, x0)
        return signal * noise - noise_scale * x0  # v

    def predict(self, model_output, x_t, t):
        """The model's (x0, eps) at timestep t, from eps or from v."""
        signal, noise_scale = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - noise_scale * model_output) / signal, model_output
        # v and x_t are eps and x0 rotated by an angle; rotating back needs no division.
        return signal * x_t - noise_scale * model_output, signal * model_output + noise_scale * x_t

    def alpha_bar(self, t):
        """alpha_bar at timestep t, a float; 1 (no noise) at t = -1, after the last step."""
        return self.alphas_cumprod[t].item() if t >= 0 else 1.0

    def snr(self, t):
        """Signal-to-noise ratio at timestep t, a float; 0 for pure noise."""
        return self.alpha_bar(t) / (1 - self.alpha_bar(t))

    def ddim_step(self, model_output, x_t, t, t_prev, eta=0.0, generator=None):
        """One step from t to t_prev (-1: the end); eta = 0 adds no noise. DDIM, eq. 12 and 16."""
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        if t_prev < 0 and not self.set_alpha_to_one:
            alpha_bar_prev = self.alpha_bar(0)  # Stable Diffusion's end keeps a trace of noise
        x0, eps = self.predict(model_output, x_t, t)  # each b t c h w
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * math.sqrt(variance)  # eta = 1 adds as much noise as ddpm_step
        rest = max(1 - alpha_bar_prev - sigma**2, 0.0)  # rounding can give -1e-17
        # Mix x0 and eps again, as the forward process would mix them at t_prev.
        mean = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(rest) * eps
        return mean if sigma == 0 else mean + sigma * randn(x_t.shape, generator).to(x_t)

    def ddpm_step(self, model_output, x_t, t, t_prev, generator=None):
        """A sample of q(x_{t_prev} | x_t, x0). DDPM, eq. 6 and 7, for steps of any size."""
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = alpha_bar / alpha_bar_prev  # product of 1 - beta between t_prev and t
        x0, _ = self.predict(model_output, x_t, t)  # b t c h w
        weight_x0 = math.sqrt(alpha_bar_prev) * (1 - alpha) / (1 - alpha_bar)
        weight_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        mean = weight_x0 * x0 + weight_x_t * x_t
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
        if variance == 0:  # the last step leaves nothing random
            return mean
        return mean + math.sqrt(variance) * randn(x_t.shape, generator).to(x_t)

    def timestep_pairs(self, num_steps, power=1.0):
        """Exactly num_steps pairs (t, t_prev) from noisy to clean; the last t_prev is -1.

        Pairs, because t - stride misses the next timestep unless the stride divides the total.
        The spacings are from Lin et al. 2023, table 2: leading (Stable Diffusion) begins below
        the noisiest timestep, trailing begins at it, linspace takes both ends. With a power other
        than 1 the spacing is trailing, with more steps at high noise (below 1) or at low noise.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps needs to lie in [1, {total}], got {num_steps}")
        if power != 1:
            fractions = [(1 - i / num_steps) ** power for i in range(num_steps)]
            steps = [max(0, round(total * fraction) - 1) for fraction in fractions]
        elif self.timestep_spacing == "leading":
            stride = total // num_steps
            offset = min(self.steps_offset, total - 1 - (num_steps - 1) * stride)  # stay < total
            steps = [i * stride + offset for i in reversed(range(num_steps))]
        elif self.timestep_spacing == "trailing":  # rounded as diffusers rounds
            steps = [round(total - i * (total / num_steps)) - 1 for i in range(num_steps)]
        else:
            ends = torch.linspace(0, total - 1, num_steps, dtype=torch.float64)
            steps = [round(step) for step in reversed(ends.tolist())]
        if len(set(steps)) < num_steps:
            raise ValueError(f"timestep_power {power} needs fewer than {num_steps} steps, because "
                             f"some of them fall on the same one of {total} timesteps")
        return list(pairwise([*steps, -1]))


def randn(shape, generator=None):
    """Gaussian noise (b, t, ...) drawn on the CPU, so a seed gives the same noise on every device.

    `generator` is None, a CPU generator, or a list with one for each clip, which makes a clip's
    noise independent of the other clips in the batch.
    """
    if isinstance(generator, (list, tuple)):
        return torch.cat([randn((1, *shape[1:]), one)
                          for _, one in zip(range(shape[0]), generator, strict=True)])
    return torch.randn(shape, generator=generator)


def classifier_free_guidance(unconditional, conditional, guidance_scale):
    """Move away from the prediction without text. Ho & Salimans 2022, eq. 6 (w = scale - 1)."""
    # Scale 1 is the prediction with the text; above 1 the effect of the text is exaggerated.
    return unconditional + guidance_scale * (conditional - unconditional)


def sample_loop(diffusion, model, x_t, num_steps, sampler="ddim", eta=0.0, generator=None,
                power=1.0):
    """Yield x_t after each of num_steps steps; the last one is the sample.

    `model(x_t, t)` predicts for latents x_t (b, ...) at timestep t, an int. This is a generator
    function, so a script can draw a bar or a preview between the steps.
    """
    for t, t_prev in diffusion.timestep_pairs(num_steps, power):
        output = model(x_t, t)  # eps or v, b t c h w
        if sampler == "ddim":
            x_t = diffusion.ddim_step(output, x_t, t, t_prev, eta, generator)
        else:
            x_t = diffusion.ddpm_step(output, x_t, t, t_prev, generator)
        yield x_t


# Noise schedules


def schedule_for(prediction_type, zero_terminal_snr=False, snr_divisor=1.0, base=None):
    """Stable Diffusion's schedule or another, with pure noise at its end or lower SNRs everywhere.

    Small latents need more noise, because each of their numbers shows more of the image.
    """
    base = replace(base or Diffusion(), prediction_type=prediction_type,
                   rescale_betas_zero_snr=zero_terminal_snr)
    if zero_terminal_snr:  # leading timesteps would not begin at pure noise
        base = replace(base, timestep_spacing="trailing", set_alpha_to_one=True)
    if snr_divisor == 1:
        return base
    # SNR = a / (1 - a), so SNR / k belongs to a / (a + k (1 - a)). A scheduler_config.json holds
    # betas, which diffusers can read, so they are computed back from alpha_bar.
    a = base.alphas_cumprod
    alpha_bar = a / (a + snr_divisor * (1 - a))  # num_train_timesteps
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    return replace(base, trained_betas=tuple(betas.tolist()), rescale_betas_zero_snr=False,
                   set_alpha_to_one=True)


def compute_betas(diffusion):
    """Betas of all timesteps, (num_train_timesteps,) float64."""
    steps, start, end = diffusion.num_train_timesteps, diffusion.beta_start, diffusion.beta_end
    if diffusion.trained_betas is not None:
        return torch.tensor(diffusion.trained_betas, dtype=torch.float64)
    if diffusion.beta_schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if diffusion.beta_schedule == "scaled_linear":  # linear in sqrt(beta): Stable Diffusion's own
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)  # Nichol & Dhariwal 2021, eq. 17
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def compute_alpha_bar(diffusion):
    """alpha_bar of all timesteps, float64. Raises ValueError for fields that make no schedule."""
    for name, known in (("prediction_type", ("epsilon", "v_prediction")),
                        ("timestep_spacing", ("leading", "trailing", "linspace")),
                        ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))):
        if getattr(diffusion, name) not in known:
            raise ValueError(f"{name} needs one of {known}, got {getattr(diffusion, name)!r}")
    betas = compute_betas(diffusion)
    # Written as not ..., so that NaN fails. Only the last may be 1, since it leaves pure noise.
    if len(betas) != diffusion.num_train_timesteps or len(betas) < 2 or not (
        (betas > 0) & (betas <= 1)
    ).all() or (betas[:-1] == 1).any():
        raise ValueError("betas need num_train_timesteps >= 2 values in (0, 1], of which only the "
                         "last may be 1; check beta_start, beta_end and trained_betas")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if diffusion.rescale_betas_zero_snr:
        # Stable Diffusion's last timestep still shows 7 % of the latents, from which a model
        # learns their mean brightness; a sampler that starts from pure noise lacks this hint.
        # Shifted and scaled, sqrt(alpha_bar) ends at 0. Lin et al., algorithm 1.
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # Where alpha_bar = 0, eps says nothing about x0, so the first step would divide by 0.
    if diffusion.prediction_type == "epsilon" and alpha_bar[-1] == 0:
        raise ValueError("prediction_type='epsilon' cannot start from zero terminal SNR; use "
                         "'v_prediction' (--prediction-type v_prediction)")
    return alpha_bar
