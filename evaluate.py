"""Does the model draw what the text says? For MovingShapes the answer is a number.

    python evaluate.py runs/demo --num-prompts 128
    python evaluate.py runs/demo --num-prompts 512 --fvd

`recognise` reads colour, shape and direction off the pixels of a clip by thresholds and geometry. A
network could have the same weaknesses as the model that it judges. Half of the prompts are
combinations that were held out of training. The table also has rows for real clips, for real clips
that went through the autoencoder (the best that any U-Net can reach) and for noise.

A second table needs no text (metrics.py): how steady clips are and what the autoencoder loses; with
--fvd also FVD-shapes and CLIPSIM-shapes, whose net is trained first, half a minute on two cores.
A model's distance can at best reach that of real clips. RUN/evaluation.json keeps both tables.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import check_ranges, choose_device, run_main
from files import require_room, write_json
from memory import check_sampling
from metrics import NUM_FEATURES, accuracy, evaluate_quality, load_feature_net, real_clips
from run import read_record
from sample import generate
from shapes import COLOURS, DIRECTIONS, HELD_OUT, SEEN, SHAPES, caption_of, coverage
from vae import encode_clip
from weights import load_pipeline, use_decoder

MAX_COLOUR_DISTANCE = 0.35  # in RGB of [0, 1]; the nearest two, blue and cyan, are 0.62 apart
MIN_OVERLAP = 0.75  # intersection over union with the ideal shape of the same size
MIN_TRAVEL = 0.15  # from the first frame to the last, as a part of the frame's size
AREAS = 0.03, 0.3  # smallest and largest part of a frame that is a shape


def recognise(frames):
    """(colour, shape, direction) of a clip (t, 3, h, w) in [0, 1]; None for what is not seen."""
    size, found = frames.shape[-1], segment(frames)
    if found is None:  # a blank clip
        return None, None, None
    paint, covered = found
    distances = {name: np.linalg.norm(paint - rgb) for name, rgb in COLOURS.items()}
    colour = min(distances, key=distances.get)
    colour = colour if distances[colour] < MAX_COLOUR_DISTANCE else None
    x, y, area = centres_of(covered)
    if not (area.min() >= AREAS[0] * size**2 and area.max() <= AREAS[1] * size**2):
        return colour, None, None
    return colour, recognise_shape(covered, x, y, area), recognise_direction(x, y, size)


def segment(frames):
    """(paint (3,), part of each pixel that the shape covers (t, h, w)) of a clip; None if blank.

    The background is the median of each channel; the paint is the mean of what differs most from
    it. The projection of a pixel on that colour is the part of the pixel that the shape covers.
    """
    background = np.median(frames, axis=(0, 2, 3))
    difference = frames - background[:, None, None]
    strength = np.linalg.norm(difference, axis=1)  # t h w
    # The 99th percentile is inside the shape, which covers 3 % of a frame or more.
    inside = strength > 0.7 * np.percentile(strength, 99)  # of the shape, without its soft edge
    if not inside.any():
        return None
    paint = frames.transpose(1, 0, 2, 3)[:, inside].mean(1)
    towards = paint - background
    covered = (difference * towards[:, None, None]).sum(1) / (towards @ towards)  # t h w
    return paint, np.where(covered < 0.15, 0, covered.clip(0, 1))  # less is blur and noise


def centres_of(covered):
    """Centre of mass x, y and area of each frame's coverage (t, h, w): (t,) each, in pixels."""
    axis = np.arange(covered.shape[-1]) + 0.5  # a pixel's centre
    area = covered.sum((1, 2))
    with np.errstate(invalid="ignore"):  # 0 / 0 in a frame without a shape: NaN
        return (covered.sum(1) * axis).sum(1) / area, (covered.sum(2) * axis).sum(1) / area, area


def recognise_shape(covered, x, y, area):
    """The shape that overlaps best, over all frames, with coverage (t, h, w) around (x, y)."""
    overlaps = overlaps_of(covered, x, y, area)
    shape = max(overlaps, key=overlaps.get)
    return shape if overlaps[shape] > MIN_OVERLAP else None


