"""The report of a comparison (compare.py): tables and a sheet of clips."""

import statistics

from studies.measuring import table
from studies.sheets import image_of, new_figure, save, show
from support.files import write_text


def cell(values, digits=1):
    """The mean of one value per seed, and the range if they differ."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(set(values)) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def steps_of(runs):
    """The steps at which all runs have a point of their curve, as JSON's keys."""
    return sorted(set.intersection(*(set(run["curve"]) for run in runs)), key=int)


def curve_table(results):
    """Percentages of clips that are right in all parts, after some numbers of steps."""
    steps = steps_of([run for runs in results.values() for run in runs])
    rows = [[name, *(cell([run["curve"][step]["all"] for run in runs]) for step in steps)]
            for name, runs in results.items()]
    return table(["variant", *(f"{step} steps" for step in steps)], *rows)


def rising(results):
    """A sentence about the variants whose last point is the highest of their curve by 1 % or more;
    "" without one."""
    steps = steps_of([run for runs in results.values() for run in runs])
    means = {name: [statistics.mean(run["curve"][step]["all"] for run in runs) for step in steps]
             for name, runs in results.items()}
    names = [name for name, curve in means.items()
             if len(curve) > 1 and curve[-1] >= max(curve[:-1]) + 1]
    return f"Still rising at the end: {', '.join(names)}; more --steps may help." if names else ""


def quality_table(results, references):
    """Clips and images that are right, and how crisp and steady clips are."""
    columns = ("seen, %", "held out, %", "images right, %", "crispness", "consistency")
    rows = []
    for name, runs in results.items():
        scores = [run["scores"] for run in runs]
        rows.append([
            name, *(cell([score[kind]["all"] for score in scores])
                    for kind in ("clips, seen", "clips, held out", "images, all")),
            cell([score["clips, all"]["crispness"] for score in scores], 3),
            cell([score["consistency"] for score in scores], 3)])
    rows += [[name, *(f"{row[column]:.3g}" if column in row else "-" for column in columns)]
             for name, row in references.items()]
    return table(["variant", *columns], *rows)


def write_sheet(path, prompts, clips):
    """An image of clips {variant: (n, t, 3, h, w)}: a block per prompt, a row per variant."""
    figure = new_figure(len(prompts) * (0.4 + 0.7 * len(clips)))
    for i, axes in enumerate(figure.subplots(len(prompts), squeeze=False)[:, 0]):
        show(axes, [drawn[i] for drawn in clips.values()], list(clips), prompts[i])
    save(image_of(figure), path)


def write_report(output, title, results, references):
    """Write report.md; returns its text."""
    text = "\n\n".join([
        title,
        "Agreement with the text, %: the mean over seeds, and the range.",
        curve_table(results), *filter(None, [rising(results)]), quality_table(results, references),
    ])
    write_text(output / "report.md", text + "\n")
    return text
