"""Training in three stages, each the ground of the next:

    vae     frames -> latents -> frames. Latents are encoded once, afterwards, for all that follows.
    image   text-to-image: the U-Net on single frames, and with it the text encoder.
    video   text-to-video: the same U-Net with the temporal shift, on clips. The text is frozen now,
            so each caption is encoded once. This is Latent-Shift (An et al. 2023, section 3); with
            another --temporal it is one of its neighbours (temporal.py).

    python train.py runs/mine --data shapes                 all three, or what is still missing
    python train.py runs/mine --data my_clips --resume      go on after a stop
    python train.py runs/mine --data my_clips --init v1-5-pruned.safetensors --merges bpe.txt.gz
                                                            stages one and two are Stable Diffusion
    torchrun --nproc-per-node 4 train.py ...                on four GPUs

The run's folder is a model in the diffusers layout (weights.py), which sample.py and evaluate.py
open, and beside it train.json, metrics.jsonl, previews/, image_unet/ (the U-Net before it saw a
clip) and, in mid-stage, training_state.pt.
"""

import argparse
import dataclasses
import pickle
import sys
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

import text
import vae
import weights
from cli import add_flags, choose_device, given_flags, run_main
from data import ClipFolder, MovingShapes, random_window
from diffusion import randn
from files import write_json
from losses import DenoisingLoss, ReconstructionLoss
from model import UNet
from media.write import contact_sheet, side_by_side, write_clip
from pipeline import Pipeline
from options import RECIPES, STAGES, merge_options, stages_to_run
from temporal import start_as_shift
from trainer import Plan, Trainer, processes, start_processes, step_generator

NUM_MERGES = 2000  # of the tokenizer, at most: words of a small clip set become one token each
PREVIEW_PIXELS = 2**20  # drawn at once for a preview, which comes on top of training's memory
TEXTS = 64  # captions that are encoded at once


class Run:
    """The folder of a training run: which stages are done, and what an interrupted one left."""

    def __init__(self, path, options, finished, resume):
        self.path, self.options, self.finished = Path(path), options, finished
        self.device = start_processes(choose_device(options.device))
        self.main, self.state = processes()[0] == 0, None
        state_path = self.path / "training_state.pt"
        if state_path.exists():
            self.state = read_state(state_path)
            if self.state["stage"] in finished:  # a kill came just before its removal
                self.state = None
            elif not resume:
                raise ValueError(f"{state_path} is of an unfinished stage: add --resume to go on "
                                 "with it, or remove that file to start it anew")
        self.save_record()

    def save_record(self):
        """Write train.json, when all processes have read what was there."""
        if distributed.is_initialized():
            distributed.barrier()
        if self.main:
            options = dataclasses.asdict(self.options)
            write_json(self.path / "train.json", {"options": options, "finished": self.finished})
        if distributed.is_initialized():
            distributed.barrier()

    def fit(self, stage, objective, make_batch, preview):
        """Train an objective as the stage's options say, from its state if there is one."""
        options = self.options
        plan = Plan(
            stage, getattr(options, f"{stage}_steps"), getattr(options, f"{stage}_learning_rate"),
            objective.to(self.device), make_batch, preview,
        )
        trainer = Trainer(self.path, plan, options, self.device)
        if self.state is not None and self.state["stage"] != stage:
            raise ValueError(f"{trainer.state_path}: is of the {self.state['stage']} stage; "
                             f"finish that one first")
        if self.state is not None:
            trainer.load_state(self.state)
            self.state = None
        trainer.run()
        objective.requires_grad_(False)

    def finish(self, stage):
        """Note that a stage is done, after what it made has been written."""
        self.finished = [*self.finished, stage]
        self.save_record()
        if self.main:
            (self.path / "training_state.pt").unlink(missing_ok=True)

    def to_device(self, *tensors):
        """Tensors on the run's device; from pinned memory, so that no step waits for a copy."""
        if self.device.type != "cuda":
            return tensors
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)


