"""The report of a comparison (compare.py): tables, curves and a sheet of clips."""

import math
import statistics
from functools import partial

from PIL import Image, ImageDraw

from files import atomic, write_json, write_text
from media.write import contact_sheet, enlarge, to_uint8
from studies.bench import ratio, table
from studies.costs import KINDS
from studies.curves import plot

LABEL, HEADING = 90, 26  # pixels of the sheet that names at the left, prompts above a block take
FONT_SIZE = 15
ZOOM = 2
# 97.5 % quantiles of Student's t with 2 to 20 degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, table 1.3.6.7.2.
T_QUANTILES = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
    2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)


def interval(values):
    """(mean, low, high) of one value per seed: Student's 95 % interval of the mean.

    It assumes that values scatter like a Gaussian. Equal values (three times 100 %) give width 0,
    which is not certainty. Beyond 21 values it is slightly too wide.
    """
    if len(values) < 3:
        raise ValueError(f"interval needs values of >= 3 seeds, got {len(values)}")
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    quantile = T_QUANTILES[min(len(values) - 3, len(T_QUANTILES) - 1)]
    half = quantile * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def cell(values, digits=1):
    """The mean of one value per seed; from three seeds on ± half its 95 % interval."""
    if len(values) < 3:
        return f"{statistics.mean(values):.{digits}f}"
    mean, low, _ = interval(values)
    return f"{mean:.{digits}f} ± {mean - low:.{digits}f}"


def cost_table(costs, names):
    """Parameters, operations, time relative to the first variant, and memory."""
    first = names[0]
    columns = ["variant", "parameters", "new", "GFLOPs a clip"]
    columns += [f"{kind} over {first}" for kind in KINDS] + ["training step, s", "peak GiB"]
    rows = []
    for name in names:
        cost = costs[name]
        seconds = {kind: {n: costs[n][kind] for n in names} for kind in KINDS}
        rows.append([
            name, f"{cost['parameters']:,}", f"{cost['new']:,}", f"{cost['gflops']:.3f}",
            *(ratio(seconds[kind], name, first) for kind in KINDS),
            f"{statistics.median(cost['training step']):.3f}", f"{cost['gib']:.2f}",
        ])
    return table(columns, *rows)


def agreement_table(results):
    """Percentages of clips that are right, on seen and on held-out combinations."""
    kinds, parts = ("seen", "held out"), ("colour", "shape", "direction", "all")
    rows = [
        [name, kind, *(cell([r["scores"][f"clips, {kind}"][part] for r in runs]) for part in parts)]
        for name, runs in results.items() for kind in kinds
    ]
    return table(["variant", "combinations", *parts], *rows)


def curve_table(results):
    """Percentages of clips that are right in all, after so many steps."""
    steps = set.intersection(*(set(run["curve"]) for runs in results.values() for run in runs))
    steps = sorted(steps, key=int)
    rows = [[name, *(cell([run["curve"][step]["all"] for run in runs]) for step in steps)]
            for name, runs in results.items()]
    return table(["variant", *(f"{step} steps" for step in steps)], *rows)


def quality_table(results, references):
    """Images right, how steady clips are, and how far from real ones."""
    rows = [
        [name, cell([r["scores"]["images, all"]["all"] for r in runs]),
         *(cell([r["scores"][key] for r in runs], 3) for key in ("consistency", "FVD-shapes"))]
        for name, runs in results.items()
    ]
    rows += [[name, *(f"{x:.3g}" if x is not None else "-" for x in row)]
             for name, row in references.items()]
    return table(["variant", "images right, %", "consistency", "FVD-shapes"], *rows)


def curves(results, seconds=None):
    """{variant: points} of agreement after so many steps, or seconds if {variant: of a step}."""
    series = {}
    for name, runs in results.items():
        unit = 1 if seconds is None else seconds[name]
        steps = set.intersection(*(set(run["curve"]) for run in runs))
        series[name] = []
        for step in sorted(steps, key=int):
            values = [run["curve"][step]["all"] for run in runs]
            mean, low, high = interval(values) if len(values) > 2 else 3 * [statistics.mean(values)]
            series[name].append((int(step) * unit, mean, max(0.0, low), min(100.0, high)))
    return series


def write_sheet(path, prompts, clips):
    """An image of clips {variant: (n, t, 3, h, w)}: a block for each prompt, a row for each.

    Frames are numbered at the top.
    """
    sheets = [contact_sheet([drawn[i] for drawn in clips.values()]) for i in range(len(prompts))]
    blocks = [Image.fromarray(to_uint8(enlarge(sheet, ZOOM))[0]) for sheet in sheets]
    width, height = blocks[0].size
    image = Image.new("RGB", (LABEL + width, HEADING + len(blocks) * (height + HEADING)), "white")
    draw = ImageDraw.Draw(image)
    write = partial(draw.text, fill="black", font_size=FONT_SIZE)
    frames = len(next(iter(clips.values()))[0])
    write((6, HEADING / 2), "frame", anchor="lm")
    for frame in range(frames):
        write((LABEL + (frame + 0.5) * width / frames, HEADING / 2), str(frame + 1), anchor="mm")
    for i, (prompt, block) in enumerate(zip(prompts, blocks, strict=True)):
        top = i * (height + HEADING) + 2 * HEADING
        image.paste(block, (LABEL, top))
        write((LABEL, top - HEADING / 2), prompt, anchor="lm")
        for row, name in enumerate(clips):
            write((6, top + (row + 0.5) * height / len(clips)), name, anchor="lm")
    with atomic(path) as file:
        image.save(file, "PNG")


def write_report(output, title, costs, results, references):
    """Write report.md, report.json, steps.png and seconds.png; returns the first's text."""
    names = list(results)
    seconds = {name: statistics.median(costs[name]["training step"]) for name in names}
    text = "\n\n".join([
        title, cost_table(costs, names),
        "Agreement with the text, %; where there is an interval, it is that of the mean over seeds"
        " (95 %, Student).",
        agreement_table(results), curve_table(results), quality_table(results, references),
    ])
    write_text(output / "report.md", text + "\n")
    write_json(output / "report.json", {
        "costs": {name: costs[name] for name in names}, "results": results,
        "references": references,
    })
    what = "clips whose colour, shape and direction are right, %"
    plot(output / "steps.png", curves(results), "Agreement against steps", "training steps", what)
    plot(output / "seconds.png", curves(results, seconds), "Agreement against time",
         "seconds of training: steps times the median of one", what)
    return text