def overlaps_of(covered, x, y, area):
    """{shape: intersection over union with the ideal one, mean over frames}; as above."""
    axis = np.arange(covered.shape[-1]) + 0.5
    across, below = axis - x[:, None, None], axis[:, None] - y[:, None, None]
    overlaps = {}
    for shape, unit_area in SHAPES.items():
        radius = np.sqrt(area / unit_area)[:, None, None]
        # A triangle's centre of mass lies below the middle of its height, where coverage() has it.
        lift = 0.389 * radius if shape == "triangle" else 0.0
        ideal = coverage(shape, across, below + lift, radius)
        both, either = np.minimum(covered, ideal), np.maximum(covered, ideal)  # t h w
        # A frame without a shape, whose centre is NaN, overlaps with none.
        overlaps[shape] = np.nan_to_num(both.sum((1, 2)) / either.sum((1, 2))).mean()
    return overlaps


def recognise_direction(x, y, size):
    """The direction of centres x, y (t,): far enough, straight and without turning back."""
    for name, (dx, dy) in DIRECTIONS.items():
        # Swapping x and y of a direction gives the one across it.
        along, across = np.diff(dx * x + dy * y), np.diff(dy * x + dx * y)  # t - 1 steps
        straight = abs(across.sum()) < along.sum() / 2
        if along.sum() > MIN_TRAVEL * size and straight and (along > 0).mean() > 0.7:
            return name
    return None


def crispness(clip, shape):
    """Intersection over union of what a clip (t, 3, h, w) shows with the ideal shape, in [0, 1]."""
    found = segment((clip.double().numpy() + 1) / 2)
    if found is None:  # a blank clip
        return 0.0
    return overlaps_of(found[1], *centres_of(found[1]))[shape]


def agreement(clips, combinations):
    """Which of colour, shape, direction of clips (t, 3, h, w) in [-1, 1] are right: (n, 3) bool."""
    seen = [recognise((clip.double().numpy() + 1) / 2) for clip in clips]
    return np.array(seen, dtype=object) == np.array(combinations, dtype=object)


def rates(right, image=False):
    """Agreement (n, 3) as percentages. An image has no direction, and is right without one."""
    names = ("colour", "shape") if image else ("colour", "shape", "direction")
    right = right[:, : len(names)]
    columns = dict(zip(names, right.T, strict=True)) | {"all": right.all(1)}
    percent = {name: round(100 * column.mean().item(), 1) for name, column in columns.items()}
    return {"count": len(right)} | percent


def choose_prompts(num_prompts):
    """Combinations to draw: held-out ones, then as many of those seen in training."""
    held_out = num_prompts // 2
    prompts = [HELD_OUT[i % len(HELD_OUT)] for i in range(held_out)]
    # In strides of 7 through SEEN, so that few prompts, too, have all colours, shapes, directions.
    return prompts + [SEEN[7 * i % len(SEEN)] for i in range(num_prompts - held_out)]


def draw(pipeline, prompts, num_frames, seed, batch_size):
    """Clips (n, num_frames, 3, h, w) in [-1, 1] of combinations."""
    sampling = dataclasses.replace(pipeline.sampling, num_frames=num_frames)
    check_sampling(pipeline, sampling, min(batch_size, len(prompts)), kept=len(prompts))
    texts = [caption_of(*prompt) for prompt in prompts]
    return torch.stack(list(generate(pipeline, texts, sampling, seed, batch_size)))


def references(pipeline, prompts, seed):
    """{name: clips (n, t, 3, h, w)} that show what the numbers mean, of the same combinations."""
    sampling = pipeline.sampling
    real = real_clips(len(prompts), sampling.num_frames, sampling.image_size, seed, prompts)
    latents = [encode_clip(pipeline.vae, (clip + 1) * 127.5) for clip in real]  # t c h/f w/f
    coded = torch.cat([pipeline.decode(clip[None]) for clip in latents])
    # Noise has neither colour nor shape: a reader that finds some in it is too generous.
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    return {"real clips": real, "real, autoencoded": coded, "noise": noise}


def evaluate_agreement(drawn, others, prompts):
    """The first table. drawn: {"clips" or "images": clips of prompts}, others: `references`."""
    def row(clips, part=slice(None)):
        clips, asked = clips[part], prompts[part]
        overlaps = [crispness(clip, prompt[1]) for clip, prompt in zip(clips, asked, strict=True)]
        return (rates(agreement(clips, asked), image=clips.shape[1] == 1)
                | {"crispness": round(float(np.mean(overlaps)), 3)})

    result, held_out = {}, len(prompts) // 2  # choose_prompts has these first
    for kind, clips in drawn.items():
        parts = {"seen": slice(held_out, None), "held out": slice(held_out), "all": slice(None)}
        for name, part in parts.items():
            result[f"{kind}, {name}"] = row(clips, part)
    return result | {name: row(clips) for name, clips in others.items()}


