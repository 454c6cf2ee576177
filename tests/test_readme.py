"""What the documents name is there. That their examples run: tests/vm_magic/test_examples.py."""

import json
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED_PATH = re.compile(r"(?<![\w./-])(?:engine|vm_magic|tests|notebooks)(?:/[\w-]+)+(?:\.\w+)?")
NAMED_OBJECT = re.compile(r"(?<![\w./-])(?:engine|vm_magic|tests)(?:\.(?!py\b)\w+)+")


def listed(beginning: str) -> set[str]:
    """The names in the list's item that begins so, without the package's own."""
    item = re.search(rf"^\* {re.escape(beginning)}(.*?)(?=^\S|\n\n)", README, re.DOTALL | re.MULTILINE)
    assert item is not None
    return set(re.findall(r"`(\w+)`", item[1]))


def test_the_lists_of_python_names_are_those_that_the_packages_give() -> None:
    import engine
    import vm_magic

    assert listed("`engine` gives ") == set(engine.__all__)
    assert listed("`vm_magic` gives all that `engine` gives, and ") == set(vm_magic.__all__) - set(engine.__all__)


def test_the_table_of_commands_names_every_command_and_no_other() -> None:
    from vm_magic.commands.table import COMMANDS

    table = re.search(r"\| command \| does \|\n\| --- \| --- \|\n((?:\|.*\n)+)", README)
    assert table is not None
    cells = [row.split("|")[1] for row in table.group(1).splitlines()]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert named == set(COMMANDS)


def documents() -> dict[str, str]:
    """README, CONTRIBUTING, the pages of the manual and what its notebooks' cells say, by file name."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "notebooks").glob("*.md")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    return texts


def named_in_documents(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    return sorted({(document, name) for document, text in documents().items() for name in pattern.findall(text)})


def test_every_file_that_the_documents_name_is_there() -> None:
    named = [(document, path) for document, path in named_in_documents(NAMED_PATH) if "/NAME." not in path]
    assert ("how_it_works.md", "engine/runtime/llm_engine.py") in named
    assert [(document, path) for document, path in named if not (ROOT / path).exists()] == []


def exists(name: str) -> bool:
    """Whether ``name`` is a module of this project or a name in one."""
    if ROOT.joinpath(*name.split(".")).is_dir() or ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file():
        return True  # not imported: some of tests take long to
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_module_and_name_of_ours_in_the_documents_is_there() -> None:
    named = named_in_documents(NAMED_OBJECT)
    assert ("memory.ipynb", "engine.plan_table") in named
    assert [(document, name) for document, name in named if not exists(name)] == []
    assert not exists("engine.no_such_name")
