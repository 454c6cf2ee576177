"""The notebook on memory as a file: every output is compared by nbval, since nothing in it depends on the machine."""

import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.test_saved_outputs import code_cells

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "memory.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_outputs_are_those_of_one_run_from_top_to_bottom(notebook: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [cell.source for cell in code_cells(notebook) if cell.metadata.get("tags")]


def test_the_three_models_are_shown_as_pictures_and_the_settings_as_tables(notebook: Any) -> None:
    shown = [output.data["text/html"] for cell in code_cells(notebook) for output in cell.outputs if "data" in output
             and "text/html" in output.data]  # fmt: skip
    assert ['role="img"' in page for page in shown] == [True] * 3 + [False] * 2
    assert tempfile.gettempdir() not in str(shown)
