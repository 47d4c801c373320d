"""Long video from a model that knows some frames.

A video U-Net draws a few frames. Here it learns to continue them: the last frames of a window are
the known frames of the next one, without end. It also learns to draw frames between key frames.

    python -m papers.long_video train runs/long --init runs/demo
    python -m papers.long_video sample runs/long "a red circle moving left" --num-frames 1000
    python -m papers.long_video sample runs/long "a red circle moving left" --first-frame image.png
    python -m papers.long_video sample runs/long "a red circle" --continue clip.gif
    python -m papers.long_video sample runs/long "a red circle moving left" --key-frames 8
    python -m papers.long_video interpolate runs/long clip.gif --frames-between 3
    python -m papers.long_video evaluate runs/long

--key-frames 8 draws every 4th frame first, in such a chain, then the frames between, which is
LVDM's hierarchical generation (He et al. 2022, section 3.3) with one model for both. --key-frames
16 --num-frames 57 draws all key frames at once, as MagicVideo does (Zhou et al. 2022).

Windows are written as they are drawn, so memory does not grow with the clip.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.tokenizers import describe_cuts
from media.read import read_clip
from media.write import enlarge, require_writer, write_parts
from papers.bouncing import SHORTEST, plain_caption
from papers.chains import BETWEEN, Chain, interpolate, long_latents
from papers.known_frames import Guidance, load_model
from papers.scores import evaluate
from papers.train_known_frames import LongOptions, train
from support.cli import Parser, add_flags, given_flags, number, run_main, stop_signals
from support.devices import choose_device
from support.files import write_json
from training.options import merge_options, read_record
from training.run import Run
from vae import encode_clip


def encode_frames(model, path):
    """Latents (1, t, c, h, w) of an image or a clip, from the largest square in its middle."""
    frames, _ = read_clip(path, image_size=model.sampling.image_size)
    return encode_clip(model.vae, torch.from_numpy(frames).movedim(-1, 1))[None]  # t h w 3


def encode_prompt(model, prompt):
    """The context (1, n, d) of a prompt; prints the words that the model does not see."""
    for note in describe_cuts(model.tokenizer, [prompt], "prompts"):
        print(note, file=sys.stderr)
    return model.encode_text([prompt])


def open_model(args):
    """(Pipeline, LongOptions, Chain) of a run and the flags."""
    options, _ = read_record(args.run, LongOptions)
    model = load_model(args.run).to(choose_device(args.device))
    how = Guidance(args.num_steps, args.perturbation, known_scale=args.guidance)
    return model, options, Chain(options.num_frames, options.num_known,
                                 model.sampling.frames_per_second, how)


def write_stream(model, output, stream, total, frame_rate):
    """Decode and write `total` frames of windows of latents (1, n, c, h, w), as they are drawn.

    Ctrl-C ends the clip after the window that is being drawn.
    """
    def decoded(remaining):
        for latents in stream:
            latents = latents[:, :remaining]
            remaining -= latents.shape[1]
            bar.update(latents.shape[1])
            yield enlarge(model.decode(latents)[0])
            if received or not remaining:
                return

    with stop_signals() as received, tqdm(total=total, unit="frame", leave=False) as bar:
        write_parts(output, decoded(total), frame_rate)
    print(output)


def sample(args):
    """Draw one long clip."""
    require_writer(args.output)  # fail before the work, not after it
    model, options, chain = open_model(args)
    chain = dataclasses.replace(chain, key_frames=args.key_frames,
                                frame_rate=args.frame_rate or chain.frame_rate)
    # The direction in a caption of MovingShapes is wrong after the first bounce.
    later = plain_caption(args.prompt) if options.data == "shapes" else args.prompt
    contexts = encode_prompt(model, args.prompt), model.encode_text([later])
    first = clip = None
    if args.first_frame:
        first = encode_frames(model, args.first_frame)[:, 0]
    if args.continue_clip:
        clip = encode_frames(model, args.continue_clip)
        if not chain.num_known <= clip.shape[1] < args.num_frames:
            raise ValueError(f"--continue {args.continue_clip}: needs {chain.num_known} frames or "
                             f"more, below --num-frames {args.num_frames}, got {clip.shape[1]}")
    stream = long_latents(model, contexts, chain, [args.seed], first, clip)
    write_stream(model, args.output, stream, args.num_frames, chain.frame_rate)


def interpolate_clip(args):
    """Draw frames between the frames of a clip."""
    require_writer(args.output)
    model = load_model(args.run).to(choose_device(args.device))
    keys = encode_frames(model, args.clip)
    chain = Chain(frame_rate=args.frame_rate or model.sampling.frames_per_second)
    stream = interpolate(model, encode_prompt(model, args.prompt), chain, [args.seed], keys,
                         args.frames_between)
    total = (keys.shape[1] - 1) * (args.frames_between + 1) + 1
    write_stream(model, args.output, stream, total, chain.frame_rate)


def evaluate_run(args):
    """Measure a run on BouncingShapes."""
    model, options, chain = open_model(args)
    if options.data != "shapes":
        raise ValueError(f"{args.run}: needs a run on BouncingShapes (--data shapes)")
    result = evaluate(model, chain, args.num_clips, args.num_frames, args.seed)
    for name, value in result.items():
        print(f"{name:40}{value:10.3f}")
    settings = {"num_clips": args.num_clips, "num_frames": args.num_frames, "seed": args.seed}
    settings["chain"] = dataclasses.asdict(chain)
    write_json(args.run / "long_evaluation.json", settings | result)


def train_run(args):
    """Train a run, or continue its training."""
    options, finished = merge_options(args.run, given_flags(args, LongOptions()), LongOptions)
    if "long" in finished:
        print(f"{args.run}: all stages are finished")
        return
    train(Run(args.run, options, finished, args.resume))


def add_drawing_flags(commands):
    """Add the commands that draw and measure, and their flags."""
    draw = commands.add_parser("sample", help="draw a long clip")
    between = commands.add_parser("interpolate", help="draw frames between the frames of a clip")
    measure = commands.add_parser("evaluate", help="measure a run on BouncingShapes")
    for command, seed in ((draw, 0), (between, 0), (measure, 1000)):
        command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
        command.add_argument("--seed", type=number(int, 0, 2**40), default=seed,
                             help=f"seed of the noise (default: {seed})")
        command.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    for command, low in ((draw, 1), (measure, SHORTEST)):
        command.add_argument("--num-frames", type=number(int, low), default=1000,
                             help="frames of a clip (default: 1000)")
        command.add_argument("--perturbation", type=number(int, 0, 999), default=0,
                             help="noise level of known frames, a timestep (default: 0)")
        command.add_argument("--guidance", type=number(float, 0, 100), default=0.0,
                             help="LVDM's w: exaggerate the effect of known frames (default: 0)")
        command.add_argument("--num-steps", type=number(int, 1, 1000), default=1,
                             help="denoising steps of a window with known frames (default: 1)")
    for command, output in ((draw, "long.gif"), (between, "interpolated.gif")):
        command.add_argument("--frame-rate", type=number(float, 0.1, 50),
                             help="frames per second of the clip drawn (default: the run's)")
        command.add_argument("--output", type=Path, default=Path(output),
                             help=f"file to write (default: {output})")
    draw.add_argument("prompt", metavar="PROMPT", help="what to draw")
    start = draw.add_mutually_exclusive_group()
    start.add_argument("--first-frame", type=Path, metavar="IMAGE", help="the first frame")
    start.add_argument("--continue", type=Path, dest="continue_clip", metavar="CLIP",
                       help="the first frames; --num-frames counts them")
    start.add_argument("--key-frames", type=number(int, 0), default=0, metavar="N",
                       help="draw N key frames at once, more of them in a chain if needed, then "
                            f"{BETWEEN} frames between any two (default: 0, frame after frame)")
    between.add_argument("clip", type=Path, metavar="CLIP", help="the clip")
    between.add_argument("--prompt", default="", help="what the clip shows (default: no text)")
    between.add_argument("--frames-between", type=number(int, 1, 100), default=BETWEEN,
                         help=f"new frames between any two (default: {BETWEEN})")
    measure.add_argument("--num-clips", type=number(int, 2), default=32,
                         help="long clips to draw (default: 32)")


def main():
    parser = Parser(description="Long video: train, sample, interpolate, evaluate.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a model for known frames")
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    command.add_argument("--resume", action="store_true", help="continue an unfinished training")
    add_flags(command, LongOptions())
    add_drawing_flags(commands)
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # numbers near 0 would make a CPU many times slower
    functions = {"train": train_run, "sample": sample, "interpolate": interpolate_clip,
                 "evaluate": evaluate_run}
    functions[args.command](args)


if __name__ == "__main__":
    run_main(main)
