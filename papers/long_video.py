"""Long video from a model that knows some frames: LVDM, He et al. 2022, section 3.3.

A video U-Net draws a few frames. Here it learns to continue them: the last frames of one window are
the known frames of the next, without end. Or it draws every 4th frame first, in such a chain
(prediction), and then what lies between (interpolation): LVDM's hierarchical generation, with one
model for both.

    python -m papers.long_video train runs/long --init runs/demo
    python -m papers.long_video sample runs/long "a red circle moving left" --num-frames 1000
    python -m papers.long_video evaluate runs/long

What goes wrong in a chain is drift: each window is drawn from what the model itself drew, and small
errors add up. LVDM's remedy is conditional latent perturbation: known frames get noise of a level s
that the model is told, so it does not trust them to the last digit.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import add_flags, check_ranges, choose_device, given_flags, run_main
from files import atomic, full_disk, open_regular, require_room, write_json
from media.read import read_clip
from media.write import require_writer, write_parts
from memory import check_sampling
from papers.bouncing import SHORTEST, plain_caption
from papers.chains import BETWEEN, Chain, long_latents
from papers.known_frames import Guidance, load_model
from papers.scores import evaluate
from papers.train_known_frames import LongOptions, LongRun, train
from run import read_record
from trainer import Stopped, stop_signals
from vae import encode_clip


def given_frames(args, model, chain):
    """Latents (1, c, h, w) of --first-frame, (1, t, c, h, w) of --continue; None without a flag."""
    first, clip, size = None, None, model.sampling.image_size
    if args.first_frame:
        frames, _ = read_clip(args.first_frame, max_frames=1, image_size=size)
        first = encode_frames(model, frames)
    if args.continue_clip:
        frames, _ = read_clip(args.continue_clip, image_size=size)
        needed = 1 + (chain.num_known - 1) * (BETWEEN + 1 if args.hierarchical else 1)
        if len(frames) < needed:
            raise ValueError(f"--continue {args.continue_clip}: needs {needed} frames, got "
                             f"{len(frames)}")
        if len(frames) >= args.num_frames:
            raise ValueError(f"--num-frames needs more than the clip's {len(frames)}, got "
                             f"{args.num_frames}")
        clip = encode_frames(model, frames)[None]
    return first, clip


def encode_frames(model, frames):
    """Latents (t, c, h, w) of frames uint8 (t, h, w, 3), an array."""
    return encode_clip(model.vae, torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous())


class LatentsFile:
    """The latents that a long sampling has drawn, kept until its clip is finished.

    The first line says what is drawn, then come frames as float32: `first` of them, and then `each`
    again and again. A stopped sampling goes on after the last whole window.
    """

    def __init__(self, path, what, shape, first, each, resume):
        self.path, self.shape, line = path, shape, (json.dumps(what) + "\n").encode()
        self.first, self.each, self.count = first, each, 0
        self.start, self.frame_bytes = len(line), 4 * math.prod(shape)
        if not path.exists():
            with atomic(path) as file:
                file.write(line)
            return
        if not resume:
            raise ValueError(f"{path}: is of an unfinished sampling; add --resume to continue it, "
                             "or remove it to start anew")
        with open_regular(path) as file:
            if file.readline(len(line)) != line:
                raise ValueError(f"{path}: is of another sampling; ask for the same, or remove it")
        count = (path.stat().st_size - self.start) // self.frame_bytes
        self.count = first + (count - first) // each * each if count >= first else 0
        os.truncate(path, self.start + self.count * self.frame_bytes)  # a window cut short

    def read(self, begin, end):
        """Latents (end - begin, c, h, w)."""
        offset, count = self.start + begin * self.frame_bytes, (end - begin) * math.prod(self.shape)
        data = np.fromfile(self.path, np.float32, count, offset=offset)
        return torch.from_numpy(data).view(end - begin, *self.shape)

    def windows(self):
        """Yield the windows as they were drawn: what is decoded together looks the same again."""
        ends = range(self.first, self.count + 1, self.each) if self.count else ()
        for begin, end in itertools.pairwise([0, *ends] if self.first else ends):
            yield self.read(begin, end)

    def append(self, latents):
        """Add the frames of a window (n, c, h, w)."""
        with full_disk(self.path, self.path), open(self.path, "ab") as file:
            file.write(latents.float().cpu().contiguous().numpy().tobytes())
        self.count += len(latents)


def open_model(args):
    """(Pipeline, Chain) of a run and the flags."""
    check_ranges(args, num_frames=(1, 2_000_000), num_steps=(1, 1000), seed=(0, 2**40),
                 perturbation=(0, 999), guidance=(0, 100), num_clips=(2, 10**5))
    model, options = load_model(args.run), read_record(args.run, LongRun)[0]
    how = Guidance(args.num_steps, args.perturbation, known=args.guidance)
    chain = Chain(options.num_frames, options.num_known, model.sampling.frames_per_second, how)
    return model.to(choose_device(args.device)), chain


def open_latents(args, model, chain, later, from_clip):
    """The LatentsFile of a sampling, new or with what an earlier call has drawn."""
    size = model.sampling.image_size // model.vae.config.downscale
    shape = model.unet.config.out_channels, size, size
    first, each = chain.num_frames, chain.num_frames - chain.num_known
    if args.hierarchical:
        first, each = 1, 2 * (BETWEEN + 1)
    files = [args.run / "unet" / "config.json", args.first_frame, args.continue_clip]
    what = {"prompt": args.prompt, "later": later, "seed": args.seed, "how": str(chain),
            "hierarchical": args.hierarchical,
            "files": [(str(path), path.stat().st_mtime_ns) for path in files if path]}
    require_writer(args.output)
    path = args.output.with_name(args.output.name + ".latents")
    there = path.stat().st_size if path.exists() else 0
    frame_bytes = 4 * math.prod(shape) + model.sampling.image_size**2  # latents; a GIF at most
    require_room(args.output, args.num_frames * frame_bytes - there,
                 "make room or ask for fewer --num-frames")
    return LatentsFile(path, what, shape, 0 if from_clip else first, each, args.resume)


def drawn_windows(file, stream, total, received):
    """Yield latents (1, n, c, h, w) of all frames: those of the file, then the stream's."""
    shown = 0
    for latents in file.windows():
        if received or shown >= total:
            return
        yield latents[None, : total - shown]
        shown += len(latents)
    while file.count < total and not received:
        latents, room = next(stream), total - file.count
        file.append(latents[0])
        yield latents[:, :room]


