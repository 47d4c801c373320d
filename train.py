"""Training in three stages, each built on the one before:

    vae     frames -> latents -> frames. The following stages encode the clips once.
    image   text-to-image: the U-Net on single frames, and with it the text encoder.
    video   text-to-video: the same U-Net with the temporal shift, on clips. The text encoder is
            frozen, so each caption is encoded once. This is Latent-Shift (An et al. 2023, section
            3); --temporal chooses another variant (temporal.py).

    python train.py runs/mine --data shapes                 all three; --resume after a stop
    python train.py runs/mine --data my_clips --check       read every clip and list every problem
    python train.py runs/mine --data my_clips --init v1-5-pruned.safetensors --merges bpe.txt.gz
                                                            stages one and two are Stable Diffusion
    torchrun --nproc-per-node 4 train.py ...                on four GPUs
"""

import dataclasses
from pathlib import Path

import torch

import text
import vae
from checkpoints.tokenizers import describe_cuts, load_tokenizer
from diffusion import randn
from model import UNet
from pipeline import Pipeline
from support.cli import Parser, add_flags, given_flags, run_main
from support.devices import rank_and_count
from temporal import temporal_state
from tokenizer import CLIPTokenizer
from trainer import Trainer
from training.cache import cache_frames, cache_latents, cache_texts
from training.options import RECIPES, STAGES, merge_options, stages_to_run
from training.rehearsal import random_data, try_stages
from training.run import Run, load_image_model, load_vae, open_data, progress

NUM_MERGES = 2000  # of a new tokenizer, at most; enough for one token per word of a small data set
FRAMES, TEXTS = 8192, 256  # about how many serve to standardise latents and text embeddings
CAPTION_DROPOUT = 0.1  # fraction of captions left out, for guidance (Ho & Salimans 2022)
# Learning-rate multiplier of the text encoder, which would forget directions: no image shows one
TEXT_RATE = 0.01


def reconstruction_loss(autoencoder, x, noise, motion_weight, kl_weight):
    """Squared error plus a small divergence from N(0, 1). LDM, Rombach et al. 2022, eq. 25.

    The paper's perceptual and adversarial terms need other networks, so they are left out.

    x are frames (n, 3, h, w) in [-1, 1]; noise (n, c, h/f, w/f) from N(0, 1) samples their latents.
    """
    reconstruction, gaussian = autoencoder(x, noise)  # n 3 h w; mean and logvar n c h/f w/f
    error = reconstruction_error(reconstruction, x, motion_weight)
    return error + kl_weight * gaussian.kl().mean() / noise[0].numel()


def reconstruction_error(reconstruction, x, motion_weight):
    """Mean squared error of frames (n, 3, h, w), with more weight on moving shapes."""
    # A moving shape covers a seventh of a frame; unweighted, the background would dominate. Pixels
    # that differ from a frame's median colour count as the shape.
    median = x.flatten(2).median(dim=2).values[:, :, None, None]  # n c h w -> n c 1 1
    differs = ((x - median).abs().amax(dim=1, keepdim=True) > 0.1).to(x.dtype)  # n 1 h w
    return ((reconstruction - x) ** 2 * (1 + motion_weight * differs)).mean()