def evaluate(pipeline, num_prompts, seed, batch_size, net=None):
    """All that the tables show, {"agreement": rows, "quality": rows}, rows dicts of dicts."""
    prompts, num_frames = choose_prompts(num_prompts), pipeline.sampling.num_frames
    # A run without a video stage draws images only.
    kinds = {"clips": num_frames, "images": 1} if num_frames > 1 else {"images": 1}
    drawn = {name: draw(pipeline, prompts, t, seed, batch_size) for name, t in kinds.items()}
    others = references(pipeline, prompts, seed)
    sources = {"clips, all": drawn["clips"], **others} if num_frames > 1 else others
    return {"agreement": evaluate_agreement(drawn, others, prompts),
            "quality": evaluate_quality(sources, prompts, seed, net)}


def print_table(title, rows):
    """Rows {name: {column: value}}, one a line, with a dash where a row lacks a column."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    for name, row in {title: {column: column for column in columns}, **rows}.items():
        cells = [f"{row.get(column, '-'):>{max(11, len(column) + 2)}}" for column in columns]
        print(f"{name:28}" + "".join(cells))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Measure how clips of MovingShapes agree with their text.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained model")
    parser.add_argument("--num-prompts", type=int, default=128, help="clips to draw (default: 128)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips at a time (default: 16)")
    parser.add_argument("--decoder", type=Path, metavar="FOLDER", help="decode with another "
                        "autoencoder (default: RUN/video_decoder, if there is one)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--fvd", action="store_true",
                        help="also FVD-shapes, CLIPSIM-shapes; net: RUN/feature_net.safetensors")
    parser.add_argument("--feature-net", type=Path, metavar="FILE",
                        help="the same with the net in FILE, trained and written if missing; "
                        "only numbers of one net compare")
    args = parser.parse_args()
    check_ranges(args, num_prompts=(2, 10**6), batch_size=(1, 10**6), seed=(0, 2**62))
    if args.fvd and not args.feature_net:
        args.feature_net = args.run / "feature_net.safetensors"
    if args.feature_net and args.num_prompts <= NUM_FEATURES:
        raise ValueError(f"--fvd needs --num-prompts >= {NUM_FEATURES + 1}, one more than there "
                         f"are features, got {args.num_prompts}")
    return args


def main():
    args = parse_arguments()
    if not args.run.is_dir():
        raise ValueError(f"{args.run}: no such folder; check the path")
    if not (args.run / "train.json").exists():
        raise ValueError(f"{args.run}: has no train.json; only of MovingShapes, in a run of "
                         "train.py, is the truth known (papers/ have an `evaluate` of their own)")
    data = read_record(args.run)[0].data
    if data != "shapes":
        raise ValueError(f"{args.run}: trained on {data}; only of MovingShapes (--data shapes) "
                         "is the truth known")
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    pipeline = load_pipeline(args.run)
    for path in (args.run / "evaluation.json", args.feature_net or args.run / "x"):
        require_room(path)
    notes = use_decoder(pipeline, args.run, args.decoder)
    for note in notes:
        print(note)
    pipeline.to(device)
    sampling, net = pipeline.sampling, None
    if args.feature_net:
        if sampling.num_frames < 2:
            raise ValueError(f"--fvd needs a model of clips; {args.run} has no video stage yet")
        net = load_feature_net(args.feature_net, sampling.num_frames, sampling.image_size, device,
                               lambda steps: tqdm(steps, "feature net", leave=False))
    result = evaluate(pipeline, args.num_prompts, args.seed, args.batch_size, net)
    print_table("agreement with the text, %", result["agreement"])
    print()
    print_table("quality", result["quality"])
    if net is not None:  # its accuracy shows how far to trust its numbers
        right = accuracy(net)
        result["feature_net"] = {"file": str(args.feature_net), "accuracy": right}
        print("\nheld-out clips that the feature net gets right, %:",
              ", ".join(f"{name} {value}" for name, value in right.items()))
    settings = {"num_prompts": args.num_prompts, "seed": args.seed,
                "sampling": dataclasses.asdict(sampling), "decoder": notes}
    write_json(args.run / "evaluation.json", settings | result)


if __name__ == "__main__":
    run_main(main)