def read_state(path):
    """A training state; nothing but tensors and plain values is ever loaded from it."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":  # torch would take it for a file of its early days
                raise RuntimeError("no archive")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "stage" not in state:
            raise RuntimeError("of another program")
        return state
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no training state ({reason}); remove it to start the stage "
                         "anew") from None


def open_data(options):
    """The clips that --data names: ([uint8 (t, 3, h, w), ...], [caption, ...])."""
    size = options.num_frames, options.image_size
    if options.data == "shapes":
        clips = MovingShapes(options.num_clips, *size, options.seed)
    else:
        pace = options.stride, options.frame_rate, options.max_frames
        clips = ClipFolder(options.data, size[1], size[0], *pace)
    bar = tqdm(range(len(clips)), "read ", unit="clip", disable=processes()[0] > 0, leave=False)
    return [clips[i][0] for i in bar], clips.captions


def train_vae(run, clips):
    """Stage one: the autoencoder, then the scale that gives its latents unit variance."""
    options = run.options
    autoencoder = vae.AutoencoderKL(options.vae()).to(memory_format=torch.channels_last)
    config, frames, count = autoencoder.config, torch.cat(clips), options.vae_batch_size
    size = options.image_size // config.downscale

    def pixels(chosen):
        return run.to_device(frames[chosen])[0].float() / 127.5 - 1

    def make_batch(step, micro):
        generator = step_generator(options.seed, "vae", step, micro)
        chosen = torch.randint(len(frames), (count,), generator=generator)
        noise = torch.randn(count, config.latent_channels, size, size, generator=generator)
        return pixels(chosen), *run.to_device(noise)

    @torch.no_grad()
    def preview(step):
        x = pixels(torch.linspace(0, len(frames) - 1, 8).long())
        y = autoencoder.decode(autoencoder.encode(x).mean)
        write_clip(run.path / "previews" / f"vae-{step:06d}.png", contact_sheet([x.cpu(), y.cpu()]))

    run.fit("vae", ReconstructionLoss(autoencoder, options), make_batch, preview)
    vae.standardise(autoencoder, torch.cat(encode_clips(run, autoencoder, clips)).to(run.device))
    if run.main:
        weights.save_vae(run.path / "vae", autoencoder)
    run.finish("vae")


def encode_clips(run, autoencoder, clips):
    """All clips as scaled latents (t, c, h, w) on the CPU: once, not once a step."""
    bar = tqdm(clips, "encode", unit="clip", disable=not run.main, leave=False)
    return [vae.encode_clip(autoencoder, clip.to(run.device)).cpu() for clip in bar]


def denoising_batches(run, stage, latents, captions, texts, num_timesteps):
    """make_batch for the U-Net: (latents, noise, timesteps, context) of random clips or frames.

    texts[caption] is what the loss wants of a caption; texts[""] stands in for one that is dropped.
    """
    options = run.options

    def make_batch(step, micro):
        generator = step_generator(options.seed, stage, step, micro)
        t, b = options.num_frames, options.video_batch_size
        if stage == "image":
            t, b = 1, options.image_batch_size
        elif options.image_every and step % options.image_every == options.image_every - 1:
            t, b = 1, b * t  # pictures, to stay an image model; about as much work
        chosen = torch.randint(len(latents), (b,), generator=generator).tolist()
        starts = [random_window(len(latents[i]), t, generator) for i in chosen]
        x0 = torch.stack([latents[i][s : s + t] for i, s in zip(chosen, starts, strict=True)])
        noise = randn(x0.shape, generator, options.shared_noise if t > 1 else 0.0)
        # Motion is decided where the noise is strong, so that is learnt first.
        prefer = options.early_noise * max(0.0, 1 - 2 * step / options.video_steps) * (t > 1)
        uniform = torch.rand(b, generator=generator) ** (1 / (1 + prefer))
        timesteps = (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)
        dropped = (torch.rand(b, generator=generator) < options.caption_dropout).tolist()
        context = torch.stack(
            [texts["" if drop else captions[i]] for i, drop in zip(chosen, dropped, strict=True)]
        )
        return run.to_device(x0, noise, timesteps, context)

    return make_batch


def adopt(run):
    """Stages one and two of somebody else: a trained model becomes the run's own, whole."""
    options = run.options
    if run.main:
        pipeline = weights.load_pipeline(
            options.init, "none", options.merges, options.prediction_type
        )
        for note in pipeline.report.notes:
            print(note, file=sys.stderr)
        pipeline.encode_text([""])  # without a tokenizer, say so now
        unet, factor = pipeline.unet, pipeline.vae.config.downscale
        factor *= 2 ** (len(unet.config.block_out_channels) - 1)
        if options.image_size % factor:
            raise ValueError(f"--image-size needs a multiple of {factor}, "
                             f"got {options.image_size}")
        weights.save_unet(run.path / "image_unet", unet)
        weights.save_pipeline(pipeline, run.path)
    run.finished = ["vae"]
    run.finish("image")


