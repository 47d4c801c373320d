"""Diffusion: clean latents become noise in one step, and noise becomes latents in many.

Symbols, here only, and the letters of the papers:

    x0          clean latents               x_0   (DDPM; z_0 in LDM)
    x_t         latents at noise level t    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    eps         Gaussian noise, unit variance
    beta        beta_t, variance added by step t
    alpha_bar   prod_{s<=t} (1 - beta_s)    alpha_bar_t in DDPM, alpha_t in DDIM
    v           sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)
    signal      sqrt(alpha_bar), the part of x0 in x_t; noise_scale, sqrt(1 - alpha_bar), of eps
    sigma, eta  noise that a DDIM step adds, and its share of DDPM's (0 adds none)
    SNR         signal-to-noise ratio, alpha_bar / (1 - alpha_bar)

A model gets x_t, t and a text and predicts eps or v; either of them gives x0 by linear algebra. A
sampler starts from pure noise at a large t and goes down a list of timesteps. At each it takes the
model's x0 and steps to the x_t between it and where it is.

DDPM, Ho et al. 2020; DDIM, Song et al. 2020; guidance, Ho & Salimans 2022; zero terminal SNR, Lin
et al. 2023. Latent-Shift changes none of this: its clips are noised frame by frame like images.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule; its fields are those of a Stable Diffusion scheduler_config.json.

    `alphas_cumprod` (num_train_timesteps,) is alpha_bar in float64. `trained_betas` are used in
    place of beta_schedule. Raises ValueError for fields that make no schedule.
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
    _tables: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        for name, known in (("prediction_type", ("epsilon", "v_prediction")),
                            ("timestep_spacing", ("leading", "trailing", "linspace"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} needs one of {known}, got {getattr(self, name)!r}")
        if self.num_train_timesteps < 2 or self.steps_offset < 0:
            raise ValueError("num_train_timesteps needs >= 2 and steps_offset >= 0, got "
                             f"{self.num_train_timesteps} and {self.steps_offset}")
        betas = self._betas()
        # Written as not ..., so that NaN fails. Only the last may be 1: no step leaves pure noise.
        if not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
            raise ValueError("betas need to lie in (0, 1], and only the last may be 1; look at "
                             "beta_start, beta_end and trained_betas")
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if self.rescale_betas_zero_snr:
            # Stable Diffusion's last timestep still shows 7 % of the latents, by which a model
            # learns their mean brightness; a sampler that starts from pure noise lacks this hint.
            # Shifted and scaled, sqrt(alpha_bar) ends at 0, not above. Lin et al., algorithm 1.
            root = alphas_cumprod.sqrt()
            alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        # Where alpha_bar = 0 the noise says nothing about x0: the first step would divide by 0.
        if self.prediction_type == "epsilon" and alphas_cumprod[-1] == 0:
            raise ValueError("prediction_type='epsilon' cannot start from zero terminal SNR; use "
                             "'v_prediction'")
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    def _betas(self):
        """Betas of all timesteps, (num_train_timesteps,) float64."""
        steps, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            if len(self.trained_betas) != steps:
                raise ValueError(f"trained_betas needs {steps} values, got "
                                 f"{len(self.trained_betas)}")
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        if self.beta_schedule == "linear":
            return torch.linspace(start, end, steps, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":  # linear in sqrt(beta): Stable Diffusion's own
            return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        if self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        known = ("linear", "scaled_linear", "squaredcos_cap_v2")
        raise ValueError(f"beta_schedule needs one of {known}, got {self.beta_schedule!r}")

    def _coefficients(self, timesteps, like):
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of timesteps (b,), shaped to multiply `like`."""
        key = like.device, like.dtype
        if key not in self._tables:  # once a device: copying them at each step would wait for it
            # Roots of float64, then cast: near alpha_bar = 1 float32 would lose 1 - alpha_bar.
            roots = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
            self._tables[key] = [root.to(like.device, like.dtype) for root in roots]
        shape = -1, *[1] * (like.ndim - 1)  # b -> b 1 1 1 1
        signal, noise_scale = self._tables[key]
        return signal[timesteps].view(shape), noise_scale[timesteps].view(shape)

    def add_noise(self, x0, noise, timesteps):
        """x_t for clean x0 and noise of shape (b, ...) at timesteps (b,). DDPM, eq. 4."""
        signal, noise_scale = self._coefficients(timesteps, x0)
        return signal * x0 + noise_scale * noise

    def target(self, x0, noise, timesteps):
        """What the model learns to predict at timesteps (b,): the noise, or v; shaped like x0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, noise_scale = self._coefficients(timesteps, x0)
        return signal * noise - noise_scale * x0

    def predict(self, model_output, x_t, t):
        """The model's (x0, eps) at timestep t, whichever of eps and v it predicts."""
        alpha_bar = self.alphas_cumprod[t].item()
        signal, noise_scale = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if self.prediction_type == "epsilon":
            return (x_t - noise_scale * model_output) / signal, model_output
        # v and x_t are eps and x0 turned by an angle; turning back needs no division.
        return signal * x_t - noise_scale * model_output, signal * model_output + noise_scale * x_t

    def snr(self, t):
        """Signal-to-noise ratio at timestep t, a float; 0 where nothing but noise is left."""
        alpha_bar = self.alphas_cumprod[t].item()
        return alpha_bar / (1 - alpha_bar)

    def timestep_pairs(self, num_steps, power=1.0):
        """Exactly num_steps pairs (t, t_prev) from noisy to clean; the last t_prev is -1.

        Pairs, so that no step computes its t_prev from a stride: strides rarely divide the total.
        The spacings are those of Lin et al. 2023, table 2: leading (Stable Diffusion) begins below
        the noisiest timestep, trailing begins at it, linspace takes both ends. A power other than 1
        is trailing with more of the steps where noise prevails (below 1) or where it is weak.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps needs to lie in [1, {total}], got {num_steps}")
        if power != 1:
            parts = [(1 - i / num_steps) ** power for i in range(num_steps)]
            steps = [max(0, round(total * part) - 1) for part in parts]
        elif self.timestep_spacing == "leading":
            stride = total // num_steps
            offset = min(self.steps_offset, total - 1 - (num_steps - 1) * stride)  # stay inside
            steps = [i * stride + offset for i in reversed(range(num_steps))]
        elif self.timestep_spacing == "trailing":  # rounded as diffusers rounds
            steps = [round(total - i * (total / num_steps)) - 1 for i in range(num_steps)]
        else:
            ends = torch.linspace(0, total - 1, num_steps, dtype=torch.float64)
            steps = [round(step) for step in reversed(ends.tolist())]
        if len(set(steps)) < num_steps:
            raise ValueError(f"timestep_power {power} needs fewer than {num_steps} steps: some of "
                             f"them fall on the same of {total} timesteps")
        return list(pairwise([*steps, -1]))

    def ddim_step(self, model_output, x_t, t, t_prev, eta=0.0, generator=None):
        """One step from t to t_prev (-1: the end); eta = 0 adds no noise. DDIM, eq. 12 and 16."""
        alpha_bar = self.alphas_cumprod[t].item()
        # Stable Diffusion stops at alpha_bar[0], which keeps a trace of noise, and not at 1.
        final = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0].item()
        alpha_bar_prev = self.alphas_cumprod[t_prev].item() if t_prev >= 0 else final
        x0, eps = self.predict(model_output, x_t, t)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * math.sqrt(max(variance, 0.0))
        rest = max(1 - alpha_bar_prev - sigma**2, 0.0)  # rounding makes 0 a -1e-17
        # x0 and eps mixed anew, as the forward process would mix them at t_prev.
        mean = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(rest) * eps
        return mean if sigma == 0 else mean + sigma * randn(x_t.shape, generator).to(x_t)

    def ddpm_step(self, model_output, x_t, t, t_prev, generator=None):
        """A sample of q(x_{t_prev} | x_t, x0). DDPM, eq. 6 and 7, for steps of any size."""
        alpha_bar = self.alphas_cumprod[t].item()
        alpha_bar_prev = self.alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
        alpha = alpha_bar / alpha_bar_prev
        x0, _ = self.predict(model_output, x_t, t)
        part_x0 = math.sqrt(alpha_bar_prev) * (1 - alpha) / (1 - alpha_bar)
        part_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        mean = part_x0 * x0 + part_x_t * x_t
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
        if variance == 0:  # the last step: nothing is left to be random
            return mean
        return mean + math.sqrt(variance) * randn(x_t.shape, generator).to(x_t)


def randn(shape, generator=None):
    """Gaussian noise (b, t, ...) drawn on the CPU, so a seed means the same on every device.

    `generator` is None, a CPU generator, or a list with one for each clip: then a clip's noise does
    not depend on the clips beside it.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"generator needs one of each clip, {shape[0]}, got {len(generator)}")
        return torch.cat([randn((1, *shape[1:]), one) for one in generator])
    return torch.randn(shape, generator=generator)


def classifier_free_guidance(unconditional, conditional, guidance_scale):
    """Away from the prediction without the text. Ho & Salimans 2022, eq. 6 (w = scale - 1)."""
    # At 1 the text alone; beyond 1 what the text adds is exaggerated.
    return unconditional + guidance_scale * (conditional - unconditional)


def sample_loop(diffusion, model, x_t, num_steps, sampler="ddim", eta=0.0, generator=None,
                power=1.0):
    """Yield x_t after each of num_steps steps; the last one is the sample.

    `model(x_t, t)` predicts for latents x_t (b, ...) at timestep t, an int. A generator function,
    so that a script can draw a bar or a preview between the steps.
    """
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler needs to be 'ddim' or 'ddpm', got {sampler!r}")
    for t, t_prev in diffusion.timestep_pairs(num_steps, power):
        output = model(x_t, t)
        if sampler == "ddim":
            x_t = diffusion.ddim_step(output, x_t, t, t_prev, eta, generator)
        else:
            x_t = diffusion.ddpm_step(output, x_t, t, t_prev, generator)
        yield x_t
