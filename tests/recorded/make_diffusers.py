"""Makes diffusers.json: what networks and samplers of diffusers give for the rule's weights.

With diffusers 0.42.1 and torch 2.13.0, in tests/:

    PYTHONPATH=. python recorded/make_diffusers.py > recorded/diffusers.json
"""

import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from recorded.rule import fill, normal, probe, signature


def listed(x):
    return [float(f"{value:.7g}") for value in x.flatten().tolist()]


def unet(levels, **options):
    """A diffusers U-Net; levels says which of them have transformers."""
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(levels)]
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **options).eval()


@torch.no_grad()
def unet_case(class_labels=False, **options):
    """Two clips of three frames, which diffusers gets as six pictures."""
    model = fill(unet((True, True, False), layers_per_block=1, norm_num_groups=4,
                      cross_attention_dim=20, **options))
    latents, context = normal(2, 3, 4, 8, 12), normal(2, 5, 20, seed=2)
    timesteps = torch.tensor([37, 2])
    labels = context[:, -1].repeat_interleave(3, 0) if class_labels else None
    out = model(latents.flatten(0, 1), timesteps.repeat_interleave(3),
                context.repeat_interleave(3, 0), class_labels=labels).sample
    return listed(probe(out))


@torch.no_grad()
def vae_case(attention):
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    model = fill(AutoencoderKL(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4,
                               latent_channels=5, mid_block_add_attention=attention, **kinds).eval())
    latents = model.encode(normal(2, 3, 12, 20)).latent_dist
    decoded = model.decode(normal(2, 5, 3, 4, seed=2)).sample
    return {"mean": listed(probe(latents.mean)), "logvar": listed(probe(latents.logvar)),
            "decoded": listed(probe(decoded))}


def trajectory(scheduler, num_steps, **options):
    """Every state of a sampler whose model is tanh(x + t / 1000), from four fixed numbers."""
    scheduler.set_timesteps(num_steps)
    x, generator, states = normal(1, 4), torch.Generator().manual_seed(3), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x + t / 1000), t, x, generator=generator, **options).prev_sample
        states.append(listed(x))
    return states


sd = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
sd1 = dict(sd, set_alpha_to_one=False, steps_offset=1)
sd2 = dict(sd1, prediction_type="v_prediction")
zero = dict(sd2, timestep_spacing="trailing", rescale_betas_zero_snr=True)
betas = np.array([0.0001 + 0.02 * (i / 999) ** 3 for i in range(1000)])  # no named schedule
widths = dict(block_out_channels=(8, 16, 32))
full = (True, True, True, False)
with torch.device("meta"):
    signatures = {
        "sd1": signature(unet(full, cross_attention_dim=768, attention_head_dim=8)),
        "sd2": signature(unet(full, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                              use_linear_projection=True)),
        "vae": signature(AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)),
    }
recorded = {
    "signatures": signatures,
    "unet": {
        "sd1": unet_case(attention_head_dim=2, **widths),
        "sd2": unet_case(attention_head_dim=[1, 2, 4], use_linear_projection=True, **widths),
        "small": unet_case(attention_head_dim=2, class_labels=True, **widths,
                           resnet_time_scale_shift="scale_shift",
                           class_embed_type="simple_projection",
                           projection_class_embeddings_input_dim=20),
    },
    "vae": {"attention": vae_case(True), "none": vae_case(False)},
    "trajectories": {
        "ddim sd1": trajectory(DDIMScheduler(**sd1), 10),
        "ddim sd2": trajectory(DDIMScheduler(**sd2), 10),
        "ddim zero snr": trajectory(DDIMScheduler(**zero), 10),
        "ddim sd1 eta": trajectory(DDIMScheduler(**sd1), 10, eta=0.7),
        "ddim trained betas": trajectory(DDIMScheduler(
            trained_betas=betas, clip_sample=False, set_alpha_to_one=True, steps_offset=0), 10),
        "ddpm sd1": trajectory(DDPMScheduler(**sd, steps_offset=1, timestep_spacing="leading"), 10),
        "ddpm sd2": trajectory(DDPMScheduler(
            **sd, prediction_type="v_prediction", timestep_spacing="trailing"), 10),
    },
    "alphas_cumprod": {
        name: listed(DDIMScheduler(**options).alphas_cumprod[[0, 1, 500, 998, 999]])
        for name, options in {
            "linear": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
            "scaled_linear": sd,
            "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
            "zero snr": zero,
        }.items()
    },
}
print("{" + ",\n".join(
    f"{json.dumps(name)}: {{\n" + ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in group.items()) + "\n}"
    for name, group in recorded.items()) + "}")
