"""Writes diffusers.json: outputs of diffusers' networks, with weights by the rule, and samplers.

With diffusers 0.42.1 and torch 2.13.0, in tests/:

    PYTHONPATH=. python recorded/make_diffusers.py > recorded/diffusers.json
"""

import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from recorded.rule import fill, normal, probe, signature

# The schedules of Stable Diffusion 1 and 2, and of 2 with zero terminal SNR.
BASE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
SD1 = dict(BASE, set_alpha_to_one=False, steps_offset=1)
SD2 = dict(SD1, prediction_type="v_prediction")
ZERO = dict(SD2, timestep_spacing="trailing", rescale_betas_zero_snr=True)
BETAS = np.array([0.0001 + 0.02 * (i / 999) ** 3 for i in range(1000)])  # no named schedule


def listed(x):
    """The numbers of a tensor with seven digits, about what float32 holds."""
    return [float(f"{value:.7g}") for value in x.flatten().tolist()]


def print_json(groups, separators=None):
    """Print a dict of dicts as JSON with one line for each inner value."""
    print("{" + ",\n".join(
        f"{json.dumps(name)}: {{\n" + ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value, separators=separators)}"
            for key, value in group.items()) + "\n}"
        for name, group in groups.items()) + "}")


def build_unet(levels, **options):
    """A diffusers U-Net; levels says which of them have transformers."""
    down = ["CrossAttnDownBlock2D" if level else "DownBlock2D" for level in levels]
    up = ["CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(levels)]
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **options).eval()


def build_vae(widths, **options):
    """A diffusers autoencoder."""
    down, up = ["DownEncoderBlock2D"] * len(widths), ["UpDecoderBlock2D"] * len(widths)
    return AutoencoderKL(block_out_channels=widths, down_block_types=down, up_block_types=up,
                         **options).eval()


@torch.no_grad()
def unet_outputs(class_labels=False, **options):
    """Outputs for two clips of three frames, which diffusers gets as six images."""
    unet = fill(build_unet((True, True, False), block_out_channels=(8, 16, 32), layers_per_block=1,
                           norm_num_groups=4, cross_attention_dim=20, **options))
    latents, context = normal(2, 3, 4, 8, 12), normal(2, 5, 20, seed=2)
    timesteps = torch.tensor([37, 2])
    labels = context[:, -1].repeat_interleave(3, 0) if class_labels else None
    return listed(probe(unet(latents.flatten(0, 1), timesteps.repeat_interleave(3),
                             context.repeat_interleave(3, 0), class_labels=labels).sample))


@torch.no_grad()
def vae_outputs(attention):
    vae = fill(build_vae((8, 16, 24), layers_per_block=1, norm_num_groups=4, latent_channels=5,
                         mid_block_add_attention=attention))
    latents = vae.encode(normal(2, 3, 12, 20)).latent_dist
    decoded = vae.decode(normal(2, 5, 3, 4, seed=2)).sample
    return {"mean": listed(probe(latents.mean)), "logvar": listed(probe(latents.logvar)),
            "decoded": listed(probe(decoded))}


def trajectory(scheduler, num_steps=10, **options):
    """Every state of a sampler whose model is tanh(x + t / 1000), from four fixed numbers."""
    scheduler.set_timesteps(num_steps)
    x, generator, states = normal(1, 4), torch.Generator().manual_seed(3), []
    for t in scheduler.timesteps:
        eps = torch.tanh(x + t / 1000)
        x = scheduler.step(eps, t, x, generator=generator, **options).prev_sample
        states.append(listed(x))
    return states


def signatures():
    """Of the networks of Stable Diffusion in full size, which need no memory here."""
    full = (True, True, True, False)
    with torch.device("meta"):
        sd1 = build_unet(full, cross_attention_dim=768, attention_head_dim=8)
        sd2 = build_unet(full, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                         use_linear_projection=True)
        vae = build_vae((128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    return {"sd1": signature(sd1), "sd2": signature(sd2), "vae": signature(vae)}


def record():
    trailing = dict(BASE, prediction_type="v_prediction", timestep_spacing="trailing")
    leading = dict(BASE, steps_offset=1, timestep_spacing="leading")
    trained = dict(trained_betas=BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    linear = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    schedules = {"linear": linear, "scaled_linear": BASE,
                 "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"), "zero snr": ZERO}
    small = dict(class_labels=True, resnet_time_scale_shift="scale_shift",
                 class_embed_type="simple_projection", projection_class_embeddings_input_dim=20)
    return {
        "signatures": signatures(),
        "unet": {
            "sd1": unet_outputs(attention_head_dim=2),
            "sd2": unet_outputs(attention_head_dim=[1, 2, 4], use_linear_projection=True),
            "small": unet_outputs(attention_head_dim=2, **small),
        },
        "vae": {"attention": vae_outputs(True), "none": vae_outputs(False)},
        "trajectories": {
            "ddim sd1": trajectory(DDIMScheduler(**SD1)),
            "ddim sd2": trajectory(DDIMScheduler(**SD2)),
            "ddim zero snr": trajectory(DDIMScheduler(**ZERO)),
            "ddim sd1 eta": trajectory(DDIMScheduler(**SD1), eta=0.7),
            "ddim trained betas": trajectory(DDIMScheduler(**trained)),
            "ddpm sd1": trajectory(DDPMScheduler(**leading)),
            "ddpm sd2": trajectory(DDPMScheduler(**trailing)),
        },
        "alphas_cumprod": {
            name: listed(DDIMScheduler(**options).alphas_cumprod[[0, 1, 500, 998, 999]])
            for name, options in schedules.items()
        },
    }


if __name__ == "__main__":
    print_json(record())
