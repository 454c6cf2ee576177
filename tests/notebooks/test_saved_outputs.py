"""All notebooks as files: outputs of one run, nothing of one machine or person in them, readable from top to bottom.

Their cells are run and compared by nbval, in the same pytest session (``notebooks`` is in ``testpaths``).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHANGES_EACH_RUN = re.compile(r"127\.0\.0\.1:\d+|tokens/s|memory in use|\d+\.\d+ s\b")
OF_ONE_MACHINE = re.compile(
    r"(?<![\w./~}])/(?:tmp|root|home|Users|work|usr|opt|private|var)/|\.local/lib|site-packages"
)
KEY = re.compile(r"\bsk-(?!example\b)[\w-]{8,}")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(request.param, as_version=4)


def test_the_outputs_are_those_of_one_run_from_top_to_bottom(notebook: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_a_heading_comes_first_and_prose_leads_up_to_code(notebook: Any) -> None:
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    kinds = " ".join(cell.cell_type for cell in notebook.cells)
    assert "code code code code" not in kinds


def test_no_cell_fails_not_even_to_show_an_error(notebook: Any) -> None:
    """papermill stops at an error whatever the cell's tags say: a cell that shows one catches it."""
    for cell in code_cells(notebook):
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.source
        assert "raises-exception" not in tags(cell)


def test_compared_outputs_hold_no_times_bytes_or_ports(notebook: Any) -> None:
    compared = [cell for cell in code_cells(notebook) if "nbval-ignore-output" not in tags(cell)]
    assert not [cell.source for cell in compared if CHANGES_EACH_RUN.search(json.dumps(cell.outputs))]
    assert compared


def test_nothing_names_a_folder_a_person_or_a_key(notebook: Any) -> None:
    text = json.dumps([[cell.source, cell.get("outputs")] for cell in notebook.cells])
    assert not OF_ONE_MACHINE.findall(text)
    assert not KEY.findall(text)
    assert str(Path.home()) not in text


def test_no_output_is_a_widget_that_is_gone(notebook: Any) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [one for one in outputs if "application/vnd.jupyter.widget-view+json" in one.get("data", {})]


def test_the_file_holds_no_more_metadata_than_its_kernel(notebook: Any) -> None:
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_whatever_a_notebook_imports_is_on_binder(notebook: Any) -> None:
    asked = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8")
    there = {*re.findall(r"^[a-z]+", asked, re.MULTILINE), "engine", "vm_magic", "stand_in", *sys.stdlib_module_names}
    code = "\n".join(cell.source for cell in code_cells(notebook) if not cell.source.startswith("%%"))
    imported = {names[0] or names[1] for names in re.findall(r"^\s*(?:import (\w+)|from (\w+))", code, re.MULTILINE)}
    assert imported <= {name.replace("-", "_") for name in there}
