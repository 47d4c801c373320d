"""A decoder that looks back in time: MagicVideo's VideoVAE, Zhou et al. 2022.

The autoencoder decodes a clip frame by frame, so its errors differ from frame to frame: it
flickers. Here the decoder of a trained autoencoder gets temporal layers, by default attention of
each place to its own frame and earlier ones, and is fine-tuned on clips. Encoder and latents stay
as they are, so every U-Net trained on them profits without training.

    python -m papers.video_decoder train runs/demo          # leaves runs/demo/video_decoder/
    python -m papers.video_decoder evaluate runs/demo
    python -m papers.video_decoder costs                    # of Stable Diffusion's autoencoder

sample.py and evaluate.py find the decoder in the run. A sampler's latents are not an encoder's, so
the decoder is trained on latents with noise, too (ours, as are steps on images). With --temporal
none nothing looks back: the control that tells what noise gives from what the layers give.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import processes
import vae
import weights
from cache import cache_frames
from cli import add_flags, check_ranges, choose_device, given_flags, option, run_main
from evaluate import agreement, choose_prompts, crispness, print_table, rates
from files import write_json
from layers import per_frame
from memory import check_sampling
from metrics import consistency, mean_over_clips, psnr, real_clips
from options import RECIPES, LoopOptions
from papers.fidelity import flicker
from papers.runs import PaperRun
from run import open_data, read_record
from shapes import caption_of
from temporal import VARIANTS, temporal_state
from train import random_clips, reconstruction_error
from trainer import Trainer

FOLDER = "video_decoder"  # inside a run, where sample.py and evaluate.py look for it
CLEAN_PART = 0.25  # of the clips in training, whose latents get no noise
NOISE_LEVELS = (0.05, 0.1, 0.2)  # deviations, of latents of variance 1, that evaluate adds


@dataclass(frozen=True)
class DecoderOptions(LoopOptions):
    """The options of a decoder's fine-tuning."""

    data: str | None = option(None, "`shapes`, or a folder of clips (None: the run's own data; a "
                              "diffusers folder has none)")
    temporal: str = option("directed", "what the decoder looks at other frames with (temporal.py)",
                           choices=VARIANTS)
    only_new: bool = option(False, "train the temporal layers alone")
    noise: float = option(0.4, "largest deviation of the noise that latents get, of variance 1")
    image_every: int = option(10, "every so many steps frames are decoded as images; 0: none are")
    decoder_steps: int = option(300, "steps")
    decoder_batch_size: int = option(4, "clips a step")
    decoder_learning_rate: float = option(1e-3, "learning rate")

    def __post_init__(self):
        super().__post_init__()
        if self.only_new and self.temporal in ("none", "shift"):
            raise ValueError(f"--only-new needs a variant with layers of its own, got --temporal "
                             f"{self.temporal}; choose directed, attention, joint or conv")


class DecoderRun(PaperRun):
    """The folder of a decoder, inside the run whose latents it decodes."""

    record, stages, options_type = "video_decoder.json", ("decoder",), DecoderOptions


def video_decoder(autoencoder, temporal, max_frames):
    """The autoencoder with temporal layers in its decoder, all initialised as the identity.

    So clips are decoded to the same bits as before, but for the shift: it has no parameters, and
    mixes frames from the beginning. A clip of one frame skips the layers, trained or not.
    """
    config = dataclasses.replace(autoencoder.config, temporal=temporal, max_frames=max_frames)
    new = vae.AutoencoderKL(config)
    new.load_state_dict(temporal_state(new) | autoencoder.state_dict())
    return new


