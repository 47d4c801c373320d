"""Does the model draw what the text says? For MovingShapes that is a number.

    python evaluate.py runs/demo --num-prompts 128

`recognise` reads colour, shape and direction off the pixels of a clip, with thresholds and geometry
and no network that could share a model's illusions. Half of the prompts are combinations that were
held out of training. A number is only as good as its instrument, so the table also shows the reader
on real clips, on real clips that went through the autoencoder (the best that any U-Net could do)
and on noise. It is saved as RUN/evaluation.json.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from cli import choose_device, run_main
from files import write_json
from recipe import read_record
from sample import generate
from shapes import COLOURS, DIRECTIONS, HELD_OUT, SEEN, SHAPES, MovingShapes, caption_of, coverage
from vae import decode_clips, encode_clip
from weights import load_pipeline

MAX_COLOUR_DISTANCE = 0.35  # in RGB of [0, 1]; red, the nearest neighbour of magenta, is 0.85 away
MIN_OVERLAP = 0.75  # intersection over union with the ideal shape of the same size
MIN_TRAVEL = 0.15  # from the first frame to the last, as a part of the frame's size
AREAS = 0.03, 0.3  # smallest and largest part of a frame that is a shape


def recognise(frames):
    """(colour, shape, direction) of a clip (t, 3, h, w) in [0, 1]; None for what is not to be seen.

    The background is the median of a channel; the colour is the mean of what differs most from it.
    Its projection on that colour says how much of each pixel the shape covers, in every frame.
    """
    size = frames.shape[-1]
    background = np.median(frames, axis=(0, 2, 3))
    difference = frames - background[:, None, None]
    strength = np.linalg.norm(difference, axis=1)  # t h w
    inside = strength > 0.7 * np.percentile(strength, 99)
    if not inside.any():  # a blank clip
        return None, None, None
    paint = frames.transpose(1, 0, 2, 3)[:, inside].mean(1)
    distances = {name: np.linalg.norm(paint - rgb) for name, rgb in COLOURS.items()}
    colour = min(distances, key=distances.get)
    colour = colour if distances[colour] < MAX_COLOUR_DISTANCE else None
    towards = paint - background
    covered = (difference * towards[:, None, None]).sum(1) / (towards @ towards)
    covered = np.where(covered < 0.15, 0, covered.clip(0, 1))  # below is blur and noise
    area = covered.sum((1, 2))
    if area.min() < AREAS[0] * size**2 or area.max() > AREAS[1] * size**2:
        return colour, None, None
    axis = np.arange(size) + 0.5
    x, y = (covered.sum(1) * axis).sum(1) / area, (covered.sum(2) * axis).sum(1) / area
    return colour, recognise_shape(covered, x, y, area), recognise_direction(x, y, size)


def recognise_shape(covered, x, y, area):
    """The shape that overlaps best, over all frames, with coverage (t, h, w) around (x, y)."""
    axis = np.arange(covered.shape[-1]) + 0.5
    across, below = axis - x[:, None, None], axis[:, None] - y[:, None, None]
    overlaps = {}
    for shape, unit_area in SHAPES.items():
        radius = np.sqrt(area / unit_area)[:, None, None]
        lift = 0.389 * radius if shape == "triangle" else 0.0  # its centre of mass sits low
        ideal = coverage(shape, across, below + lift, radius)
        together = np.minimum(covered, ideal).sum((1, 2)), np.maximum(covered, ideal).sum((1, 2))
        overlaps[shape] = (together[0] / together[1]).mean()
    shape = max(overlaps, key=overlaps.get)
    return shape if overlaps[shape] > MIN_OVERLAP else None


def recognise_direction(x, y, size):
    """The direction of centres x, y (t,): far enough, straight and without turning back."""
    centres = np.stack([x, y], axis=1)
    moved = centres[-1] - centres[0]
    for name, towards in DIRECTIONS.items():
        along, across = moved @ np.array(towards), abs(moved @ np.array(towards[::-1]))
        forward = np.diff(centres @ np.array(towards)) > 0
        if along > MIN_TRAVEL * size and across < along / 2 and forward.mean() > 0.7:
            return name
    return None


def agreement(clips, combinations):
    """Which of colour, shape, direction of clips (t, 3, h, w) in [-1, 1] are right: (n, 3) bool."""
    seen = [recognise((clip.double().numpy() + 1) / 2) for clip in clips]
    return np.array([
        [a == b for a, b in zip(is_, should, strict=True)]
        for is_, should in zip(seen, combinations, strict=True)
    ])  # fmt: skip


def rates(right, picture=False):
    """Agreement (n, 3) as percentages. A picture has no direction, and is right without one."""
    colour, shape, direction = (round(100 * part, 1) for part in right.mean(0).tolist())
    result = {"count": len(right), "colour": colour, "shape": shape}
    if not picture:
        result["direction"] = direction
    considered = right[:, :2] if picture else right
    return result | {"all": round(100 * considered.all(1).mean().item(), 1)}


def evaluate_reader(vae, sampling, num_clips, seed):
    """The reader's own rates: on real clips, on those through the autoencoder, and on noise."""
    data = MovingShapes(num_clips, sampling.num_frames, sampling.image_size, seed, SEEN + HELD_OUT)
    frames = [data[i][0] for i in range(num_clips)]
    real = [clip / 127.5 - 1 for clip in frames]
    device = next(vae.parameters()).device
    coded = [
        decode_clips(vae, encode_clip(vae, clip.to(device))[None])[0].float().cpu()
        for clip in frames
    ]
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(clip.shape, generator=generator).clamp(-1, 1) for clip in real]
    sources = {"real clips": real, "real, autoencoded": coded, "noise": noise}
    picture = sampling.num_frames == 1
    return {
        name: rates(agreement(clips, data.combinations), picture) for name, clips in sources.items()
    }


