"""A run as one page, RUN/index.html: it opens from disk, without network and without scripts.

    python -m studies.page runs/demo

Samples beside what evaluate.py's reader sees in them, scores, losses, previews and options.
Prompts and file names may hold any text: elements.py escapes it. page.html has frame and style.
"""

import argparse
import contextlib
import dataclasses
import html
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from string import Template

from cli import run_main
from evaluate import recognise
from files import read_bytes, read_json, write_text
from media.read import read_clip
from options import RECIPES, STAGES
from run import read_record
from shapes import COLOURS, DIRECTIONS, HELD_OUT, SHAPES
from studies.elements import chart, element, gallery, missing, percentage, table, write

PARTS = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
MAX_CLIPS, MAX_PREVIEWS = 36, 8


def judge(path, asked):
    """[(what the reader sees, whether it is right)] of the parts that a clip's prompt names."""
    frames = read_clip(path)[0].transpose(0, 3, 1, 2) / 255  # t h w 3 -> t 3 h w
    if frames.shape[2] != frames.shape[3]:
        raise ValueError("the reader needs square frames, one after the other")
    parts = zip(PARTS, asked, recognise(frames), strict=True)
    return [(saw or f"no {part}", saw == want) for part, want, saw in parts
            if want and (part != "direction" or len(frames) > 1)]  # an image has no direction


def samples(path, options):
    """The clips of RUN/samples with their prompts, and what the reader sees in them."""
    results = []

    def caption(file):
        prompt = file.stem.replace("-", " ")  # sample.py names a file after its prompt
        words = prompt.split()
        asked = tuple(next((w for w in words if w in known), None) for known in PARTS.values())
        if options.data != "shapes" or not any(asked):
            return [prompt]
        held_out = [element("span", "held out", class_="badge")] if asked in HELD_OUT else []
        try:
            seen = judge(file, asked)
        except (ValueError, OSError) as error:
            reason = element("small", f"not judged: {error}".replace(f"{file}: ", ""))
            return [prompt, reason, *held_out]
        results.append(all(right for _, right in seen))
        marks = [element("span", f"✓ {text}" if right else f"✗ {text}",
                         class_="right" if right else "wrong") for text, right in seen]
        return [prompt, element("div", *marks, class_="marks"), *held_out]

    clips = gallery(path / "samples", caption, "clips", MAX_CLIPS)
    if not clips:
        command = "python", "sample.py", str(path), "--prompts-file", "prompts.txt"
        return [missing("There are no samples yet; draw some with", *command)]
    line = f"{sum(results)} of {len(results)} clips are right in all that their prompt names."
    return [element("p", line), *clips] if results else clips


def previews(path):
    """What training drew, in the order of stages and steps."""
    def caption(file):
        stage, _, step = file.stem.rpartition("-")
        return [f"{stage} stage, step {int(step):,}" if step.isdecimal() else file.stem]

    return gallery(path / "previews", caption, "previews", MAX_PREVIEWS) or [
        missing("There are none: training draws one each --preview-every steps.")]


