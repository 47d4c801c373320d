"""The files can be read in the README's order: none of them needs one that comes later."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
FOLDERS = {"checkpoints", "media", "studies", "papers"}


def imports(path):
    """The names of this project's modules and folders that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} & (MODULES.keys() | FOLDERS)


def reached(name, lesson):
    """The lesson's files that a file needs, also by way of files outside the lesson."""
    found, todo, seen = set(), [MODULES[name]], set()
    while todo:
        for needed in imports(todo.pop()) - seen:
            seen.add(needed)
            if needed in lesson:
                found.add(needed)
            else:
                todo += [MODULES[needed]] if needed in MODULES else (ROOT / needed).glob("*.py")
    return found


def test_a_file_imports_only_files_above_it_in_the_reading_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("## Read it")[1].split("\n## ")[0].split("Look up")[0]
    lesson = list(dict.fromkeys(re.findall(r"\[(\w+)\.py\]\(\1\.py\)", part)))
    assert len(lesson) == 14 and set(lesson) <= MODULES.keys()
    for i, name in enumerate(lesson):
        # temporal.py holds the other variants: the U-Net imports it, and it is best read last.
        assert reached(name, lesson) - {"temporal"} <= set(lesson[:i]), name


def test_the_root_imports_nothing_from_papers_or_studies():
    for folder in (ROOT, ROOT / "checkpoints", ROOT / "media"):
        for path in folder.glob("*.py"):
            assert not imports(path) & {"papers", "studies"}, path
