"""Does the model draw what the text says? For MovingShapes the answer is a number.

    python evaluate.py runs/demo --num-prompts 128

`recognise` reads colour, shape and direction off the pixels of a clip by thresholds and geometry; a
network could share the weaknesses of the model that it judges. Half of the prompts are
combinations that were held out of training. The table also has rows for real clips, for real clips
that went through the autoencoder (the best that any U-Net can reach) and for noise.

A second table needs no text: how steady clips are, and how much the autoencoder loses.
RUN/evaluation.json keeps both tables.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from checkpoints.weights import load_pipeline
from sample import generate
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, HELD_OUT, SEEN, SHAPES, MovingShapes
from shapes import caption_of, coverage
from support.cli import Parser, number, print_table, run_main
from support.devices import add_drawing_flags, choose_device
from support.files import write_json
from training.options import read_record
from vae import encode_clip

MAX_COLOUR_DISTANCE = 0.35  # in RGB of [0, 1]; the nearest two, blue and cyan, are 0.62 apart
MIN_OVERLAP = 0.75  # intersection over union with the ideal shape of the same size
MIN_TRAVEL = 0.15  # from the first frame to the last, as a fraction of the frame's size
AREAS = 0.03, 0.3  # smallest and largest fraction of a frame that a shape covers


def recognise(frames):
    """(colour, shape, direction) of a clip (t, 3, h, w) in [0, 1], None where unrecognised."""
    size, found = frames.shape[-1], segment(frames)
    if found is None:  # a blank clip
        return None, None, None
    paint, covered = found
    distances = {name: np.linalg.norm(paint - rgb) for name, rgb in COLOURS.items()}
    colour = min(distances, key=distances.get)
    colour = colour if distances[colour] < MAX_COLOUR_DISTANCE else None
    x, y, area = centres_of(covered)  # t each
    if not (area.min() >= AREAS[0] * size**2 and area.max() <= AREAS[1] * size**2):
        return colour, None, None
    return colour, recognise_shape(covered, x, y, area), recognise_direction(x, y, size)


def segment(frames):
    """(paint (3,), fraction of each pixel that the shape covers (t, h, w)); None for a blank clip.

    The background is the median of each channel; the paint is the mean of the pixels that differ
    most from it. The projection of a pixel on that colour is the fraction that the shape covers.
    """
    background = np.median(frames, axis=(0, 2, 3))  # 3
    difference = frames - background[:, None, None]  # t 3 h w
    strength = np.linalg.norm(difference, axis=1)  # t h w
    # The 99th percentile is inside the shape, which covers at least 3 % of a frame; its soft edge
    # is below 0.7 of that.
    inside = strength > 0.7 * np.percentile(strength, 99)
    if not inside.any():
        return None
    paint = frames.transpose(1, 0, 2, 3)[:, inside].mean(1)
    towards = paint - background  # 3
    covered = (difference * towards[:, None, None]).sum(1) / (towards @ towards)  # t h w
    return paint, np.where(covered < 0.15, 0, covered.clip(0, 1))  # less is blur or noise


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
    """{shape: intersection over union with the ideal shape of that area, mean over frames}."""
    axis = np.arange(covered.shape[-1]) + 0.5
    across, below = axis - x[:, None, None], axis[:, None] - y[:, None, None]
    overlaps = {}
    for shape, unit_area in SHAPES.items():
        radius = np.sqrt(area / unit_area)[:, None, None]
        # A triangle's centre of mass lies below the middle of its height, which coverage() uses.
        lift = 0.389 * radius if shape == "triangle" else 0.0
        ideal = coverage(shape, across, below + lift, radius)
        both, either = np.minimum(covered, ideal), np.maximum(covered, ideal)  # t h w
        # A frame without a shape has a NaN centre and counts as no overlap.
        overlaps[shape] = np.nan_to_num(both.sum((1, 2)) / either.sum((1, 2))).mean()
    return overlaps


def recognise_direction(x, y, size):
    """The direction of centres x, y (t,) that move far, straight and steadily, otherwise None."""
    for name, (dx, dy) in DIRECTIONS.items():
        # Swapping x and y of a direction gives the perpendicular one.
        along, across = np.diff(dx * x + dy * y), np.diff(dy * x + dx * y)  # t - 1 steps
        straight = abs(across.sum()) < along.sum() / 2
        if along.sum() > MIN_TRAVEL * size and straight and (along > 0).mean() > 0.7:
            return name
    return None


def crispness(clip, shape):
    """Intersection over union of a clip (t, 3, h, w) in [-1, 1] with the ideal shape, 0 to 1."""
    found = segment((clip.double().numpy() + 1) / 2)
    if found is None:  # a blank clip
        return 0.0
    return overlaps_of(found[1], *centres_of(found[1]))[shape]


def agreement(clips, combinations):
    """Which of colour, shape, direction of clips (t, 3, h, w) in [-1, 1] are right: (n, 3) bool."""
    seen = [recognise((clip.double().numpy() + 1) / 2) for clip in clips]
    return np.array(seen, dtype=object) == np.array(combinations, dtype=object)


def rates(right, image=False):
    """{attribute: percentage} of agreement (n, 3) bool. An image has no direction."""
    names = ("colour", "shape") if image else ("colour", "shape", "direction")
    right = right[:, : len(names)]
    columns = dict(zip(names, right.T, strict=True)) | {"all": right.all(1)}
    percent = {name: round(100 * column.mean().item(), 1) for name, column in columns.items()}
    return {"count": len(right)} | percent


def choose_prompts(num_prompts):
    """Combinations to draw: held-out ones, then as many that training has seen."""
    held_out = num_prompts // 2
    prompts = [HELD_OUT[i % len(HELD_OUT)] for i in range(held_out)]
    # In strides of 7 through SEEN, so that a few prompts already have all colours and directions.
    return prompts + [SEEN[7 * i % len(SEEN)] for i in range(num_prompts - held_out)]


def draw(pipeline, prompts, num_frames, seed, batch_size):
    """Clips (n, num_frames, 3, h, w) in [-1, 1] of combinations."""
    sampling = dataclasses.replace(pipeline.sampling, num_frames=num_frames)
    texts = [caption_of(*prompt) for prompt in prompts]
    return torch.stack(list(generate(pipeline, texts, sampling, seed, batch_size)))


def real_clips(num_clips, num_frames, image_size, seed, combinations=COMBINATIONS):
    """MovingShapes as clips (n, t, 3, h, w) in [-1, 1]."""
    data = MovingShapes(num_clips, num_frames, image_size, seed, combinations)
    return torch.stack([data[i][0] for i in range(num_clips)]) / 127.5 - 1


def references(pipeline, prompts, seed):
    """{name: clips (n, t, 3, h, w)} to compare with, of the same combinations."""
    sampling = pipeline.sampling
    real = real_clips(len(prompts), sampling.num_frames, sampling.image_size, seed, prompts)
    latents = [encode_clip(pipeline.vae, (clip + 1) * 127.5) for clip in real]  # t c h/f w/f
    coded = torch.cat([pipeline.decode(clip[None]) for clip in latents])
    # Noise has neither colour nor shape; recognise() would be too generous if it found some.
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    return {"real clips": real, "real, autoencoded": coded, "noise": noise}


def evaluate_agreement(drawn, others, prompts):
    """The first table, of drawn {"clips" or "images": clips of prompts} and of references()."""
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


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (n, c, h, w) in [-1, 1]: (n,), float64."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(2**2 / error)  # 2: the largest possible difference


def consistency(clips):
    """How little successive frames of clips (b, t, c, h, w) differ: (b,), float64.

    1 - mean |f_{i+1} - f_i|^2 / (2 variance), with the variance of all pixels around the clip's
    mean colour: 1 if nothing changes, 0 if frames are independent. The value of real clips is the
    target: flicker lowers it, and a frozen clip has 1.
    """
    clips = clips.double()
    changes = clips.diff(dim=1).square().mean((1, 2, 3, 4))  # b
    variance = (clips - clips.mean((1, 3, 4), keepdim=True)).square().mean((1, 2, 3, 4))
    return 1 - changes / (2 * variance).clamp(min=1e-12)  # a blank clip: 0 / 0


def mean_over_clips(measure, *clips):
    """The mean of a measure, one clip at a time, because float64 copies of all are large."""
    return np.mean([measure(*parts).mean().item() for parts in zip(*clips, strict=True)])


def evaluate_quality(sources):
    """The second table, {name: {measure: value}} of sources {name: clips (n, t, 3, h, w)}."""
    result = {name: {} for name in sources}
    real, coded = sources["real clips"], sources["real, autoencoded"]
    if real.shape[1] > 1:
        for name, clips in sources.items():
            steady = mean_over_clips(consistency, clips[:, None])  # [:, None]: batches of one clip
            result[name]["consistency"] = round(steady, 4)
    result["real, autoencoded"]["PSNR"] = round(mean_over_clips(psnr, real, coded), 2)
    return result


def evaluate(pipeline, num_prompts, seed, batch_size):
    """Both tables, {"agreement": rows, "quality": rows}, rows dicts of dicts."""
    prompts, num_frames = choose_prompts(num_prompts), pipeline.sampling.num_frames
    # A run without a video stage draws images only.
    kinds = {"clips": num_frames, "images": 1} if num_frames > 1 else {"images": 1}
    drawn = {name: draw(pipeline, prompts, t, seed, batch_size) for name, t in kinds.items()}
    others = references(pipeline, prompts, seed)
    sources = {"clips, all": drawn["clips"], **others} if num_frames > 1 else others
    return {"agreement": evaluate_agreement(drawn, others, prompts),
            "quality": evaluate_quality(sources)}


def main(arguments=None):
    parser = Parser(description="Measure how clips of MovingShapes agree with their text.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained model")
    parser.add_argument("--num-prompts", type=number(int, 2), default=128,
                        help="clips to draw (default: 128)")
    add_drawing_flags(parser, seed=1000, batch_size=16)
    args = parser.parse_args(arguments)
    if not (args.run / "train.json").exists() or read_record(args.run)[0].data != "shapes":
        raise ValueError(f"{args.run}: needs a run of train.py on MovingShapes (--data shapes), "
                         "because only its clips' truth is known")
    torch.set_flush_denormal(True)
    pipeline = load_pipeline(args.run).to(choose_device(args.device), args.precision)
    result = evaluate(pipeline, args.num_prompts, args.seed, args.batch_size)
    print_table("agreement with the text, %", result["agreement"])
    print()
    print_table("quality", result["quality"])
    settings = {"num_prompts": args.num_prompts, "seed": args.seed,
                "sampling": dataclasses.asdict(pipeline.sampling)}
    write_json(args.run / "evaluation.json", settings | result)
    print(args.run / "evaluation.json")


if __name__ == "__main__":
    run_main(main)
