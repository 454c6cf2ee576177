"""The one-way order of the packages, checked on every import statement (lazy and type-only ones too), and the tail."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.architecture import (
    CONTRIBUTING,
    INSIDE,
    LAYERS,
    ROOT,
    circle,
    drawn,
    exists,
    files_of,
    imports_of,
    may_import,
    module_of,
    modules_named,
    packages_and_arrows,
    sources,
    top_package,
)

PACKAGES = ("engine", "vm_magic")
LONGEST_FUNCTION = 50
LONGEST_FILE = 500
MLX = {"mlx", "mlx_lm"}
NOTEBOOK = {"IPython", "ipywidgets", "ipykernel", "traitlets", "vm_magic"}


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below_its_own(path: Path) -> None:
    module = module_of(path)
    assert top_package(module) in {package for layer in LAYERS for package in layer}, f"LAYERS lacks {module}"
    for found in imports_of(path):
        if found.module.split(".")[0] in PACKAGES:
            assert may_import(module, found.module), f"{found}: that lies above or beside it"


def test_every_package_of_the_list_is_there() -> None:
    names = [package for layer in LAYERS for package in layer]
    names += [f"{package}.{inner}" for package, inners in INSIDE.items() for inner in inners if inner]
    assert [name for name in names if not exists(name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    assert circle(files_of(package)) == []


def test_no_packages_import_each_other_in_a_circle() -> None:
    assert circle(packages_and_arrows()) == []


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_few_files_lie_beside_the_packages() -> None:
    assert {path.stem for path in (ROOT / "engine").glob("*.py")} == {
        "__init__",
        "errors",
        "handover",
        "outputs",
        "llm",
        "planning",
    }
    assert {path.stem for path in (ROOT / "vm_magic").glob("*.py")} == {"__init__"}


def test_the_picture_in_contributing_is_drawn_from_the_list() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    assert text == drawn(text), "run: python -m tests.architecture"


def test_only_the_runner_imports_mlx() -> None:
    found = [
        str(one)
        for path in sources(*PACKAGES)
        if top_package(module_of(path)) != "engine.runner"
        for one in imports_of(path)
        if one.module.split(".")[0] in MLX
    ]
    assert not found


def test_the_engine_knows_nothing_of_notebooks() -> None:
    found = [str(one) for path in sources("engine") for one in imports_of(path) if one.module.split(".")[0] in NOTEBOOK]
    assert not found


def test_no_function_and_no_file_grows_long() -> None:
    long = []
    for path in sources(*PACKAGES):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long


def test_the_import_reader_sees_lazy_type_only_relative_and_dynamic_imports() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import mlx.core\n"
        "from ..errors import ConfigError\n"
        "from engine import llm\n"
        "def f():\n    import importlib\n    return importlib.import_module('mlx_lm')\n"
    )
    nodes = list(ast.walk(ast.parse(source)))
    found = {name for node in nodes for name in modules_named(node, ["engine", "openai"])}
    assert {"mlx.core", "engine.errors", "mlx_lm", "engine.llm"} <= found


def committed_files() -> list[Path]:
    """Files that git tracks; skipped outside a checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_committed_file_names_a_path_of_one_machine() -> None:
    folders = "|".join(
        [
            "wo" + "rk",
            "ro" + "ot",
            "home/(?!me|user|jovyan)[a-z]+",
            "Us" + "ers/(?!me)[A-Za-z]+",
            "tmp/(?:exp|venv|smol|ipykernel)",
        ]
    )
    pattern = re.compile(rf"(?<![\w.~}}/-])/(?:{folders})\b(?!-)".encode())
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in committed_files()
        if (match := pattern.search(path.read_bytes()))
    ]
    assert not found
