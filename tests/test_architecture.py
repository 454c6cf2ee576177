"""The one-way order of the rooms, checked on every import statement (lazy and type-only ones too), and the tail."""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "vm_magic")
LONGEST_FUNCTION = 60
LONGEST_FILE = 500

_BELOW = ("shared", "memory")
_MIDDLE = (*_BELOW, "core", "runner", "text", "metrics")
ALLOWED: dict[str, frozenset[str]] = {
    "shared": frozenset({"shared"}),
    "plan_text": frozenset({"shared"}),
    "memory": frozenset({"shared", "plan_text"}),
    "side_by_side": frozenset({"shared", "plan_text", "memory"}),
    "core": frozenset({"core", *_BELOW}),
    "runner": frozenset({"runner", *_BELOW}),
    "text": frozenset({"text", *_BELOW}),
    "metrics": frozenset({"shared"}),
    "preflight": frozenset(_MIDDLE),
    "llm_engine": frozenset({*_MIDDLE, "preflight"}),
    "builder": frozenset({*_MIDDLE, "llm_engine", "preflight"}),
    "stats_log": frozenset({*_MIDDLE, "llm_engine"}),
    "engine_thread": frozenset({*_MIDDLE, "llm_engine", "builder", "stats_log"}),
    "engine_view": frozenset({*_MIDDLE, "llm_engine"}),
    "replan": frozenset({*_MIDDLE, "llm_engine"}),
    "planning": frozenset({*_MIDDLE, "side_by_side"}),
    "replay": frozenset(_MIDDLE),
    "request_maker": frozenset(_MIDDLE),
    "explaining": frozenset({*_MIDDLE, "replay"}),
    "local_door": frozenset({*_MIDDLE, "replay"}),
    "llm": frozenset(
        {
            *_MIDDLE,
            "local_door",
            "request_maker",
            "explaining",
            "llm_engine",
            "engine_view",
            "replan",
            "builder",
            "engine_thread",
        }
    ),
    "openai": frozenset({"openai", *_MIDDLE, "llm_engine", "engine_thread", "llm"}),
    "engine": frozenset({*_MIDDLE, "planning", "replay", "llm"}),
    "vm_magic": frozenset({"vm_magic", "engine", *_BELOW, "plan_text", "side_by_side", "metrics", "llm", "openai"}),
}
"""Room -> rooms it may import. "engine" is the package's __init__, which only re-exports; "shared" is every module
directly in engine/ that has no row of its own (types, finding models, reading their headers): it knows only itself."""

ALLOWED_LAZILY = {("llm", "openai"), ("vm_magic", "text"), ("plan_text", "memory")}
"""Inside a function or for types only. Against the order: ``LLM.serve`` is the door from the Python API to the port,
and a plan's text names the plan's type.
Past a room: the notebook reads replies with the parser that ``LLM.output_parser`` hands out, and names its type."""

MLX = {"mlx", "mlx_lm"}
NOTEBOOK = {"IPython", "ipywidgets", "ipykernel", "traitlets", "vm_magic"}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands and whether loading the file leaves it alone (in a function, for types)."""

    file: Path
    line: int
    module: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(*packages: str) -> list[Path]:
    """All Python files of ``packages``."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def exists(module: str) -> bool:
    """Whether ``module`` is a file or package of this project."""
    base = ROOT.joinpath(*module.split("."))
    return base.with_suffix(".py").exists() or base.is_dir()


def modules_named(node: ast.AST, package: list[str]) -> Iterator[str]:
    """The absolute names that one statement or ``import_module`` call imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*parents, *filter(None, [node.module])])
        for alias in node.names:
            deeper = f"{base}.{alias.name}"
            yield deeper if exists(deeper) else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def runs_later(node: ast.AST) -> bool:
    """Whether loading a file skips this node's body."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports_of(path: Path) -> list[Import]:
    """Every import in a file, at whatever depth."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(ROOT).parent.parts)
    lazy = {id(inner) for node in ast.walk(tree) if runs_later(node) for inner in ast.walk(node)}
    return [
        Import(path, getattr(node, "lineno", 0), module, id(node) in lazy)
        for node in ast.walk(tree)
        for module in modules_named(node, package)
    ]


def room_of(module: str) -> str:
    """The room that a module of this project belongs to."""
    parts = module.split(".")
    if parts[0] != "engine" or len(parts) == 1:
        return parts[0]
    return parts[1] if parts[1] in ALLOWED or (ROOT / "engine" / parts[1]).is_dir() else "shared"


def room_of_file(path: Path) -> str:
    """The room that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return room_of(".".join(part for part in parts if part != "__init__"))


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_rooms_below_its_own(path: Path) -> None:
    room = room_of_file(path)
    assert room in ALLOWED, f"{path.relative_to(ROOT)} is in no known room: give {room!r} a row in ALLOWED"
    for found in imports_of(path):
        if found.module.split(".")[0] in PACKAGES:
            target = room_of(found.module)
            allowed = target in ALLOWED[room] or (found.lazy and (room, target) in ALLOWED_LAZILY)
            assert allowed, f"{found}: {room} must not import {target}"


def test_only_the_runner_imports_mlx() -> None:
    found = [
        str(one)
        for path in sources(*PACKAGES)
        if room_of_file(path) != "runner"
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


def test_the_import_reader_sees_lazy_type_only_relative_and_dynamic_imports(tmp_path: Path) -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import mlx.core\n"
        "from ..errors import ConfigError\n"
        "from engine import llm\n"
        "def f():\n    import importlib\n    return importlib.import_module('mlx_lm')\n"
    )
    nodes = list(ast.walk(ast.parse(source)))
    found = {name for node in nodes for name in modules_named(node, ["engine", "openai"])}
    assert {"mlx.core", "engine.errors", "mlx_lm"} <= found
    assert ("engine.llm" if exists("engine.llm") else "engine") in found


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
