"""Training in three stages, each built on the one before:

    vae     frames -> latents -> frames. The following stages encode the clips once (cache.py).
    image   text-to-image: the U-Net on single frames, and with it the text encoder.
    video   text-to-video: the same U-Net with the temporal shift, on clips. The text encoder is
            frozen, so each caption is encoded once. This is Latent-Shift (An et al. 2023, section
            3); --temporal chooses another variant (temporal.py).

    python train.py runs/mine --data shapes                 all three, or what is still missing
    python train.py runs/mine --data my_clips --resume      continue after a stop
    python train.py runs/mine --data my_clips --init v1-5-pruned.safetensors --merges bpe.txt.gz
                                                            stages one and two are Stable Diffusion
    torchrun --nproc-per-node 4 train.py ...                on four GPUs
"""

import argparse
import dataclasses
from pathlib import Path

import torch

import text
import vae
from cache import cache_frames, cache_latents, cache_texts, read
from cli import add_flags, given_flags, run_main
from data import random_window
from diffusion import randn
from media.write import contact_sheet, write_clip
from model import UNet
from options import RECIPES, STAGES
from pipeline import Pipeline
from run import (Run, draw_previews, load_image_model, load_vae, merge_options, open_data,
                 progress, stages_to_run)
from temporal import start_as_shift, temporal_state
from tokenizer import CLIPTokenizer
from trainer import Trainer, step_generator

NUM_MERGES = 2000  # of the tokenizer, at most: words of a small data set become one token each
# What is standardised is measured on all frames or captions, or on evenly spaced ones: at least so
# many, and fewer than twice that, if clips are of about one length.
FRAMES, TEXTS = 8192, 256


# Stage one: the autoencoder


def reconstruction_loss(autoencoder, x, noise, motion_weight, kl_weight):
    """Squared error plus a small divergence from N(0, 1). LDM, Rombach et al. 2022, eq. 25.

    Its perceptual and its adversarial term need other networks, and are left out.

    x are frames (n, 3, h, w) in [-1, 1], noise (n, c, h/f, w/f) is for the sample of their latents.
    """
    reconstruction, gaussian = autoencoder(x, noise)
    error = reconstruction_error(reconstruction, x, motion_weight)
    return error + kl_weight * gaussian.kl().mean() / noise[0].numel()


def reconstruction_error(reconstruction, x, motion_weight):
    """Mean squared error of frames (n, 3, h, w), with more weight on what moves."""
    # A moving shape covers a seventh of a frame; unweighted, the background would decide. What
    # differs from a frame's median colour is taken for the shape.
    median = x.flatten(2).median(dim=2).values[:, :, None, None]  # n c h w -> n c 1 1
    differs = ((x - median).abs().amax(dim=1, keepdim=True) > 0.1).to(x.dtype)  # n 1 h w
    return ((reconstruction - x) ** 2 * (1 + motion_weight * differs)).mean()


