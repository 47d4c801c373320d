"""Known frames: one model that continues, animates and interpolates clips.

Some frames of a clip are known, the others are drawn. Which ones are known is the task:

    none            text-to-video
    the first       image-to-video
    the first k     prediction of what follows
    every n-th      interpolation

The U-Net's first convolution gets more input channels, with weights of zero at first, so it starts
as the plain video model. Beside the noisy latents each frame is shown

    two known frames: the nearest on each side, else the nearest and the farthest on one side,
    how far away these are, with a sign, and a mask: whether the frame itself is known.

The known frames also stand in the place of their own noisy latents, as in LVDM (He et al. 2022,
section 3.3), which adds no more than the mask (`hold=False`) and joins frames by attention. Here a
frame far from the known ones would then see them only through the shift, whose reach grows by one
frame with each use. With `hold` the nearest known frames are held before every frame.

Two numbers go to the model like the timestep (UNetConfig.num_conditions): the noise level s of the
known frames (LVDM's conditional latent perturbation) and the frame rate (MagicVideo, Zhou et al.
2022). papers/long_video.py and papers/key_frames.py are what can be done with such a model.

Which frames are known stays on the CPU: what follows from it is computed there and copied, so that
no step waits for a GPU to answer which they are.
"""

import dataclasses

import torch

import weights
from diffusion import randn, sample_loop
from model import UNet

DISTANCE = 8.0  # frames: the unit in which a model is told distances


def known_channels(channels, hold=True):
    """Input channels beside the noisy latents, which have so many."""
    return 2 * channels + 3 if hold else 1


def nearest_known(known):
    """The two known frames that each frame is shown, [(i, j), ...], of a list of booleans."""
    places, pairs = [i for i, is_known in enumerate(known) if is_known], []
    for frame in range(len(known)):
        before, after = [i for i in places if i <= frame], [i for i in places if i >= frame]
        if before and after:
            pairs.append((before[-1], after[0]))  # a known frame is shown itself, twice
        else:  # on one side the nearest and the farthest, from which speed shows best
            nearest = sorted(places, key=lambda i: abs(i - frame))
            pairs.append((nearest[0], nearest[-1]))
    return pairs


def beside(x, latents):
    """A small CPU tensor on the device of latents. The copy waits for nothing."""
    return x.to(latents.device, non_blocking=True)


def show_known(latents, known, hold=True):
    """The channels that show a model what is known of latents (b, t, c, h, w): (b, t, k, h, w).

    known is (t,) bool on the CPU, the same for all clips. The latents of other frames are not read.
    """
    b, t, _, h, w = latents.shape
    mask = beside(known, latents).to(latents.dtype)[:, None, None, None].expand(b, t, 1, h, w)
    if not hold:
        return mask
    if not known.any():
        return torch.cat([latents.new_zeros(b, t, 2 * latents.shape[2] + 2, h, w), mask], dim=2)
    pairs = torch.tensor(nearest_known(known.tolist()))  # t 2
    distances = ((pairs - torch.arange(t)[:, None]) / DISTANCE).to(latents.dtype)
    distances = beside(distances, latents)[..., None, None].expand(b, t, 2, h, w)
    shown = latents[:, beside(pairs, latents)].flatten(2, 3)  # b t 2 c h w -> b t 2c h w
    return torch.cat([shown, distances, mask], dim=2)


def widen(unet, hold=True, max_frames=1):
    """A U-Net for known frames that predicts what `unet` does until it is trained.

    Temporal layers with parameters for each frame get some for at least max_frames.
    """
    config, state = unet.config, unet.state_dict()
    extra = known_channels(config.out_channels, hold)
    wide = UNet(dataclasses.replace(
        config, in_channels=config.in_channels + extra, num_conditions=2,
        max_frames=max(config.max_frames, max_frames),
    ))
    weight, new = state["conv_in.weight"], wide.state_dict()  # c 4 3 3
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), extra, 3, 3)], 1)
    for name, value in state.items():  # more frames than before keep their initial values
        new[name][: len(value)] = value
    wide.load_state_dict(new)
    return wide


