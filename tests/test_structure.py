"""The files can be read in the README's order: none of them needs one that comes later."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem for path in ROOT.glob("*.py")}
SCRIPTS = {"train", "sample", "evaluate"}
LAYERS = ["support", "media", "checkpoints", "training"]  # each may import those before it
FOLDERS = {*LAYERS, "papers", "studies", "exercises"}


def imports(path):
    """The project's modules and folders that a file imports, also inside its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} & (MODULES | FOLDERS)


@pytest.fixture(scope="module")
def order():
    """The root's modules in the order in which the README has them read."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Read it")[1].split("\n## ")[0]
    return list(dict.fromkeys(re.findall(r"\[(\w+)\.py\]\(\1\.py\)", section)))


def test_the_root_is_fourteen_files_and_the_readme_has_each(order):
    assert sorted(order) == sorted(MODULES) and len(MODULES) == 14


def test_a_file_imports_only_files_above_it_in_the_reading_order(order):
    for i, name in enumerate(order):
        assert imports(ROOT / f"{name}.py") & MODULES <= set(order[:i]), name


@pytest.mark.parametrize("folder", ["", *LAYERS])
def test_nothing_imports_papers_studies_or_exercises(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not imports(path) & {"papers", "studies", "exercises"}, path


@pytest.mark.parametrize("i", range(len(LAYERS)), ids=LAYERS)
def test_a_folder_imports_no_higher_folder_and_no_script(i):
    for path in (ROOT / LAYERS[i]).glob("*.py"):
        assert not imports(path) & {*LAYERS[i + 1 :], *SCRIPTS}, path


def test_the_exercises_need_nothing_of_the_project():
    for path in (ROOT / "exercises").glob("*.py"):
        assert imports(path) <= {"exercises"}, path
