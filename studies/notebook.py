"""docs/lesson.ipynb: sections of docs/lesson.md with the code that draws their pictures.

    python -m studies.figures runs/demo && python -m studies.notebook
"""

import base64
import inspect
import re
from pathlib import Path

from studies import figures
from support.files import write_json

DOCS = Path(__file__).parents[1] / "docs"
NUM_PICTURES = 8  # from the text to guidance; their notebook is smaller than 500 KB
SETUP = """\
# Fetch the project, unless this is a clone of it, and train the demo's model, which takes minutes.
import os, subprocess, sys
if os.path.exists("../studies"):
    os.chdir("..")  # from docs
elif not os.path.exists("studies"):
    subprocess.run(["git", "clone", "THIS_REPOSITORY", "latent-shift"], check=True)
    os.chdir("latent-shift")
sys.path.insert(0, os.getcwd())
resume = ["--resume"] * os.path.exists("runs/demo/train.json")
subprocess.run([sys.executable, "train.py", "runs/demo", *resume], check=True)
"""


def cell(kind, source, *outputs):
    code = {"execution_count": None, "outputs": list(outputs)} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source, **code}


def make():
    """The notebook as JSON: the lesson's text, the source of figures.py, its pictures."""
    source, lesson = inspect.getsource(figures), (DOCS / "lesson.md").read_text(encoding="utf-8")
    intro, *texts = re.split("\n(?=## )", re.sub(r"!\[.*?\]\(lesson/.*?\)\n\n", "", lesson))
    head = source.split('"""\n\n', 1)[1].split("\n\n\ndef whole")[0]  # imports and constants
    cells = [cell("markdown", intro),
             cell("code", f'{SETUP}\n{head}\n\n\nrun = inside.load(Path("runs/demo"))')]
    pictures = list(figures.FIGURES.items())[:NUM_PICTURES]
    for text, (picture, height) in zip(texts, pictures, strict=False):
        png = (DOCS / "lesson" / f"{picture.__name__}.png").read_bytes()
        output = {"data": {"image/png": base64.b64encode(png).decode()}, "metadata": {},
                  "output_type": "execute_result", "execution_count": None}
        draw = f"drawn({picture.__name__}, run, {height})"
        cells += [cell("markdown", text),
                  cell("code", f"{inspect.getsource(picture)}\n\n{draw}", output)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}, "cells": cells}


if __name__ == "__main__":
    write_json(DOCS / "lesson.ipynb", make())
