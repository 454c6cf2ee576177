"""The notebooks of this project in JupyterLab: the quickstart run, each one opened."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.conftest import PATIENCE, ROOT, Lab, Notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ERRORS = (
    '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"], .jp-RenderedText[data-mime-type*=stderr]'
)


def test_the_quickstart_runs(lab: Lab, open_notebook: Callable[[str], Notebook], smollm2_gguf: Path) -> None:
    from playwright.sync_api import expect

    source = ROOT / "notebooks" / "quickstart.ipynb"
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, lab.root / "quickstart.ipynb")
    opened = open_notebook("quickstart.ipynb")
    opened.run_all()
    last = sum(cell.cell_type == "code" for cell in notebook.cells) - 1
    opened.page.wait_for_function(
        "last => { const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter("
        "cell => cell.model.type === 'code'); return cells[last].model.executionCount !== null; }",
        arg=last,
        timeout=4 * PATIENCE,
    )
    expect(opened.page.locator(ERRORS)).to_have_count(0)
    opened.shot("quickstart")


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_without_error_outputs(lab: Lab, page: Any, source: Path) -> None:
    from playwright.sync_api import expect

    shutil.copy(source, lab.root / f"opened-{source.name}")
    page.goto(f"{lab.url}/doc/tree/opened-{source.name}?token={lab.token}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    saved = nbformat.read(source, as_version=4)
    allowed = sum("raises-exception" in cell.metadata.get("tags", ()) for cell in saved.cells)
    shown = sum(
        output.output_type == "error" for cell in saved.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert shown <= allowed, "a cell that is not tagged raises-exception has an error output"
    expect(page.locator(ERRORS).nth(allowed)).to_have_count(0)
