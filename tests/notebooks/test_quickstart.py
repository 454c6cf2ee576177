"""The quickstart's snippet for the ``openai`` package works, and says what the cell beside it says."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from tests.notebooks.test_saved_outputs import code_cells

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(QUICKSTART, as_version=4)


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
