"""docs/lesson.ipynb: the first pictures of docs/lesson.md with the code that draws them.

    python -m studies.figures runs/demo && python -m studies.notebook

A notebook is JSON. Its texts are the lesson's sections, its code is the source of figures.py, and
its outputs are the pictures in docs/lesson/.
"""

import base64
import inspect
import re
from pathlib import Path

from studies import figures
from support.files import write_json

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = list(figures.FIGURES.items())[:8]  # those from the text to guidance
SETUP = """\
# Fetch this project, unless the notebook is opened in a clone, and train the demo's model (minutes).
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


def cells():
    """Yield (a section of the lesson, code, name of its picture or None)."""
    source, lesson = inspect.getsource(figures), (DOCS / "lesson.md").read_text(encoding="utf-8")
    intro, *sections = re.sub(r"!\[.*?\]\(lesson/.*?\)\n\n", "", lesson).split("\n## ")
    head = source.split('"""\n\n', 1)[1].split("\n\n\ndef whole")[0]  # imports and constants
    yield intro, f"{SETUP}\n{head}\n\n\nrun = inside.load(Path('runs/demo'))", None
    for section, (picture, height) in zip(sections, PICTURES, strict=False):
        name = picture.__name__
        yield f"## {section}", f"{inspect.getsource(picture)}\n\ndrawn({name}, run, {height})", name


def main():
    notebook = []
    for text, code, name in cells():
        outputs = []
        if name:
            png = base64.b64encode((DOCS / "lesson" / f"{name}.png").read_bytes()).decode()
            outputs = [{"output_type": "execute_result", "execution_count": None, "metadata": {},
                        "data": {"image/png": png}}]
        notebook += [{"cell_type": "markdown", "metadata": {}, "source": text},
                     {"cell_type": "code", "metadata": {}, "source": code, "outputs": outputs,
                      "execution_count": None}]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    write_json(DOCS / "lesson.ipynb", {"nbformat": 4, "nbformat_minor": 4, "cells": notebook,
                                       "metadata": {"kernelspec": kernel}})


if __name__ == "__main__":
    main()
