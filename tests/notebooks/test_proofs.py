"""What the manual claims row by row, it proves: a test that a page names is there, and so is a command's module."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "notebooks").glob("*.md"))
TEST = re.compile(r"\b(tests/[\w/]+\.py)(?:::(\w+))?")
MODULE = re.compile(r"python -m (tests(?:\.\w+)*)")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):  # a state machine's TestCase
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def broken_proofs(page: str) -> list[str]:
    broken = []
    for file, name in TEST.findall(page):
        path = ROOT / file
        if not path.is_file():
            broken.append(f"{file} is not there")
        elif name and name not in names_in(path):
            broken.append(f"{file} has no {name}")
    for module in MODULE.findall(page):
        if importlib.util.find_spec(module) is None:
            broken.append(f"python -m {module}: no such module")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_test_and_module_that_a_page_names_is_there(page: Path) -> None:
    assert broken_proofs(page.read_text(encoding="utf-8")) == []


def test_a_proof_that_is_not_there_is_found() -> None:
    page = "`tests/gone.py`, `tests/nightly.py::nothing`, `tests/nightly.py::size`, `python -m tests.gone`"
    assert broken_proofs(page) == [
        "tests/gone.py is not there",
        "tests/nightly.py has no nothing",
        "python -m tests.gone: no such module",
    ]
