"""The second notebook as a file: a real run's outputs, with nothing of the machine in them.

Its cells are run and compared by nbval, in the same pytest session (``notebooks`` is in ``testpaths``).
"""

from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.test_quickstart import CHANGES_EACH_RUN, code_cells

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "json_thoughts_and_tools.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_outputs_are_those_of_one_run_from_top_to_bottom(notebook: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_compared_outputs_hold_no_times_bytes_or_ports(notebook: Any) -> None:
    compared = [cell for cell in code_cells(notebook) if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    assert not [cell.source for cell in compared if CHANGES_EACH_RUN.search(str(cell.outputs))]
    assert len(compared) > len(code_cells(notebook)) / 2


def test_nothing_saved_names_the_users_home_or_a_key(notebook: Any) -> None:
    saved = str([cell.outputs for cell in code_cells(notebook)])
    assert str(Path.home()) not in saved
    assert "writes this to ~/" in saved
    assert "Bearer $VLLM_API_KEY" in saved