def train(run, folder):
    """Fine-tune the decoder of the autoencoder in a model's folder."""
    options, known = run.options, (folder / "train.json").exists()  # Stable Diffusion has none
    if not known and options.data is None:
        raise ValueError(f"{folder}: has no train.json; name the clips with --data, or train the "
                         "decoder of the run that it was started from")
    old = read_record(folder)[0] if known else RECIPES["sd1"]  # clips are prepared as they were
    old = dataclasses.replace(old, data=options.data or old.data)
    clips = open_data(old)
    frames = cache_frames(run, clips)  # of each clip t 3 h w
    model = video_decoder(weights.load_vae(folder / "vae"), options.temporal, old.num_frames)
    model.requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    new = temporal_state(model.decoder)
    trained = [p.requires_grad_(True) for name, p in model.decoder.named_parameters()
               if name in new or not options.only_new]
    trainer = Trainer(run, "decoder", [(trained, 1.0)])
    decode = trainer.wrap(model.decoder)
    image_every = 0 if options.only_new else options.image_every  # images skip the new layers
    for step, generator in trainer.steps():
        x, _ = random_clips(frames, clips.captions, options.decoder_batch_size, old.num_frames,
                            generator)
        (x,) = run.to_device(x)
        z = per_frame(lambda frames: vae.encode_clip(model, frames), x)  # b t c h/f w/f
        noise = torch.randn(z.shape, generator=generator)
        deviation, clean = torch.rand(2, len(x), 1, 1, 1, 1, generator=generator)
        noise = noise * options.noise * deviation * (clean >= CLEAN_PART)
        z = (z + noise.to(z)) / model.config.scaling_factor
        x = x.to(z) / 127.5 - 1
        if image_every and (step + 1) % image_every == 0:
            x, z = (y.flatten(0, 1)[:, None] for y in (x, z))  # b t c h w -> (b t) 1 c h w
        with run.precision():
            decoded = decode(per_frame(model.post_quant_conv, z))
            loss = reconstruction_error(decoded.flatten(0, 1), x.flatten(0, 1), old.motion_weight)
        trainer.backward(loss)
    if processes.is_main():
        weights.save_network(run.path, model)
    run.finish("decoder")


def scores(clips, prompts, true=None):
    """{measure: value} of decoded clips (n, t, 3, h, w), with their truth if it is known."""
    result = {}
    if true is not None:
        if clips.shape[1] > 1:
            result["flicker"] = round(1e4 * flicker(true, clips).mean().item(), 1)
        result["PSNR"] = round(mean_over_clips(psnr, clips, true), 2)
    if clips.shape[1] > 1:
        result["consistency"] = round(mean_over_clips(consistency, clips[:, None]), 4)
    overlaps = [crispness(clip, prompt[1]) for clip, prompt in zip(clips, prompts, strict=True)]
    result["IoU"] = round(float(np.mean(overlaps)), 4)
    result["right, %"] = rates(agreement(clips, prompts), image=clips.shape[1] == 1)["all"]
    return result


def draw_latents(pipeline, prompts, seed, batch_size=16):
    """Latents (n, t, c, h, w) that the run's U-Net draws of combinations."""
    parts = []
    for start in tqdm(range(0, len(prompts), batch_size), "sample", leave=False):
        texts = [caption_of(*prompt) for prompt in prompts[start : start + batch_size]]
        *_, latents = pipeline.sample(texts, range(seed + start, seed + start + len(texts)))
        parts.append(latents)
    return torch.cat(parts)


def evaluate(autoencoders, latents, true, prompts, seed):
    """{"source of latents, name": scores} of {name: AutoencoderKL} that share an encoder.

    latents {source: (n, t, c, h, w)} have no truth, such as those that a U-Net draws of prompts;
    those of true clips (n, t, 3, h, w) in [-1, 1] are added here, with and without noise.
    """
    encoder, result = next(iter(autoencoders.values())), {}
    frames = ((true + 1) * 127.5).round().to(torch.uint8)
    clean = torch.stack([vae.encode_clip(encoder, clip) for clip in frames])  # n t c h w
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    noisy = {f"noise {level}": clean + level * noise for level in NOISE_LEVELS}
    sources = {"clean": clean, **noisy, "images": clean[:, :1], **latents}
    for source, z in sources.items():
        known = None if source in latents else true[:, : z.shape[1]]
        for name, autoencoder in autoencoders.items():
            clips = vae.decode_clips(autoencoder, z).float().cpu()
            result[f"{source}, {name}"] = scores(clips, prompts, known)
    return result


