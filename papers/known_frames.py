"""Known frames: one model that continues, animates and interpolates clips.

Some frames of a clip are known, and the model draws the others. The task decides which are known:

    none            text-to-image, text-to-video
    the first       image-to-video
    the first k     prediction of the frames that follow
    every n-th      interpolation

Known frames overwrite their own noisy latents, and a new input channel of the U-Net, a mask, says
whether a frame is known (LVDM, He et al. 2022, section 3.3). LVDM stops there (`hold=False`),
because its frames meet in attention. With the shift, whose reach grows by one frame per use, a
frame far from the known ones would hardly see them. So `hold` also shows each frame

    two known frames: the nearest on each side, or, if all are on one side, the nearest and the
    farthest; and the signed distances to these two.

The weights of the new channels start at zero, so training starts from the plain video model.

Two more numbers reach the model in the same way as the timestep: the noise level s of the known
frames and the frame rate (MagicVideo, Zhou et al. 2022). The noise is LVDM's conditional latent
perturbation, which is meant to keep the errors of a long clip from adding up.

`known` are the indices of the known frames, the same for all clips of a batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from checkpoints import configs, weights
from diffusion import classifier_free_guidance, randn, sample_loop
from layers import sinusoids
from model import TimeEmbedding, UNet, UNetConfig
from support.files import read_json

DISTANCE = 8.0  # frames per unit of the distances shown to a model; 8 is a window of the demo


class KnownFramesUNet(UNet):
    """A U-Net whose timesteps are (b, 3): the timestep, the noise level s and the frame rate."""

    def __init__(self, config):
        super().__init__(config)
        width = config.block_out_channels[0]
        self.condition_embeddings = nn.ModuleList(TimeEmbedding(width, 4 * width) for _ in range(2))
        for embedding in self.condition_embeddings:
            nn.init.zeros_(embedding.linear_2.weight)
            nn.init.zeros_(embedding.linear_2.bias)

    def embed(self, timesteps, context):
        timesteps, *conditions = timesteps.unbind(1)
        time = super().embed(timesteps, context)
        for numbers, embedding in zip(conditions, self.condition_embeddings, strict=True):
            waves = sinusoids(numbers, self.config.block_out_channels[0])  # b -> b c
            time = time + embedding(waves.to(context.dtype))
        return time


def widen(unet, hold=True, max_frames=1):
    """A KnownFramesUNet for max_frames frames or more; untrained, it predicts as `unet` does."""
    config = unet.config
    channels = config.in_channels + (2 * config.out_channels + 3 if hold else 1)  # show_known()
    max_frames = max(config.max_frames, max_frames)
    wide = KnownFramesUNet(dataclasses.replace(config, in_channels=channels, max_frames=max_frames))
    new = wide.state_dict()  # shares its memory with the parameters
    new["conv_in.weight"].zero_()
    for name, value in unet.state_dict().items():  # smaller along input channels or frames
        new[name][tuple(map(slice, value.shape))] = value
    return wide


def load_model(path):
    """The Pipeline of a run for known frames."""
    where, name = path / "unet/config.json", {"_class_name": KnownFramesUNet.__name__}
    config = configs.from_config(UNetConfig, read_json(where), name, where)
    unet, _ = weights.fill_from(where.parent, weights.build(KnownFramesUNet, config, where))
    return weights.load_folder(path, unet=unet)


def nearest_known(known, num_frames):
    """Two known frames to show each of num_frames frames, [(i, j), ...]."""
    pairs = []
    for frame in range(num_frames):
        before, after = [i for i in known if i <= frame], [i for i in known if i >= frame]
        # One on each side (itself, twice, for a known frame). If all are on one side, the nearest
        # and the farthest show the speed best.
        pairs.append(((before or after)[-1], (after or before)[0]))
    return pairs


def mask_of(known, like):
    """(t, 1, 1, 1) bool: which frames of `like` (b, t, c, h, w) are known, on its device."""
    mask = torch.tensor([frame in known for frame in range(like.shape[1])])
    return mask.to(like.device, non_blocking=True)[:, None, None, None]  # no step waits for a copy


def show_known(latents, known, hold=True):
    """The channels (b, t, k, h, w) that show a model the known frames of latents (b, t, c, h, w).

    Latents of other frames are not read.
    """
    b, t, c, h, w = latents.shape
    mask = mask_of(known, latents).to(latents.dtype).expand(b, t, 1, h, w)
    if not hold:
        return mask
    if not known:
        return torch.cat([latents.new_zeros(b, t, 2 * c + 2, h, w), mask], dim=2)
    pairs = torch.tensor(nearest_known(known, t))  # t 2
    distances = (pairs - torch.arange(t)[:, None]) / DISTANCE
    distances = distances.to(latents, non_blocking=True)[..., None, None].expand(b, t, 2, h, w)
    shown = latents[:, pairs.to(latents.device, non_blocking=True)].flatten(2, 3)  # b t 2c h w
    return torch.cat([shown, distances, mask], dim=2)


def predict(unet, x_t, timesteps, context, seen, known, hold):
    """The U-Net's prediction for noisy x_t (b, t, c, h, w), given the known frames of `seen`.

    timesteps are (b, 3): timestep, noise level of the known frames, frame rate. The U-Net may
    compute in bfloat16; everything around it is float32.
    """
    x_t = torch.where(mask_of(known, seen), seen, x_t)
    x = torch.cat([x_t, show_known(seen, known, hold)], dim=2).to(context.dtype)
    return unet(x, timesteps, context).float()


def perturb(diffusion, latents, levels, noise):
    """Latents noised to timesteps `levels` (b,), where 0 adds no noise. LVDM, section 3.3."""
    noisy = diffusion.add_noise(latents, noise, levels)
    return torch.where(levels.view(-1, 1, 1, 1, 1) > 0, noisy, latents)


def known_frames_loss(unet, diffusion, x0, noise, timesteps, context, seen, known, hold):
    """Mean squared error of the prediction on the unknown frames; timesteps as for predict().

    LVDM's public code also counts known frames, whose target is a noise that the model never sees.
    """
    steps, t = timesteps[:, 0].long(), x0.shape[1]
    prediction = predict(unet, diffusion.add_noise(x0, noise, steps), timesteps, context, seen,
                         known, hold)
    error = (prediction - diffusion.target(x0, noise, steps)).square()
    return error.masked_fill(mask_of(known, error), 0).mean() * t / (t - len(known))


@dataclass(frozen=True)
class Guidance:
    """How a window is drawn."""

    num_steps: int = 1
    level: int = 0  # timestep to which known frames are noised; 0: no noise
    text_scale: float = 1.0  # weight of the text; 1: no guidance
    max_snr: float | None = None  # largest signal-to-noise ratio with guidance by the text
    power: float = 1.0  # spacing of the timesteps (Diffusion.timestep_pairs)
    known_scale: float = 0.0  # LVDM's w in e + w (e - e without known frames)


@torch.no_grad()
def draw(model, context, latents, known, frame_rate, seeds, how):
    """Clips (b, t, c, h, w) with the known frames of float32 `latents`; the others are drawn.

    context is (b, n, d) of model.encode_text, seeds has a number per clip, frame_rate is in frames
    per second.
    """
    b, config = len(latents), model.unet.config
    hold = config.in_channels > config.out_channels + 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x_t, noise = (randn(latents.shape, generators).to(latents) for _ in range(2))
    levels = torch.full((b,), how.level, device=latents.device)
    seen = perturb(model.diffusion, latents, levels, noise)
    empty = model.encode_text([""]).expand_as(context) if how.text_scale != 1 else None

    def guided(x_t, t):
        def predicted(context, known, level):
            numbers = torch.tensor([[t, level, frame_rate]] * b).to(latents)
            return predict(model.unet, x_t, numbers, context, seen, known, hold)

        output = predicted(context, known, how.level)
        if how.text_scale != 1 and (how.max_snr is None or model.diffusion.snr(t) <= how.max_snr):
            without = predicted(empty, known, how.level)
            output = classifier_free_guidance(without, output, how.text_scale)
        if how.known_scale:
            output = output + how.known_scale * (output - predicted(context, (), 0))
        return output

    diffusion = model.diffusion
    if how.num_steps == 1:  # from pure noise, so at the noisiest timestep, whatever the spacing
        diffusion = dataclasses.replace(diffusion, timestep_spacing="trailing")
    *_, x_t = sample_loop(diffusion, guided, x_t, how.num_steps, power=how.power)
    return torch.where(mask_of(known, latents), latents, x_t)
