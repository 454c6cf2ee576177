"""The quickstart as a file: a real run's outputs, nothing of the machine in them, and a snippet that works.

Its cells are run and compared by nbval, in the same pytest session (``notebooks`` is in ``testpaths``).
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
CHANGES_EACH_RUN = re.compile(r"127\.0\.0\.1:\d+|tokens/s|\bGB\b|\d+\.\d+ s\b")


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(QUICKSTART, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_outputs_are_those_of_one_run_from_top_to_bottom(notebook: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_every_code_cell_is_led_up_to_by_prose(notebook: Any) -> None:
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert "code code code" not in " ".join(kinds)


def test_only_cells_whose_output_is_not_compared_show_times_bytes_or_ports(notebook: Any) -> None:
    compared = [cell for cell in code_cells(notebook) if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    changing = [cell.source for cell in compared if CHANGES_EACH_RUN.search(str(cell.outputs))]
    assert not changing
    assert len(compared) > len(code_cells(notebook)) / 2


@pytest.mark.weights
def test_the_openai_snippet_prints_the_same_answer_as_the_port_without_it(
    notebook: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import LLM

    snippet = next(
        match.group(1)
        for cell in notebook.cells
        if (match := re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)) and cell.cell_type == "markdown"
    )
    llm = LLM(model="smollm2", max_model_len=512)
    try:
        llm.settings.update(temperature=0, max_tokens=64)
        server = llm.serve(port=0)
        exec(snippet, {"server": SimpleNamespace(base_url=server.base_url, api_key=server.api_key)})
    finally:
        llm.close()
    stored = [str(cell.outputs) for cell in code_cells(notebook) if "urlopen" in cell.source]
    printed = capsys.readouterr().out
    assert printed
    assert printed in stored[0]