def costs(temporal, num_frames, image_size):
    """Parameters and operations of the decoding of a clip with Stable Diffusion's autoencoder."""
    config = dataclasses.replace(vae.PRESETS["sd"], temporal=temporal, max_frames=num_frames)
    with torch.device("meta"):
        model = vae.AutoencoderKL(config)
        z = torch.empty(1, num_frames, config.latent_channels,
                        *[image_size // config.downscale] * 2)
    # Attention in its plain form is matrix products, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode_clips(model, z)
    new = sum(value.numel() for value in temporal_state(model).values())
    return {"parameters": sum(p.numel() for p in model.decoder.parameters()), "new": new,
            "TFLOP": round(counter.get_total_flops() / 1e12, 2)}


def compare(args):
    """Measure a run's own decoder and its video decoder on held-out clips of MovingShapes."""
    check_ranges(args, num_prompts=(2, 10**5), seed=(0, 2**62))
    if not (args.run / FOLDER / weights.UNET_WEIGHTS).exists():
        raise ValueError(f"{args.run}: has no trained {FOLDER}/; train it first")
    options = read_record(args.run / FOLDER, DecoderRun)[0]
    if (options.data or read_record(args.run)[0].data) != "shapes":
        raise ValueError(f"{args.run}: is of other data; only of MovingShapes is the truth known")
    model = weights.load_pipeline(args.run).to(choose_device(args.device))
    prompts, sampling = choose_prompts(args.num_prompts), model.sampling
    check_sampling(model, sampling, 1, len(prompts))
    true = real_clips(len(prompts), sampling.num_frames, sampling.image_size, args.seed, prompts)
    drawn = {"drawn": draw_latents(model, prompts, args.seed)}
    own = dataclasses.replace(model)
    weights.use_decoder(model, args.run)
    model.to(next(own.unet.parameters()).device)
    result = evaluate({"2-D": own.vae, options.temporal: model.vae}, drawn, true, prompts,
                      args.seed)
    print_table("latents, decoder", result)
    settings = {"num_prompts": args.num_prompts, "seed": args.seed}
    write_json(args.run / FOLDER / "evaluation.json", settings | result)


def parse_arguments():
    parser = argparse.ArgumentParser(description="A decoder with temporal layers.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="fine-tune a run's decoder on clips")
    command.add_argument("run", type=Path, metavar="RUN", help="a run, or a diffusers folder")
    command.add_argument("--resume", action="store_true", help="continue an unfinished training")
    add_flags(command, DecoderOptions())
    command = commands.add_parser("evaluate", help="compare it with the run's own, on MovingShapes")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--num-prompts", type=int, default=128, help="clips (default: 128)")
    command.add_argument("--seed", type=int, default=1000, help="(default: 1000)")
    command.add_argument("--device", default="auto")
    command = commands.add_parser("costs", help="of the decoder of Stable Diffusion, counted")
    command.add_argument("--num-frames", type=int, default=16, help="(default: 16)")
    command.add_argument("--image-size", type=int, default=256, help="(default: 256)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_flush_denormal(True)
    if args.command == "costs":
        check_ranges(args, num_frames=(1, 10**4), image_size=(8, 8192))
        print_table("decoder", {kind: costs(kind, args.num_frames, args.image_size)
                                for kind in VARIANTS})
    elif not (args.run / "vae" / "config.json").exists():
        raise ValueError(f"{args.run}: has no trained vae/; needs a run or a diffusers folder")
    elif args.command == "evaluate":
        compare(args)
    else:
        run = DecoderRun.open(args.run / FOLDER, given_flags(args, DecoderOptions()), args.resume)
        if run.finished:
            print(f"{run.path}: is trained; remove it to train another")
            return
        torch.manual_seed(run.options.seed)
        train(run, args.run)


if __name__ == "__main__":
    run_main(main)
