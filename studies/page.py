"""A run as one page, RUN/index.html, which opens from disk and needs no network and no scripts.

    python -m studies.page runs/demo
    python -m studies.page runs/demo --prompts-file prompts.txt     first draw these, and score

It shows samples with what evaluate.py sees in them, scores, losses, previews and options. page.html
is the template. `element` escapes every text, because prompts and file names may hold anything.
"""

import base64
import contextlib
import dataclasses
import html
import io
import json
import math
import shlex
from pathlib import Path
from string import Template

import torch

import evaluate
from checkpoints.weights import load_pipeline
from evaluate import crispness, recognise
from media.read import read_clip
from media.write import WRITERS, enlarge, file_names, side_by_side, write_samples
from sample import generate
from shapes import COLOURS, DIRECTIONS, HELD_OUT, SHAPES
from support.cli import Parser, run_main
from support.devices import choose_device
from support.files import read_json, read_prompts, write_text
from training.options import RECIPES, STAGES, read_record
from training.run import open_data

PARTS = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
TILES = "clips, seen", "clips, held out", "images, all"  # rows of evaluation.json for the summary
FORMATS = dict.fromkeys(["all", *PARTS], "{:.1f} %") | {"count": "{:,}", "PSNR": "{:.2f} dB"}
WIDTH, HEIGHT, LEFT, TOP = 360, 200, 50, 26  # size and margins of a chart, in pixels


class Html(str):
    """Text that is HTML already. Every other string is escaped when it enters an element."""


def element(name, *children, **attributes):
    """An element of HTML or SVG."""
    pairs = ((key.strip("_").replace("_", "-"), value) for key, value in attributes.items())
    start = "".join(f' {key}="{html.escape(str(value))}"' for key, value in pairs)
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child))
                     for child in children)
    return Html(f"<{name}{start}>" + ("" if name == "img" else f"{inside}</{name}>"))


def missing(text, *command):
    """A paragraph about what the run lacks, with the command that makes it."""
    return element("p", text, " ", element("code", shlex.join(map(str, command))), class_="missing")


def table(columns, rows, class_="numbers"):
    """A table of rows of cells; the first cell of a row is its heading."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = [element("tr", element("th", first, scope="row"), *(element("td", x) for x in cells))
            for first, *cells in rows]
    parts = element("thead", head), element("tbody", *body)
    return element("div", element("table", *parts, class_=class_), class_="scroll")


def real_gif_of(options):
    """A function from captions, or names of files, to a GIF of a run's own clips, or to None."""
    clips, index = None, {}
    with contextlib.suppress(ValueError):  # the folder was moved or changed
        clips = None if options.data == "shapes" else open_data(options)
        index = {file_names([x], "")[0]: i for i, x in enumerate(clips.captions)} if clips else {}

    def gif(*captions):
        found = [index.get(file_names([caption], "")[0]) for caption in captions]
        if not found or None in found:
            return None
        some = [clips[i][0][: options.num_frames] / 127.5 - 1 for i in found]
        WRITERS[".gif"](file := io.BytesIO(), [side_by_side(enlarge(torch.stack(some)))],
                        options.sampling(1).frames_per_second)
        return file.getvalue()

    return gif


def picture(data, kind, name):
    """An image from the bytes of a file."""
    data = base64.b64encode(data).decode()
    return element("img", src=f"data:image/{kind};base64,{data}", alt=name)


def gallery(folder, caption, real_gif=lambda name: None):
    """HTML of the GIFs and PNGs of a folder, each beside its real clip and above caption(path)."""
    figures = []
    for path in sorted([*folder.glob("*.gif"), *folder.glob("*.png")]):
        images, text = [picture(path.read_bytes(), path.suffix[1:], path.stem)], caption(path)
        if data := real_gif(path.stem):
            images.append(picture(data, "gif", f"real: {path.stem}"))
            text.append(element("small", "left: drawn; right: real"))
        figures.append(element("figure", element("div", *images, class_="pair"),
                               element("figcaption", *text)))
    return element("div", *figures, class_=folder.name) if figures else ""