def train_vae(run, frames):
    """Stage one: the autoencoder on frames (n, 3, h, w) uint8 of all clips."""
    options, batch_size = run.options, run.options.vae_batch_size
    autoencoder = vae.AutoencoderKL(options.vae()).to(run.device, memory_format=run.layout)
    size = options.image_size // autoencoder.config.downscale
    trainer = Trainer(run, "vae", [(autoencoder.parameters(), 1.0)])
    forward = trainer.wrap(autoencoder)
    for _, generator in trainer.steps(run.preview_vae(autoencoder, frames)):
        chosen = torch.randint(len(frames), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, autoencoder.config.latent_channels, size, size,
                            generator=generator)
        x, noise = run.to_device(frames[chosen], noise)  # b 3 h w, b c h/f w/f
        x = x.float() / 127.5 - 1  # 0..255 -> -1..1
        with run.precision():
            loss = reconstruction_loss(forward, x, noise, options.motion_weight, options.kl_weight)
        trainer.backward(loss)
    some = frames[:: max(1, len(frames) // FRAMES)]  # evenly spaced
    with run.precision():
        latents = torch.cat([vae.encode_clip(autoencoder, part) for part in some.split(64)])
    vae.standardise(autoencoder, latents)
    run.save(vae=autoencoder)
    run.finish("vae")


def denoising_loss(unet, diffusion, x0, noise, timesteps, context):
    """Mean squared error of the U-Net's prediction. DDPM, Ho et al. 2020, eq. 14; LDM, eq. 3.

    x0 and noise are (b, t, c, h, w), timesteps (b,), context the text's hidden states (b, n, d).
    """
    noisy = diffusion.add_noise(x0, noise, timesteps)  # b t c h w
    prediction = unet(noisy, timesteps, context)  # b t c h w
    target = diffusion.target(x0, noise, timesteps)  # the noise, or v
    return (prediction.float() - target).square().mean()


def random_clips(latents, captions, batch_size, num_frames, generator):
    """Windows of random clips, x0 (b, t, c, h, w), and their captions, maybe several per clip."""
    chosen = torch.randint(len(captions), (batch_size,), generator=generator).tolist()
    windows = []
    for clip in (latents[i % len(latents)] for i in chosen):
        start = random_window(len(clip), num_frames, generator)
        windows.append(clip[start : start + num_frames])  # t c h w
    return torch.stack(windows), [captions[i] for i in chosen]


def random_window(num_available, num_frames, generator):
    """A random index where num_frames successive frames start."""
    return int(torch.randint(num_available - num_frames + 1, (), generator=generator))


def random_timesteps(count, num_timesteps, generator, prefer_noise=0.0):
    """Timesteps (count,) int64; with prefer_noise p, t has the density (1 + p) t**p on [0, 1]."""
    # With u uniform, u ** (1 / (1 + p)) has that density: p = 0 is uniform, p = 3 has a mean of
    # 0.8. The exponent is the inverse of the distribution function t ** (1 + p).
    t = torch.rand(count, generator=generator) ** (1 / (1 + prefer_noise))
    return (t * num_timesteps).long().clamp(max=num_timesteps - 1)


def drop_captions(texts, fraction, generator):
    """Leave out a fraction of captions, because guidance also predicts without a text."""
    dropped = torch.rand(len(texts), generator=generator) < fraction
    return ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]


def new_tokenizer(options, captions):
    """A tokenizer learned from captions."""
    return CLIPTokenizer.train(captions, NUM_MERGES, options.max_tokens, progress=lambda merges:
                               progress(merges, "tokenizer", unit="merge"))


def new_image_model(options, autoencoder, captions, tokenizer=None):
    """The untrained model of the image stage, a Pipeline; captions train its tokenizer if None.

    An image model is the U-Net without the shift.
    """
    tokenizer = tokenizer or new_tokenizer(options, captions)
    config = dataclasses.replace(text.PRESETS[options.preset], vocab_size=tokenizer.vocab_size,
                                 max_position_embeddings=tokenizer.max_length)
    encoder = text.CLIPTextModel(config)  # ids b n -> context b n d
    unique = ["", *dict.fromkeys(captions)]
    text.standardise(encoder, tokenizer(unique[:: max(1, len(unique) // TEXTS)]))
    unet = UNet(dataclasses.replace(options.unet(), temporal="none"))
    return Pipeline(unet, autoencoder, encoder, tokenizer, options.diffusion(),
                    options.sampling(num_frames=1))


def train_image(run, autoencoder, latents, captions):
    """Stage two: the U-Net on single frames, and the text encoder with it.

    latents has one (t, c, h/f, w/f) per clip.
    """
    # A resume has the tokenizer of its start, because captions may have been edited since.
    tokenizer = load_tokenizer(run.path / "tokenizer") if run.state else None
    options, model = run.options, new_image_model(run.options, autoencoder, captions, tokenizer)
    run.note(describe_cuts(model.tokenizer, captions, "captions"))
    unet, encoder, diffusion = model.unet, model.text_encoder, model.diffusion
    run.save(text=(encoder, model.tokenizer))
    unet.to(run.device, memory_format=run.layout)
    encoder.to(run.device)
    unet.gradient_checkpointing = run.checkpointing
    trainer = Trainer(run, "image", [(unet.parameters(), 1.0), (encoder.parameters(), TEXT_RATE)])
    predict, encode = trainer.wrap(unet), trainer.wrap(encoder)
    for _, generator in trainer.steps(run.draw_previews("image", model, captions)):
        x0, texts = random_clips(latents, captions, options.image_batch_size, 1, generator)
        noise = randn(x0.shape, generator)  # b 1 c h w
        timesteps = random_timesteps(len(x0), diffusion.num_train_timesteps, generator)
        ids = model.tokenizer(drop_captions(texts, CAPTION_DROPOUT, generator))  # b n
        x0, noise, timesteps, ids = run.to_device(x0, noise, timesteps, ids)
        with run.precision():
            context = encode(ids)  # b n -> b n d
            loss = denoising_loss(predict, diffusion, x0, noise, timesteps, context)
        trainer.backward(loss)
    run.save(unet=unet, image_unet=unet, text=(encoder, model.tokenizer),
             schedule=(diffusion, model.sampling))
    run.finish("image")


def video_unet(image_unet, options):
    """Latent-Shift: the image model's U-Net with the shift, and exactly its weights."""
    fields = options.temporal_fields()
    if temporal_state(image_unet):  # of --init RUN, whose layers learn on for as many frames
        fields["max_frames"] = image_unet.config.max_frames
    unet = UNet(dataclasses.replace(image_unet.config, **fields))
    # Only variants other than the shift have layers that an image model lacks: temporal_state().
    unet.load_state_dict(temporal_state(unet) | image_unet.state_dict())
    return unet


def train_video(run, model, latents, captions, context_of, preview=None, num_previews=4):
    """Stage three: the U-Net of `model`, a Pipeline, learns clips.

    latents has one (t, c, h/f, w/f) per clip, context_of(texts) is (b, n, d). preview(step)
    replaces the usual previews.
    """
    options, unet, diffusion = run.options, model.unet, model.diffusion
    unet.to(run.device, memory_format=run.layout)
    unet.gradient_checkpointing = run.checkpointing
    model.sampling = options.sampling(options.num_frames)
    new = temporal_state(unet)
    groups = [([p for name, p in unet.named_parameters() if (name in new) == own], rate)
              for own, rate in ((False, 1.0), (True, options.new_layers_rate))]
    trainer = Trainer(run, "video", [group for group in groups if group[0]])
    predict = trainer.wrap(unet)
    preview = preview or run.draw_previews("video", model, captions)
    for step, generator in trainer.steps(preview, num_previews):
        t, b = options.latent_frames, options.video_batch_size
        if options.image_every and (step + 1) % options.image_every == 0:
            t, b = 1, b * t  # images, as a safeguard for drawing images later (our addition)
        x0, texts = random_clips(latents, captions, b, t, generator)  # b t c h w
        noise = randn(x0.shape, generator)  # drawn separately for every frame
        # The noisiest timesteps decide where a shape goes, so training prefers them at first, until
        # its middle. This is a choice of the recipes tiny and small, not of the paper.
        prefer = options.early_noise * max(0.0, 1 - 2 * step / options.video_steps) * (t > 1)
        timesteps = random_timesteps(b, diffusion.num_train_timesteps, generator, prefer)
        context = context_of(drop_captions(texts, CAPTION_DROPOUT, generator))  # b n d
        x0, noise, timesteps, context = run.to_device(x0, noise, timesteps, context)
        with run.precision():
            loss = denoising_loss(predict, diffusion, x0, noise, timesteps, context)
        trainer.backward(loss)
    run.save(unet=unet, schedule=(diffusion, model.sampling))
    run.finish("video")


def rehearse(run, stages, captions):
    """Try two steps of each stage, to see whether a GPU's memory suffices."""
    options, some = run.options, [max(captions, key=len)]
    model = (load_image_model(run.path, run.device, options.precision, options.temporal)
             if "image" in run.finished
             else new_image_model(options, vae.AutoencoderKL(options.vae()), some))
    frames, latents, context_of = random_data(options, model)
    trials = {"vae": lambda run: train_vae(run, frames),
              "image": lambda run: train_image(run, model.vae, latents, some),
              "video": lambda run: train_video(
                  run, dataclasses.replace(model, unet=video_unet(model.unet, options)), latents,
                  some, context_of)}
    try_stages(run, {stage: trials[stage] for stage in stages})


def main():
    parser = Parser(description="Train a text-to-video model.", epilog="Defaults are for the tiny "
                    "preset; other presets have theirs (training/options.py).")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--stage", choices=STAGES, help="train only this stage")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished stage")
    parser.add_argument("--check", action="store_true",
                        help="read every clip of --data, list every problem, train nothing")
    add_flags(parser, RECIPES["tiny"])
    args = parser.parse_args()
    options, finished = merge_options(args.run, given_flags(args, RECIPES["tiny"]))
    if args.check:
        from training.data import check  # imported here, because training does not need it
        return check(options, new_tokenizer)
    adopting = options.init is not None and "image" not in finished
    stages = stages_to_run(args.run, args.stage, ["vae", "image"] if adopting else finished)
    if not stages:
        print(f"{args.run}: all stages are finished")
        return 0
    torch.set_flush_denormal(True)  # numbers near 0 would make a CPU many times slower
    clips = open_data(options)
    run = Run(args.run, options, finished, args.resume)
    run.start(clips, stages)
    if adopting:
        run.adopt(lambda autoencoder: cache_latents(run, clips, autoencoder))
    if run.device.type == "cuda" and rank_and_count()[1] == 1:
        rehearse(run, stages, clips.captions)
    for stage in stages:
        torch.manual_seed(options.seed)  # for new weights
        if stage == "vae":
            train_vae(run, cache_frames(run, clips).rows)
        elif stage == "image":
            autoencoder = load_vae(run.path, run.device, options.precision)
            train_image(run, autoencoder, cache_latents(run, clips, autoencoder), clips.captions)
        else:
            model = load_image_model(run.path, run.device, options.precision, options.temporal)
            model.unet = video_unet(model.unet, options)
            latents = cache_latents(run, clips, model.vae)
            context_of = cache_texts(run, clips.captions, model)
            train_video(run, model, latents, clips.captions, context_of)
    return 0


if __name__ == "__main__":
    run_main(main)