def sample(args):
    """Draw one long clip and write it, window by window."""
    model, chain = open_model(args)
    first, clip = given_frames(args, model, chain)
    later, options = args.later_prompt, read_record(args.run, LongRun)[0]
    if later is None:  # a caption of MovingShapes is wrong after the first bounce
        plain = options.data == "shapes" and options.plain_captions
        later = plain_caption(args.prompt) if plain else args.prompt
    contexts = model.encode_text([args.prompt]), model.encode_text([later])
    total = args.num_frames - (0 if clip is None else clip.shape[1])
    file = open_latents(args, model, chain, later, clip is not None)
    tail = max(0, file.count - chain.num_frames)  # only the last frames matter
    done = file.read(tail, file.count)[None].to(contexts[0].device)
    stream = long_latents(model, contexts, chain, [args.seed], file.shape[-1], args.hierarchical,
                          first, clip, done, file.count)

    shown = 0

    def decoded(received, bar):
        nonlocal shown
        if clip is not None:
            yield model.decode(clip)[0]
        for latents in drawn_windows(file, stream, total, received):
            shown += latents.shape[1]
            bar.update(latents.shape[1])
            yield model.decode(latents.to(contexts[0].device))[0]

    with stop_signals() as received, tqdm(total=total, desc="sample", unit="frame",
                                          leave=False) as bar:
        write_parts(args.output, decoded(received, bar), chain.frame_rate)
    print(args.output)
    if shown < total:
        raise Stopped(f"stopped after {shown} of {total} frames, which are written; continue with "
                      "--resume")
    file.path.unlink()


def add_chain_flags(command):
    """The flags that say how long clips are drawn."""
    command.add_argument("--num-frames", type=int, default=1000, help="(default: 1000)")
    command.add_argument("--hierarchical", action="store_true",
                         help="every 4th frame first, then those between")
    command.add_argument("--perturbation", type=int, default=0,
                         help="noise level s of known frames (default: 0)")
    command.add_argument("--guidance", type=float, default=0.0,
                         help="LVDM's w, away from what is drawn without known frames (default: 0)")
    command.add_argument("--num-steps", type=int, default=1,
                         help="denoising steps of a window with known frames (default: 1)")
    command.add_argument("--device", default="auto")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Long video: train, sample, evaluate.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a model for known frames")
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the new run")
    command.add_argument("--resume", action="store_true", help="continue an unfinished training")
    add_flags(command, LongOptions())
    command = commands.add_parser("sample", help="draw a long clip")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("prompt", metavar="PROMPT")
    known = command.add_mutually_exclusive_group()
    known.add_argument("--first-frame", type=Path, help="an image, of which a square is cropped")
    known.add_argument("--continue", type=Path, dest="continue_clip", metavar="CLIP",
                       help="a clip to continue, of which squares are cropped")
    command.add_argument("--later-prompt", help="of the windows after the first (default: the "
                         "prompt; for MovingShapes without its direction)")
    add_chain_flags(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", type=Path, default=Path("long.gif"),
                         help="(default: long.gif)")
    command.add_argument("--resume", action="store_true", help="continue a stopped sampling")
    command = commands.add_parser("evaluate", help="measure it on BouncingShapes")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--num-clips", type=int, default=32, help="long clips (default: 32)")
    command.add_argument("--seed", type=int, default=1000)
    add_chain_flags(command)
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_flush_denormal(True)
    if args.command == "train":
        run = LongRun.open(args.run, given_flags(args, LongOptions()), args.resume)
        if "long" in run.finished:
            print(f"{args.run}: is trained")
            return
        torch.manual_seed(run.options.seed)
        train(run)
    elif args.command == "sample":
        sample(args)
    else:
        options = read_record(args.run, LongRun)[0]
        if options.data != "shapes":
            raise ValueError(f"{args.run}: trained on {options.data}; only of BouncingShapes "
                             "(--data shapes) is the truth known")
        if args.num_frames < SHORTEST:
            raise ValueError(f"evaluate needs --num-frames >= {SHORTEST}, got {args.num_frames}")
        require_room(args.run / "long_evaluation.json")
        model, chain = open_model(args)
        check_sampling(model, dataclasses.replace(model.sampling, num_frames=args.num_frames),
                       0, args.num_clips)
        result = evaluate(model, chain, args.num_clips, args.num_frames, args.seed,
                          args.hierarchical, options.plain_captions)
        for name, value in result.items():
            print(f"{name:40}{value:10.3f}")
        settings = {name: getattr(args, name) for name in (
            "num_clips", "num_frames", "seed", "hierarchical")}
        settings["chain"] = dataclasses.asdict(chain)
        write_json(args.run / "long_evaluation.json", settings | result)


if __name__ == "__main__":
    run_main(main)