def evaluate(pipeline, num_prompts, seed, batch_size):
    """All that the table shows, as a dict of dicts."""
    held_out = num_prompts // 2
    prompts = [HELD_OUT[i % len(HELD_OUT)] for i in range(held_out)]
    # Strides through SEEN, so that few prompts, too, show all colours, shapes and directions.
    prompts += [SEEN[7 * i % len(SEEN)] for i in range(num_prompts - held_out)]
    texts, result = [caption_of(*combination) for combination in prompts], {}
    for kind, frames in (("clips", pipeline.sampling.num_frames), ("pictures", 1)):
        if kind == "clips" and frames == 1:  # a model that has not yet seen clips
            continue
        sampling = dataclasses.replace(pipeline.sampling, num_frames=frames)
        drawn = generate(pipeline, texts, sampling, seed, batch_size)
        right = agreement(drawn, prompts)
        picture = frames == 1
        for name, part in (
            ("seen", right[held_out:]),
            ("held out", right[:held_out]),
            ("all", right),
        ):
            if len(part):
                result[f"{kind}, {name}"] = rates(part, picture)
    return result | evaluate_reader(pipeline.vae, pipeline.sampling, num_prompts, seed)


def print_table(result):
    columns = ("count", "colour", "shape", "direction", "all")
    print(f"{'agreement with the text, %':28}" + "".join(f"{name:>11}" for name in columns))
    for name, row in result.items():
        cells = [f"{row[c]:11}" if c in row else " " * 10 + "-" for c in columns]
        print(f"{name:28}" + "".join(cells))


def main():
    parser = argparse.ArgumentParser(
        description="Measure how well clips of MovingShapes agree with their text.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained model")
    parser.add_argument("--num-prompts", type=int, default=128, help="clips to draw (default: 128)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips at a time (default: 16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args()
    if args.num_prompts < 2 or args.batch_size < 1 or args.seed < 0:
        raise ValueError("--num-prompts needs >= 2, --batch-size >= 1, --seed >= 0")
    known = (args.run / "train.json").exists()
    data = read_record(args.run)[0].data if known else "other data"
    if data != "shapes":
        raise ValueError(f"{args.run}: trained on {data}; only of MovingShapes (--data shapes) "
                         "is the truth known")  # fmt: skip
    torch.set_flush_denormal(True)
    pipeline = load_pipeline(args.run).to(choose_device(args.device))
    result = evaluate(pipeline, args.num_prompts, args.seed, args.batch_size)
    print_table(result)
    write_json(args.run / "evaluation.json", {
        "num_prompts": args.num_prompts, "seed": args.seed,
        "sampling": dataclasses.asdict(pipeline.sampling), "agreement": result,
    })  # fmt: skip


if __name__ == "__main__":
    run_main(main)