def preview_samples(run, stage, pipeline, captions):
    """on_preview for the U-Net: a few captions drawn with the average's weights."""
    prompts = list(dict.fromkeys(captions))
    prompts = prompts[:: max(1, len(prompts) // 9)][:9]
    sampling = pipeline.sampling
    at_once = max(1, PREVIEW_PIXELS // (sampling.num_frames * sampling.image_size**2))

    def preview(step):
        clips = []
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            *_, latents = pipeline.sample(batch, range(start, start + len(batch)))
            clips.append(pipeline.decode(latents))
        suffix = ".png" if stage == "image" else ".gif"
        path = run.path / "previews" / f"{stage}-{step:06d}{suffix}"
        clip = side_by_side(torch.cat(clips))
        write_clip(path, clip, pipeline.sampling.frames_per_second)

    return preview


def new_text_model(options, captions):
    """A tokenizer that has learnt the captions' words, and an untrained encoder for its tokens."""
    tokenizer = text.CLIPTokenizer.train(captions, NUM_MERGES, options.max_tokens)
    config = dataclasses.replace(
        text.PRESETS[options.preset], vocab_size=tokenizer.vocab_size,
        max_position_embeddings=options.max_tokens,
    )
    encoder = text.CLIPTextModel(config)
    text.standardise(encoder, tokenizer(["", *dict.fromkeys(captions)]))
    return encoder, tokenizer


def train_unet(run, stage, clips, captions):
    """Stage two, image: the U-Net and the text encoder. Stage three, video: the U-Net alone."""
    options = run.options
    autoencoder = weights.load_vae(run.path / "vae").to(run.device)
    autoencoder.to(memory_format=torch.channels_last)
    latents = encode_clips(run, autoencoder, clips)
    if stage == "image":
        encoder, tokenizer = new_text_model(options, captions)
        unet = UNet(dataclasses.replace(options.unet(), temporal="none"))
        diffusion = options.diffusion()
    else:
        encoder, tokenizer = weights.load_text(run.path)
        unet = weights.load_sibling(run.path / "image_unet", options.way_through_time())
        if options.start_as_shift:
            start_as_shift(unet)
        diffusion, _ = weights.load_schedule(run.path)
    encoder.to(run.device)
    unet.to(run.device, memory_format=torch.channels_last)
    unet.gradient_checkpointing = options.gradient_checkpointing
    sampling = options.sampling(1 if stage == "image" else options.num_frames)
    pipeline = Pipeline(unet, autoencoder, encoder, tokenizer, diffusion, sampling)
    unique = ["", *dict.fromkeys(captions)]
    texts = tokenizer(unique)
    if stage == "video":
        parts = [unique[i : i + TEXTS] for i in range(0, len(unique), TEXTS)]
        texts = torch.cat([pipeline.encode_text(part).cpu() for part in parts])
    batches = denoising_batches(
        run, stage, latents, captions, dict(zip(unique, texts, strict=True)),
        diffusion.num_train_timesteps,
    )
    learnt = encoder if stage == "image" else None
    rates = options.text_rate, options.new_layers_rate
    objective = DenoisingLoss(unet, pipeline.diffusion, learnt, *rates)
    run.fit(stage, objective, batches, preview_samples(run, stage, pipeline, captions))
    if run.main:
        if stage == "image":
            weights.save_text(run.path, encoder, tokenizer)
            weights.save_unet(run.path / "image_unet", unet)
        weights.save_schedule(run.path, pipeline.diffusion, sampling)
        weights.save_unet(run.path / "unet", unet)
    run.finish(stage)


def main():
    parser = argparse.ArgumentParser(
        description="Train a text-to-video model.", allow_abbrev=False,
        epilog="Defaults are those of the tiny preset; another --preset has its own (recipe.py).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--stage", choices=STAGES, help="train this stage only")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished stage")
    add_flags(parser, RECIPES["tiny"])
    args = parser.parse_args()
    options, finished = merge_options(args.run, given_flags(args, RECIPES["tiny"]))
    adopting = options.init is not None and "image" not in finished
    stages = stages_to_run(args.run, args.stage, ["vae", "image"] if adopting else finished)
    if not stages:
        print(f"{args.run}: all stages are finished")
        return
    torch.set_flush_denormal(True)  # numbers near 0 would take a CPU many times as long
    torch.manual_seed(options.seed)
    clips, captions = open_data(options)
    run = Run(args.run, options, finished, args.resume)
    if adopting:
        adopt(run)
    for stage in stages:
        torch.manual_seed(options.seed)
        if stage == "vae":
            train_vae(run, clips)
        else:
            train_unet(run, stage, clips, captions)


if __name__ == "__main__":
    run_main(main)
