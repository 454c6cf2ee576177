"""The second notebook tells where things go, without saying where that is on one machine."""

from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.test_saved_outputs import code_cells

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "json_thoughts_and_tools.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_nothing_saved_names_the_users_home_or_a_key(notebook: Any) -> None:
    saved = str([cell.outputs for cell in code_cells(notebook)])
    assert str(Path.home()) not in saved
    assert "writes this to ~/" in saved
    assert "Bearer $VLLM_API_KEY" in saved
