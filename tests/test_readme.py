"""What the README shows works as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.weights
def test_the_python_example_runs_and_gives_everything_back(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "LLM(" in code)
    names: dict[str, object] = {}
    exec(example, names)
    assert capsys.readouterr().out
    assert names["llm"].closed  # type: ignore[attr-defined]
    assert not names["server"].running  # type: ignore[attr-defined]


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
