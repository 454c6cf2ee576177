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


def test_the_table_of_commands_names_every_command_and_no_other() -> None:
    from vm_magic.commands.table import COMMANDS

    table = re.search(r"\| command \| does \|\n\| --- \| --- \|\n((?:\|.*\n)+)", README)
    assert table is not None
    cells = [row.split("|")[1] for row in table.group(1).splitlines()]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert named == set(COMMANDS)