def chart(stage, points):
    """A figure of a stage's losses on a logarithmic axis. points: its entries in metrics.jsonl."""
    steps, losses = [p["step"] for p in points], [p["loss"] for p in points]
    low, high, right, bottom = min(losses), max(losses), WIDTH - LEFT, HEIGHT - TOP
    span = math.log(high / low) or 1.0  # a single loss has none
    curve = " ".join(f"{LEFT + (right - LEFT) * step / steps[-1]:.1f},"
                     f"{TOP + (bottom - TOP) * math.log(high / loss) / span:.1f}"
                     for step, loss in zip(steps, losses, strict=True))
    labels = [(LEFT - 6, TOP + 4, f"{high:.3g}"), (LEFT - 6, bottom + 4, f"{low:.3g}"),
              (right, bottom + 18, f"{steps[-1]:,} steps")]
    drawing = element(
        "svg", *(element("text", text, x=x, y=y, text_anchor="end") for x, y, text in labels),
        element("polyline", points=curve), viewBox=f"0 0 {WIDTH} {HEIGHT}")
    note = f"{minutes(points):.1f} minutes; loss {losses[0]:.3g} to {losses[-1]:.3g}"
    return element("figure", drawing, element("figcaption", element("b", stage),
                                              element("small", note)))


def judge(path, asked, image_size):
    """What evaluate.py sees of what a prompt names: [(part, whether right)], crispness or None."""
    frames = read_clip(path)[0].transpose(0, 3, 1, 2) / 255  # t h w 3 -> t 3 h w
    zoom = max(1, frames.shape[2] // image_size)
    frames = frames[:, :, ::zoom, ::zoom]  # as drawn; small clips are written enlarged
    crisp = crispness(torch.from_numpy(2 * frames - 1), asked[1]) if asked[1] else None
    return [(saw or f"no {part}", saw == want) for part, want, saw
            in zip(PARTS, asked, recognise(frames), strict=True) if want], crisp


def samples(path, options, real_gif):
    """The clips of RUN/samples with their prompts, and what evaluate.py sees in them."""
    results = []

    def caption(file):
        prompt = file.stem.replace("-", " ")
        asked = tuple(next((w for w in prompt.split() if w in known), None)
                      for known in PARTS.values())
        if options.data != "shapes" or file.suffix != ".gif" or not any(asked):
            return [prompt]
        seen, crisp = judge(file, asked, options.image_size)
        results.append(all(right for _, right in seen))
        marks = [element("span", f"{'✓' if right else '✗'} {text}",
                         class_="right" if right else "wrong") for text, right in seen]
        if crisp is not None:
            marks.append(element("span", f"crispness {crisp:.2f}"))
        if asked in HELD_OUT:
            marks.append(element("span", "held out", class_="badge"))
        return [prompt, element("div", *marks, class_="marks")]

    clips = gallery(path / "samples", caption, real_gif)
    if not clips:
        return missing("There are no samples yet; draw some with", "python", "sample.py", path,
                       "--prompts-file", "prompts.txt")
    about = ("evaluate.py reads colour, shape and direction off the pixels by geometry. ✓ marks "
             "agreement with the text, ✗ disagreement; crispness is 1 for an ideal shape. Held-out "
             "combinations do not occur in the training data. "
             f"{sum(results)} of {len(results)} clips are right in all that their prompts name.")
    return (element("p", about) if results else "") + clips


def previews(path, real_gif):
    """The clips of RUN/previews and their captions, and the real clips with these captions."""
    file = path / "previews" / "captions.txt"
    captions = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    text = "The captions, from left to right and row by row: " + "; ".join(captions) + "."
    drawn = gallery(path / "previews", lambda file: [file.stem])
    if data := real_gif(*captions):
        drawn += element("div", element("figure", picture(data, "gif", "real clips"), element(
            "figcaption", "real clips with these captions")), class_="previews real")
    return (element("p", text) if captions else "") + drawn


def read_metrics(path):
    """{stage: entries} of a run's metrics.jsonl; {} without one."""
    stages, file = {}, path / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        if line.endswith("}"):  # a kill may cut the last one short
            entry = json.loads(line)
            stages.setdefault(entry["stage"], []).append(entry)
    return stages


def minutes(points):
    """The time that a stage's steps took, without the time between a stop and a resume."""
    steps = [0, *(p["step"] for p in points)]
    return sum((p["step"] - before) / p["steps_per_second"]
               for p, before in zip(points, steps, strict=False)) / 60


def scores(path, found, shapes):
    """The two tables of evaluation.json."""
    if not shapes:
        return element("p", "evaluate.py scores MovingShapes only, whose truth is known.")
    if not found:
        return missing("No scores yet; on MovingShapes, run", "python", "evaluate.py", path)
    how = found["sampling"]
    text = ("The percentage of clips that agree with their text. Real clips, real clips after the "
            "autoencoder, and noise show what the numbers mean. "
            f"{found['num_prompts']} prompts, noise from seed {found['seed']} on, "
            f"{how['num_steps']} denoising steps, guidance {how['guidance_scale']:g}.")
    parts = [element("p", text)]
    for title in ("agreement", "quality"):
        columns = dict.fromkeys(name for row in found[title].values() for name in row)
        rows = [[name, *(FORMATS.get(c, "{:.3f}").format(row[c]) if c in row else "–"
                         for c in columns)] for name, row in found[title].items()]
        parts.append(table([title, *columns], rows))
    return "".join(parts)


def settings(options):
    """The options of train.py with their help; those that differ from the recipe come first."""
    recipe, fields = RECIPES[options.preset], dataclasses.fields(options)
    changed = [f for f in fields if getattr(options, f.name) != getattr(recipe, f.name)]
    rows = [["--" + f.name.replace("_", "-"),
             f"{getattr(options, f.name)}{' (changed)' if f in changed else ''}",
             f.metadata["help"]] for f in sorted(fields, key=lambda f: f not in changed)]
    return table(["option", "value", "meaning"], rows, "words")


def summary(path, options, finished, found, stages):
    """The run in a sentence and a few numbers."""
    text = (f"A text-to-video model of the preset {options.preset}: {options.num_frames} frames of "
            f"{options.image_size} × {options.image_size} pixels, temporal variant "
            f"{options.temporal}, trained on --data {options.data}.")
    numbers = {f"{kind}: right": f"{row['all']:g} %"
               for kind, row in found.get("agreement", {}).items() if kind in TILES}
    numbers["minutes of training"] = f"{sum(map(minutes, stages.values())):.1f}"
    tiles = [element("div", element("b", number), element("span", what), class_="tile")
             for what, number in numbers.items()]
    left = ", ".join(stage for stage in STAGES if stage not in finished)
    rest = missing(f"Not finished: {left}; continue with", "python", "train.py", path, "--resume")
    return element("p", text) + (rest if left else "") + element("div", *tiles, class_="tiles")


def write_page(path):
    """Write RUN/index.html; returns its path."""
    options, finished = read_record(path)
    evaluation, stages = path / "evaluation.json", read_metrics(path)
    found = read_json(evaluation) if evaluation.exists() else {}
    real_gif = real_gif_of(options)
    parts = {
        "title": html.escape(path.resolve().name), "options": settings(options),
        "summary": summary(path, options, finished, found, stages),
        "samples": samples(path, options, real_gif),
        "scores": scores(path, found, options.data == "shapes"),
        "losses": "".join(chart(*stage) for stage in stages.items()),
        "previews": previews(path, real_gif)}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    write_text(path / "index.html", template.substitute(parts))
    return path / "index.html"


def draw_and_score(path, prompts):
    """What sample.py and evaluate.py do with their defaults, in one process, and overview.gif."""
    torch.set_flush_denormal(True)  # as in sample.py
    pipeline = load_pipeline(path).to(choose_device("auto"))
    clips = list(generate(pipeline, prompts, pipeline.sampling, seed=0, batch_size=8))
    for output in path / "samples", path / "overview.gif":
        write_samples(clips, prompts, output, ".gif", pipeline.sampling.frames_per_second)
        print(output)
    if read_record(path)[0].data == "shapes":
        evaluate.main([str(path)])


def main():
    parser = Parser(description="Show a run as one page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained model")
    parser.add_argument("--prompts-file", type=Path,
                        help="first draw the prompt on each line, and score MovingShapes")
    args = parser.parse_args()
    if args.prompts_file:
        draw_and_score(args.run, read_prompts(args.prompts_file))
    print(write_page(args.run))


if __name__ == "__main__":
    run_main(main)