def read_metrics(folder):
    """{stage: [(step, loss, steps a second), ...]} of a folder's metrics.jsonl; {} without one."""
    stages, path = {}, folder / "metrics.jsonl"
    for line in read_bytes(path).decode(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
            entry = json.loads(line)
            point = [float(entry[name]) for name in ("step", "loss", "steps_per_second")]
            if all(0 < number < math.inf for number in point):
                stages.setdefault(str(entry["stage"]), []).append(point)
    return stages


def minutes(points):
    """The time of a stage's steps; not that between a stop and a resume."""
    before = [(0,), *points[:-1]]
    return sum((b[0] - a[0]) / b[2] for a, b in zip(before, points, strict=True)) / 60


def losses(stages):
    """A curve for each stage."""
    charts = [
        chart(stage, f"{points[-1][0]:,.0f} steps in {minutes(points):.1f} minutes; "
              f"loss {points[0][1]:.3g} to {points[-1][1]:.3g}", [p[:2] for p in points])
        for stage, points in stages.items()
    ]
    return [element("div", *charts, class_="charts") if charts else missing(
        "There are none yet: training notes them each --log-every steps.")]


def scores(path, options, found):
    """The tables of evaluation.json."""
    if options.data != "shapes":
        return [missing(f"The run was trained on {options.data}; only of MovingShapes is the truth "
                        "known.")]
    if not found:
        return [missing("There are none yet; measure with", "python", "evaluate.py", str(path))]
    agreement = [[name, percentage(row["all"]),
                  *(f"{row[k]:.1f}" if k in row else "–" for k in PARTS),
                  f"{row['crispness']:.3f}" if "crispness" in row else "–", f"{row['count']:,}"]
                 for name, row in found["agreement"].items()]
    measures = dict.fromkeys(name for row in found["quality"].values() for name in row)
    quality = [[name, *(f"{row[m]:g}" if m in row else "–" for m in measures)]
               for name, row in found["quality"].items()]
    sampling = found["sampling"]
    how = (f"{found['num_prompts']} prompts, noise of seed {found['seed']} and up, "
           f"{sampling['num_steps']} denoising steps, guidance {sampling['guidance_scale']:g}.")
    return [
        element("p", " ".join([how, *found["decoder"]])),
        table(["agreement", "all right, %", *(f"{k}, %" for k in PARTS), "crispness", "number"],
              agreement),
        table(["quality", *(f"{m}, dB" if m == "PSNR" else m for m in measures)], quality),
    ]


def settings(options):
    """All options with their help, those first that differ from the recipe; versions."""
    fields, recipe = dataclasses.fields(options), RECIPES[options.preset]
    changed = [f for f in fields if getattr(options, f.name) != getattr(recipe, f.name)]
    mark = element("span", "changed", class_="badge")
    rows = [["--" + f.name.replace("_", "-"), element("span", f"{getattr(options, f.name)} ",
             *([mark] if f in changed else [])), f.metadata["help"]]
            for f in sorted(fields, key=lambda f: f not in changed)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "pillow"))
    return [
        element("details", element("summary", f"{len(fields)} options, changed: {len(changed)}"),
                table(["option", "value", "meaning"], rows, "words")),
        element("p", f"This page was made with Python {platform.python_version()}, {versions}."),
    ]


def summary(path, options, finished, found, stages):
    """What the run is, in a sentence and a few numbers."""
    data = "MovingShapes" if options.data == "shapes" else options.data
    text = (f"A text-to-video model of the preset {options.preset}: {options.num_frames} frames of "
            f"{options.image_size} × {options.image_size} pixels, temporal variant "
            f"{options.temporal}, trained on {data}.")
    kinds = {"clips, seen": "clips right, seen in training",
             "clips, held out": "clips right, held out", "images, all": "images right"}
    numbers = [(f"{found['agreement'][kind]['all']:g} %", what) for kind, what in kinds.items()
               if kind in found.get("agreement", {})]
    if stages:
        numbers.append((f"{sum(map(minutes, stages.values())):.1f}", "minutes of training"))
    tiles = [element("div", element("b", number), element("span", what), class_="tile")
             for number, what in numbers]
    left = ", ".join(stage for stage in STAGES if stage not in finished)
    command = "python", "train.py", str(path), "--resume"
    rest = [missing(f"Not finished: {left}; continue with", *command)] if left else []
    return [element("p", text), *rest, element("div", *tiles, class_="tiles")]


def write_page(path):
    """Write RUN/index.html; returns its path. Raises ValueError for a folder that is no run."""
    if not (path / "train.json").exists():
        raise ValueError(f"{path}: is no run, it has no train.json; name a folder of train.py")
    options, finished = read_record(path)
    record = path / "evaluation.json"
    found = read_json(record) if record.exists() else {}
    stages = read_metrics(path) | read_metrics(path / "video_decoder")
    try:
        parts = {"summary": summary(path, options, finished, found, stages),
                 "scores": scores(path, options, found)}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{record}: damaged, or of another version ({error})") from None
    parts |= {"samples": samples(path, options), "losses": losses(stages),
              "previews": previews(path), "options": settings(options)}
    texts = {name: write(elements) for name, elements in parts.items()}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.substitute(texts, title=html.escape(path.resolve().name))
    # A file's name may have bytes that are no text: they become question marks.
    write_text(path / "index.html", page.encode(errors="replace").decode())
    return path / "index.html"


def main():
    parser = argparse.ArgumentParser(description="Show a run as one page.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained model")
    print(write_page(parser.parse_args().run))


if __name__ == "__main__":
    run_main(main)
