"""Strict notebook tests see what a streamed cell shows in the end, and only that."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

CONFTEST = Path(__file__).parents[2] / "notebooks" / "conftest.py"
STREAMING = """\
from IPython.display import Markdown, display
handle = display(Markdown("The"), display_id=True)
for text in ("The sky", "The sky is blue."):
    handle.update(Markdown(text))"""


STORED = {"same": "The sky is blue.", "first_state": "The", "other_end": "The sky is green."}
"""What each notebook's streamed cell was saved as showing."""


@pytest.fixture(scope="module")
def nbval(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Strict nbval on the three notebooks."""
    folder = tmp_path_factory.mktemp("streamed")
    for name, stored in STORED.items():
        data = {"text/markdown": stored, "text/plain": "<IPython.core.display.Markdown object>"}
        shown = nbformat.v4.new_output("display_data", data)
        cell = nbformat.v4.new_code_cell(STREAMING, execution_count=1, outputs=[shown])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    options = ["-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:langsmith_plugin"]
    command = [sys.executable, "-m", "pytest", *options, "--nbval", "--nbval-current-env", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)


def test_a_streamed_cell_is_compared_by_what_it_shows_in_the_end(nbval: subprocess.CompletedProcess[str]) -> None:
    assert re.search(r"PASSED same\.ipynb::Cell 0", nbval.stdout), nbval.stdout


@pytest.mark.parametrize("name", ["first_state", "other_end"])
def test_a_streamed_cell_that_ends_otherwise_fails(nbval: subprocess.CompletedProcess[str], name: str) -> None:
    assert nbval.returncode == 1
    assert re.search(rf"FAILED {name}\.ipynb::Cell 0", nbval.stdout), nbval.stdout
    assert "The sky is blue." in nbval.stdout
