"""Strict notebook tests see what a streamed cell shows in the end, and only that."""

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


def run_nbval(folder: Path, stored: str) -> subprocess.CompletedProcess[str]:
    """Strict nbval on a notebook whose streamed cell was saved as showing ``stored``."""
    data = {"text/markdown": stored, "text/plain": "<IPython.core.display.Markdown object>"}
    shown = nbformat.v4.new_output("display_data", data)
    cell = nbformat.v4.new_code_cell(STREAMING, execution_count=1, outputs=[shown])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "streamed.ipynb")
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_a_streamed_cell_is_compared_by_what_it_shows_in_the_end(tmp_path: Path) -> None:
    result = run_nbval(tmp_path, "The sky is blue.")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


@pytest.mark.parametrize("stored", ["The", "The sky is green."])
def test_a_streamed_cell_that_ends_otherwise_fails(tmp_path: Path, stored: str) -> None:
    result = run_nbval(tmp_path, stored)
    assert result.returncode == 1
    assert "The sky is blue." in result.stdout