def predict(unet, x_t, timesteps, context, seen, known, conditions, hold=True):
    """The U-Net's prediction for noisy x_t (b, t, c, h, w), given the known frames (t,) of `seen`.

    conditions are (b, 2): noise level and frame rate.
    """
    places = beside(known, seen)[:, None, None, None]
    x_t = torch.where(places, seen, x_t)  # known frames overwrite the noise
    return unet(torch.cat([x_t, show_known(seen, known, hold)], dim=2), timesteps, context,
                conditions)


def perturb(diffusion, latents, levels, noise):
    """Latents noised to timesteps `levels` (b,), 0 for none: LVDM's latent perturbation.

    Levels are timesteps of this model's own schedule.
    """
    noisy = diffusion.add_noise(latents, noise, levels)
    return torch.where(levels.view(-1, 1, 1, 1, 1) > 0, noisy, latents)


def known_frames_loss(unet, diffusion, x0, noise, timesteps, context, seen, known, conditions,
                      hold=True, on_known=False):
    """Mean squared error of the prediction on the frames that are not known.

    `on_known` adds the known ones, as LVDM's public code does, whose target is then a noise that
    the model never sees.
    """
    x_t = diffusion.add_noise(x0, noise, timesteps)
    prediction = predict(unet, x_t, timesteps, context, seen, known, conditions, hold)
    error = (prediction.float() - diffusion.target(x0, noise, timesteps)).square()
    unknown = beside((~known).nonzero()[:, 0], error)  # their places: a mask's are counted first
    return error.mean() if on_known else error[:, unknown].mean()


def load_model(path):
    """The Pipeline of a run for known frames. Raises ValueError if it is another kind of run."""
    model = weights.load_pipeline(path)
    config = model.unet.config
    if config.num_conditions != 2 or config.in_channels == config.out_channels:
        raise ValueError(f"{path}: is a model without known frames; train one from it with "
                         f"`python -m papers.long_video train RUN --init {path}`")
    return model


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How one window is drawn.

    level: timestep to which known frames are noised, 0 for none. text: guidance by the text, 1 for
    none, max_snr its limit and power that of the timesteps (Sampling). known: LVDM's w in
    e + w (e - e without known frames).
    """

    num_steps: int = 1
    level: int = 0
    text: float = 1.0
    max_snr: float | None = None
    power: float = 1.0
    known: float = 0.0


@torch.no_grad()
def draw(model, context, latents, known, frame_rate, seeds, how):
    """Clips (b, t, c, h, w): known frames (t,) bool are those of `latents`, the others are drawn.

    latents are float32, whatever the U-Net computes in. context is (b, n, d), of
    model.encode_text; seeds has a number for each clip; frame_rate is in frames per second.
    """
    b, config = len(latents), model.unet.config
    hold = config.in_channels > config.out_channels + 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    levels = torch.full((b,), how.level, device=latents.device)
    conditions = torch.tensor([[how.level, frame_rate]] * b).to(latents)
    x_t, noise = (randn(latents.shape, generators).to(latents) for _ in range(2))
    seen = perturb(model.diffusion, latents, levels, noise)
    empty = model.encode_text([""]).expand_as(context) if how.text != 1 else None

    nothing, no_noise = torch.zeros_like(known), conditions * conditions.new_tensor([0.0, 1.0])

    def unet(x, timesteps, context, conditions):
        return model.unet(x.to(context.dtype), timesteps, context, conditions).float()

    def predicted(x_t, t):
        timesteps = torch.full((b,), t, device=x_t.device)
        output = predict(unet, x_t, timesteps, context, seen, known, conditions, hold)
        if how.text != 1 and (how.max_snr is None or model.diffusion.snr(t) <= how.max_snr):
            without = predict(unet, x_t, timesteps, empty, seen, known, conditions, hold)
            output = without + how.text * (output - without)
        if how.known:
            without = predict(unet, x_t, timesteps, context, seen, nothing, no_noise, hold)
            output = output + how.known * (output - without)
        return output

    *_, x_t = sample_loop(model.diffusion, predicted, x_t, how.num_steps, power=how.power)
    return torch.where(beside(known, latents)[:, None, None, None], latents, x_t)