def train_vae(run, clips):
    """Stage one: frames -> latents -> frames; then the scale that gives latents unit variance."""
    options, frames = run.options, cache_frames(run, clips)
    autoencoder = vae.AutoencoderKL(options.vae()).to(run.device, memory_format=torch.channels_last)
    config, count = autoencoder.config, options.vae_batch_size
    size = options.image_size // config.downscale
    trainer = Trainer(run, "vae", [(autoencoder.parameters(), 1.0)])
    forward = trainer.wrap(autoencoder)

    def pixels(x):
        return run.to_device(x)[0].float() / 127.5 - 1  # 0..255 -> -1..1

    def choose(generator):
        return torch.randint(frames.num_rows, (count,), generator=generator).tolist()

    @torch.no_grad()
    def preview(step):
        # Whole numbers: float32 would round the last row of a large cache up, to one behind it.
        x = pixels(frames.rows([i * (frames.num_rows - 1) // 7 for i in range(8)]))
        with run.precision():
            y = autoencoder.decode(autoencoder.encode(x).mean).float()
        write_clip(run.path / "previews" / f"vae-{step:06d}.png", contact_sheet([x.cpu(), y.cpu()]))

    chosen = (choose(step_generator(options.seed, "vae", step, micro))
              for step in range(trainer.step, trainer.num_steps)
              for micro in range(options.accumulate))
    batches = read(frames.rows, chosen, options.workers)  # ahead of the steps
    for (_, generator), x in zip(trainer.steps(preview), batches, strict=True):
        choose(generator)  # drawn for x already: the noise is what the generator gives next
        noise = torch.randn(count, config.latent_channels, size, size, generator=generator)
        x, (noise,) = pixels(x), run.to_device(noise)
        with run.precision():
            loss = reconstruction_loss(forward, x, noise, options.motion_weight, options.kl_weight)
        trainer.backward(loss)
    with run.precision():
        latents = some_latents(autoencoder, frames)
    vae.standardise(autoencoder, latents.to(run.device))
    run.save(vae=autoencoder)
    run.finish("vae")


def some_latents(autoencoder, frames):
    """Latents ((clips t), c, h/f, w/f) of some of the clips in a cache of frames."""
    some = progress(range(0, len(frames), max(1, frames.num_rows // FRAMES)), "encode")
    return torch.cat([vae.encode_clip(autoencoder, frames[i]).cpu() for i in some])


# Stages two and three: the U-Net


def denoising_loss(unet, diffusion, x0, noise, timesteps, context):
    """Mean squared error of the U-Net's prediction. DDPM, Ho et al. 2020, eq. 14; LDM, eq. 3.

    x0 and noise are (b, t, c, h, w), timesteps (b,), context the text's hidden states (b, n, d).
    """
    noisy = diffusion.add_noise(x0, noise, timesteps)
    prediction = unet(noisy, timesteps, context)
    target = diffusion.target(x0, noise, timesteps)  # the noise, or v
    return (prediction.float() - target).square().mean()


def random_clips(latents, captions, batch_size, num_frames, generator):
    """Windows of random clips, x0 (b, t, c, h, w), and their captions."""
    chosen = torch.randint(len(latents), (batch_size,), generator=generator).tolist()
    starts = [random_window(len(latents[i]), num_frames, generator) for i in chosen]
    windows = [latents[i][s : s + num_frames] for i, s in zip(chosen, starts, strict=True)]
    return torch.stack(windows), [captions[i] for i in chosen]


def random_timesteps(count, num_timesteps, generator, prefer_noise=0.0):
    """Timesteps (count,) int64; with prefer_noise p, t has the density (1 + p) t**p on [0, 1]."""
    # With u uniform, u ** (1 / (1 + p)) has that density: p = 0 is uniform, p = 3 has a mean of
    # 0.8. The exponent is the inverse of the distribution function t ** (1 + p).
    t = torch.rand(count, generator=generator) ** (1 / (1 + prefer_noise))
    return (t * num_timesteps).long().clamp(max=num_timesteps - 1)


def drop_captions(texts, part, generator):
    """Leave out a part of the captions: guidance needs the prediction without a text, too."""
    dropped = torch.rand(len(texts), generator=generator) < part
    return ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]


def train_image(run, autoencoder, latents, captions):
    """Stage two: the U-Net on single frames, and the text encoder with it.

    latents are one (t, c, h/f, w/f) for each clip.
    """
    options = run.options
    tokenizer = CLIPTokenizer.train(captions, NUM_MERGES, options.max_tokens)
    config = dataclasses.replace(text.PRESETS[options.preset], vocab_size=tokenizer.vocab_size,
                                 max_position_embeddings=options.max_tokens)
    encoder = text.CLIPTextModel(config)
    unique = ["", *dict.fromkeys(captions)]
    text.standardise(encoder, tokenizer(unique[:: max(1, len(unique) // TEXTS)]))
    encoder.to(run.device)
    unet = UNet(dataclasses.replace(options.unet(), temporal="none"))
    unet.to(run.device, memory_format=torch.channels_last)
    unet.gradient_checkpointing = run.plan("image").checkpointing
    diffusion, sampling = options.diffusion(), options.sampling(num_frames=1)
    pipeline = Pipeline(unet, autoencoder, encoder, tokenizer, diffusion, sampling)
    # No image shows a direction, so an encoder that learns fast forgets those words: text_rate.
    trainer = Trainer(run, "image", [(unet.parameters(), 1.0),
                                     (encoder.parameters(), options.text_rate)])
    predict, encode = trainer.wrap(unet), trainer.wrap(encoder)
    for _, generator in trainer.steps(draw_previews(run, "image", pipeline, captions)):
        x0, texts = random_clips(latents, captions, options.image_batch_size, 1, generator)
        noise = randn(x0.shape, generator)  # b 1 c h w
        timesteps = random_timesteps(len(x0), diffusion.num_train_timesteps, generator)
        ids = tokenizer(drop_captions(texts, options.caption_dropout, generator))  # b n
        x0, noise, timesteps, ids = run.to_device(x0, noise, timesteps, ids)
        with run.precision():
            context = encode(ids)  # b n -> b n d
            loss = denoising_loss(predict, diffusion, x0, noise, timesteps, context)
        trainer.backward(loss)
    run.save(unet=unet, image_unet=unet, text=(encoder, tokenizer), schedule=(diffusion, sampling))
    run.finish("image")


def train_video(run, image_model, latents, captions, preview=None):
    """Stage three: an image model, a Pipeline, learns clips. Returns the U-Net.

    latents are one (t, c, h/f, w/f) for each clip. preview(step, unet) replaces the usual samples.
    """
    options, diffusion = run.options, image_model.diffusion
    # Latent-Shift: the same U-Net with the shift, and the image model's weights, all and no others.
    # Only other variants have layers that the image model lacks: temporal_state().
    unet = UNet(dataclasses.replace(image_model.unet.config, **options.temporal_fields()))
    unet.load_state_dict(image_model.unet.state_dict() | temporal_state(unet))
    if options.start_as_shift:
        start_as_shift(unet)
    unet.to(run.device, memory_format=torch.channels_last)
    unet.gradient_checkpointing = run.plan("video").checkpointing
    sampling = options.sampling(options.num_frames)
    pipeline = dataclasses.replace(image_model, unet=unet, sampling=sampling)
    context_of = cache_texts(run, captions, image_model)
    new = temporal_state(unet)
    groups = [([p for name, p in unet.named_parameters() if name not in new], 1.0),
              ([p for name, p in unet.named_parameters() if name in new], options.new_layers_rate)]
    trainer = Trainer(run, "video", [group for group in groups if group[0]])
    predict = trainer.wrap(unet)
    look = draw_previews(run, "video", pipeline, captions) if preview is None else (
        lambda step: preview(step, unet))
    for step, generator in trainer.steps(look):
        t, b = options.latent_frames, options.video_batch_size
        if options.image_every and (step + 1) % options.image_every == 0:
            t, b = 1, b * t  # images, so that it stays an image model (our addition)
        x0, texts = random_clips(latents, captions, b, t, generator)  # b t c h w
        noise = randn(x0.shape, generator)
        # Where a shape goes is decided at the noisiest timesteps, so the first half of the training
        # prefers them. It is a choice of the tiny recipe, not of the paper.
        prefer = options.early_noise * max(0.0, 1 - 2 * step / options.video_steps) * (t > 1)
        timesteps = random_timesteps(b, diffusion.num_train_timesteps, generator, prefer)
        texts = drop_captions(texts, options.caption_dropout, generator)
        context = context_of(texts)  # b n d
        x0, noise, timesteps, context = run.to_device(x0, noise, timesteps, context)
        with run.precision():
            loss = denoising_loss(predict, diffusion, x0, noise, timesteps, context)
        trainer.backward(loss)
    run.save(unet=unet, schedule=(diffusion, sampling))
    run.finish("video")
    return unet


def main():
    parser = argparse.ArgumentParser(
        description="Train a text-to-video model.", allow_abbrev=False,
        epilog="Defaults are those of the tiny preset; another --preset has its own (options.py).")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--stage", choices=STAGES, help="train this stage only")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished stage")
    add_flags(parser, RECIPES["tiny"])
    args = parser.parse_args()
    options, finished = merge_options(args.run, given_flags(args, RECIPES["tiny"]))
    adopting = options.init is not None and "image" not in finished
    stages = stages_to_run(args.run, args.stage, ["vae", "image"] if adopting else finished)
    if not stages:
        print(f"{args.run}: all stages are finished")
        return
    torch.set_flush_denormal(True)  # numbers near 0 would take a CPU many times as long
    clips = open_data(options)
    run = Run(args.run, options, finished, args.resume)
    if adopting:
        run.adopt()
    for stage in stages:  # what does not fit is refused now and not hours later
        run.plan(stage)
    for stage in stages:
        torch.manual_seed(options.seed)  # of new weights
        if stage == "vae":
            train_vae(run, clips)
        elif stage == "image":
            autoencoder = load_vae(run.path, run.device, options.precision)
            latents = cache_latents(run, clips, autoencoder)
            train_image(run, autoencoder, latents, clips.captions)
        else:
            image_model = load_image_model(run.path, run.device, options.precision)
            latents = cache_latents(run, clips, image_model.vae)
            train_video(run, image_model, latents, clips.captions)


if __name__ == "__main__":
    run_main(main)
