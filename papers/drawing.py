"""The commands train, sample and evaluate of video_autoencoder.py and video_decoder.py."""

import dataclasses
from pathlib import Path

import torch

from media.write import require_writer, write_samples
from pipeline import Sampling
from sample import generate
from support.cli import add_flags, given_flags, number
from support.devices import add_drawing_flags, choose_device


def add_commands(parser, options):
    """Add the commands to a parser and return their parsers; `train` gets a flag per option."""
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or continue a training")
    draw = commands.add_parser("sample", help="draw clips")
    measure = commands.add_parser("evaluate", help="measure a run of MovingShapes")
    for command in (train, draw, measure):
        command.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    train.add_argument("--resume", action="store_true", help="continue an unfinished training")
    add_flags(train, options)
    draw.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    draw.add_argument("--output", type=Path, default=Path("samples.gif"),
                      help="the file that shows all clips (default: samples.gif)")
    add_flags(draw, Sampling(), show_defaults=False)
    measure.add_argument("--num-prompts", type=number(int, 2), default=128,
                         help="clips to draw (default: 128)")
    for command, seed in ((draw, 0), (measure, 1000)):
        add_drawing_flags(command, seed, batch_size=16)
    return train, draw, measure


def run_command(parser, train, evaluate, load_model):
    """Parse the command line and run its command; load_model(run) is the Pipeline to draw with."""
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # numbers near 0 would make a CPU many times slower
    commands = {"train": train, "evaluate": evaluate,
                "sample": lambda args: sample(load_model(args.run), args)}
    commands[args.command](args)


def sample(model, args):
    """Draw a clip for each prompt with a Pipeline, and write all of them as one file."""
    sampling = dataclasses.replace(model.sampling, **given_flags(args, Sampling()))
    require_writer(args.output)  # fail before the work, not after it
    most = getattr(model.vae, "most_frames", None)
    if most is not None and sampling.num_frames > most:
        raise ValueError(f"--num-frames {sampling.num_frames}: the decoder has parameters for "
                         f"{most} frames; lower it")
    model.to(choose_device(args.device), args.precision)
    clips = generate(model, args.prompts, sampling, args.seed, args.batch_size)
    for path in write_samples(clips, args.prompts, args.output, args.output.suffix,
                              sampling.frames_per_second):
        print(path)
