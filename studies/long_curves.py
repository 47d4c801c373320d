"""How long a clip stays right: colour and shape, size, speed and turns against the frame.

    python -m studies.long_curves runs/long --num-clips 32 --output docs/long_curves.png

For each 50 frames of long clips drawn from text: the mean over clips and its 95 % interval. In
every panel 1 is the truth.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from cli import check_ranges, choose_device, run_main
from evaluate import choose_prompts
from files import atomic, require_room
from memory import check_sampling
from papers.bouncing import SHORTEST, laws
from papers.chains import Chain
from papers.known_frames import load_model
from papers.scores import long_clips
from papers.train_known_frames import LongRun
from run import read_record
from studies.curves import COLOURS, Figure
from studies.report import interval

PANELS = {
    "right": "colour and shape right, part of 8-frame chunks",
    "size": "size over that of the first frames",
    "speed": "speed over that of the first frames", "turns": "turns so far, over the true number",
}
WINDOW = 50


def curves(model, chain, num_clips, num_frames, seed, plain):
    """{panel: [(frame, mean, low, high), ...]} of long clips; NaN with fewer than 3 shapes."""
    prompts = choose_prompts(num_clips)
    clips, _ = long_clips(model, chain, prompts, seed, num_frames, plain=plain)
    found = [laws(clip, prompt, window=WINDOW) for clip, prompt in zip(clips, prompts, strict=True)]
    return {
        name: [(WINDOW * (i + 1), *interval_of_seen(values))
               for i, values in enumerate(np.array([result[name] for result in found]).T)]
        for name in PANELS
    }


def interval_of_seen(values):
    """interval() of the clips that have a number, which are those whose shape is there."""
    seen = values[np.isfinite(values)].tolist()
    return interval(seen) if len(seen) > 2 else 3 * (np.nan,)


def draw_panels(path, panels):
    """Write a PNG with one panel a measure."""
    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
    for axes, (name, points), colour in zip(
        figure.subplots(2, 2).flat, panels.items(), COLOURS, strict=False
    ):
        x, y, low, high = zip(*points, strict=True)
        axes.axhline(1, color="gray", linewidth=1, linestyle=":")
        axes.plot(x, y, color=colour)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=PANELS[name], xlabel="frame")
        axes.grid(alpha=0.3)
    with atomic(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description="Measures of long clips against the frame.",
                                     allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run of papers.long_video")
    parser.add_argument("--num-clips", type=int, default=32, help="(default: 32)")
    parser.add_argument("--num-frames", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seed", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--output", type=Path, default=Path("long_curves.png"))
    args = parser.parse_args()
    check_ranges(args, num_clips=(3, 10**5), num_frames=(SHORTEST, 2_000_000), seed=(0, 2**40))
    require_room(args.output)
    torch.set_flush_denormal(True)
    model = load_model(args.run).to(choose_device("auto"))
    check_sampling(model, dataclasses.replace(model.sampling, num_frames=args.num_frames),
                   0, args.num_clips)
    options, _ = read_record(args.run, LongRun)
    chain = Chain(options.num_frames, options.num_known, model.sampling.frames_per_second)
    draw_panels(args.output, curves(model, chain, args.num_clips, args.num_frames, args.seed,
                                    options.plain_captions))
    print(args.output)


if __name__ == "__main__":
    run_main(main)
