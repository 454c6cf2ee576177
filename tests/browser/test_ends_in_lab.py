"""How a reply ended stands below it, in the same output, in JupyterLab."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import Lab, Notebook, measured
from tests.browser.test_chat_in_lab import run_cells
from tests.browser.test_lab import FLAGS, LOAD, expect


def test_why_a_reply_stopped_is_small_and_below_it(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("ends", "It **rains** in Köln, and it will rain tomorrow.")
    cells = [
        LOAD.format(folder=folder, flags=FLAGS),
        "%%chat -t 0 --max-tokens 7 --stats\nHow is the weather?",
        "print('printed')\n_.text",
        "%vllm_metal chat -t 0 --new --max-tokens 7 How is the weather?",
    ]
    notebook = run_cells(lab, open_notebook, "ends.ipynb", cells)
    output: Any = notebook.output(1)
    text, notes = output.locator("strong", has_text="rains"), output.locator("small")
    expect(notes).to_have_count(2)
    expect(notes.first).to_have_text("Stopped at max_tokens (7). Raise it with --max-tokens.")
    expect(notes.last).to_contain_text("7 tokens · ")
    expect(output.locator(".jp-OutputArea-child")).to_have_count(1)
    expect(text).to_have_count(1)
    (strong, *_), (note, *_) = measured(output, "strong"), measured(output, "small")
    assert note["y"] > strong["y"]
    assert note["height"] < strong["height"]
    expect(notebook.output(3).locator("small")).to_have_text("Stopped at max_tokens (7). Raise it with --max-tokens.")
    notebook.shot("ends-of-replies")
