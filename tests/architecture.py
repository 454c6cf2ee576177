"""Which package may import which, and the picture of it in CONTRIBUTING.md.

``python -m tests.architecture`` draws the picture anew and prints the counts.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("engine.format", "engine.handover"),
    ("engine.errors",),
    ("engine.outputs",),
    ("engine.params",),
    ("engine.models", "engine.memory"),
    ("engine.core",),
    ("engine.text", "engine.runner"),
    ("engine.planning", "engine.model_card", "engine.runtime"),
    ("engine.chat",),
    ("engine.explain", "engine.batch", "engine.openai"),
    ("engine.llm",),
    ("engine.checkup",),
    ("engine",),
    ("vm_magic.summaries",),
    ("vm_magic.show",),
    ("vm_magic.remote",),
    ("vm_magic.state",),
    ("vm_magic.chat",),
    ("vm_magic.panel",),
    ("vm_magic.commands",),
    ("vm_magic.shell",),
    ("vm_magic",),
)
"""From the bottom up. A package imports only from layers below its own, so not from the others of its layer."""

INSIDE: dict[str, tuple[str, ...]] = {
    "engine.text": ("tokens", "template", "parse.scan", "parse.tool_parsers", "parse", "guide"),
    "engine.runner": ("device", "kernels", "kv", "sampling", "load", ""),
    "engine.openai": ("http", "schema", "serving", "routes", ""),
}
"""Packages with layers of their own, again from the bottom up; "" is the files that lie directly in the package."""

_MARKS = ("<!-- drawn by python -m tests.architecture -->\n", "<!-- end of the drawing -->\n")
_LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}


@dataclass(frozen=True)
class Import:
    """One imported module, and where it stands."""

    file: Path
    line: int
    module: str

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


def imports_of(path: Path) -> list[Import]:
    """Every import in a file at whatever depth: lazy ones and those for types too."""
    package = list(path.relative_to(ROOT).parent.parts)
    return [
        Import(path, getattr(node, "lineno", 0), module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in modules_named(node, package)
    ]


def module_of(path: Path) -> str:
    """The dotted name of a file; a package's ``__init__`` is the package."""
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def top_package(module: str) -> str:
    """The package of :data:`LAYERS` that a module of this project belongs to: its first two names."""
    return ".".join(module.split(".")[:2])


def package_of(module: str) -> str:
    """The package that a module lies in, however deep."""
    return module if ROOT.joinpath(*module.split(".")).is_dir() else module.rpartition(".")[0] or module


def layer_inside(module: str) -> int:
    """The layer of a module inside its top package; 0 for all where that has no layers of its own."""
    top = top_package(module)
    inner = package_of(module).removeprefix(top).lstrip(".")
    return INSIDE[top].index(inner) if top in INSIDE else 0


def may_import(importer: str, imported: str) -> bool:
    """Whether the order allows one module to import the other."""
    above, below = top_package(importer), top_package(imported)
    if above == below:
        return layer_inside(importer) >= layer_inside(imported)
    return _LAYER[below] < _LAYER[above]


def files_of(*packages: str) -> dict[str, set[str]]:
    """Each module of ``packages`` with the modules of this project that it imports."""
    files = {module_of(path): path for path in sources(*packages)}
    return {name: {one.module for one in imports_of(path)} & files.keys() - {name} for name, path in files.items()}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle of ``arrows``, empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def packages_and_arrows() -> dict[str, set[str]]:
    """Each package (and each module that LAYERS lists itself) with those that it imports."""
    arrows: dict[str, set[str]] = {}
    for name, imported in files_of("engine", "vm_magic").items():
        home = _package_or_listed(name)
        arrows.setdefault(home, set()).update({_package_or_listed(one) for one in imported} - {home})
    return arrows


def _package_or_listed(module: str) -> str:
    return module if module in _LAYER else package_of(module)


def first_sentence(name: str) -> str:
    """What a package or module says that it is for."""
    base = ROOT.joinpath(*name.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".").replace("``", "")


def picture() -> str:
    """The layers from the top down, each package with what it is for."""
    lines = []
    for number, layer in reversed(list(enumerate(LAYERS, 1))):
        for package in layer:
            label = f"{number:>2}" if package == layer[0] else "  "
            lines.append(f"{label} {package:<18} {first_sentence(package)}")
            for inner in reversed(INSIDE.get(package, ())):
                if inner:
                    lines.append(f"     .{inner:<20} {first_sentence(f'{package}.{inner}')}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def drawn(text: str) -> str:
    """``text`` (CONTRIBUTING.md) with the picture as it should be."""
    before, _, rest = text.partition(_MARKS[0])
    return before + _MARKS[0] + picture() + _MARKS[1] + rest.partition(_MARKS[1])[2]


def main() -> None:
    """Draw the picture; print the counts."""
    CONTRIBUTING.write_text(drawn(CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8")
    arrows = packages_and_arrows()
    files = files_of("engine", "vm_magic")
    up = sum(not may_import(a, b) for a, imported in files.items() for b in imported)
    sys.stdout.write(
        f"{len(arrows)} packages in {len(LAYERS)} layers, {sum(map(len, arrows.values()))} arrows, {up} up, "
        f"circles of packages: {circle(arrows) or 'none'}, circles of files: {circle(files) or 'none'}\n"
    )


if __name__ == "__main__":
    main()
