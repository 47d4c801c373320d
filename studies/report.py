"""The report of a comparison (compare.py): tables, a plot and a sheet of clips."""

import math
import statistics

from studies.curves import plot
from studies.measuring import table
from studies.sheets import new_figure, save, show
from support.files import write_text

# 97.5 % quantiles of Student's t with 2 to 20 degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, table 1.3.6.7.2.
T_QUANTILES = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
    2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)


def interval(values):
    """(mean, low, high) of at least 3 values, one per seed: Student's 95 % interval of the mean.

    It assumes that values scatter like a Gaussian. Equal values (three times 100 %) give width 0,
    which is not certainty. Beyond 21 values it is slightly too wide.
    """
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


def agreement_table(results):
    """Percentages of clips that are right, on seen and on held-out combinations."""
    kinds, parts = ("seen", "held out"), ("colour", "shape", "direction", "all")
    rows = [
        [name, kind, *(cell([r["scores"][f"clips, {kind}"][part] for r in runs]) for part in parts)]
        for name, runs in results.items() for kind in kinds
    ]
    return table(["variant", "combinations", *parts], *rows)


def steps_of(runs):
    """The steps at which all runs have a point of their curve, as JSON's keys."""
    return sorted(set.intersection(*(set(run["curve"]) for run in runs)), key=int)


def curve_table(results):
    """Percentages of clips that are right in all parts, after some numbers of steps."""
    steps = steps_of([run for runs in results.values() for run in runs])
    rows = [[name, *(cell([run["curve"][step]["all"] for run in runs]) for step in steps)]
            for name, runs in results.items()]
    return table(["variant", *(f"{step} steps" for step in steps)], *rows)


def quality_table(results, references):
    """Images right, and how crisp and steady clips are."""
    columns = ("images right, %", "crispness", "consistency")
    rows = []
    for name, runs in results.items():
        scores = [run["scores"] for run in runs]
        rows.append([
            name, cell([score["images, all"]["all"] for score in scores]),
            cell([score["clips, all"]["crispness"] for score in scores], 3),
            cell([score["consistency"] for score in scores], 3)])
    rows += [[name, *(f"{row[column]:.3g}" if column in row else "-" for column in columns)]
             for name, row in references.items()]
    return table(["variant", *columns], *rows)


def curves(results):
    """{variant: [(steps, mean, low, high), ...]} of the clips that are right, in percent."""
    series = {}
    for name, runs in results.items():
        series[name] = []
        for step in steps_of(runs):
            values = [run["curve"][step]["all"] for run in runs]
            mean, low, high = interval(values) if len(values) > 2 else 3 * [statistics.mean(values)]
            series[name].append((int(step), mean, max(0.0, low), min(100.0, high)))
    return series


def write_sheet(path, prompts, clips):
    """An image of clips {variant: (n, t, 3, h, w)}: a block for each prompt, a row for each."""
    figure = new_figure(len(prompts) * (0.4 + 0.7 * len(clips)))
    for i, axes in enumerate(figure.subplots(len(prompts), squeeze=False)[:, 0]):
        show(axes, [drawn[i] for drawn in clips.values()], list(clips), prompts[i])
    save(figure, path)


def write_report(output, title, results, references):
    """Write report.md and steps.png; returns the report's text."""
    text = "\n\n".join([
        title,
        "Agreement with the text, %; from three seeds on, ± is half of the 95 % interval of the "
        "mean over seeds (Student).",
        agreement_table(results), curve_table(results), quality_table(results, references),
    ])
    write_text(output / "report.md", text + "\n")
    plot(output / "steps.png", curves(results), "Agreement against steps", "training steps",
         "clips whose colour, shape and direction are right, %")
    return text
