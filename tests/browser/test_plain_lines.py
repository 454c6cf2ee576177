"""What load, serve, plan and status show to people, and vllm-metal's line folded away for those who look."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import Lab, Notebook
from tests.browser.test_lab import FLAGS, expect


def test_lines_for_people_come_first_and_the_log_line_is_a_click_away(
    open_notebook: Callable[[str], Notebook], lab: Lab, script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("plain", "Hello.")
    cells = [
        "%load_ext vm_magic\nfrom tests.scripted_model import install; install()",
        f"%vllm_metal serve {folder} --port 0 {FLAGS}",
        "%vllm_metal plan",
        "%vllm_metal status",
        f"%vllm_metal load {folder} --max-model-len 999999",
    ]
    notebook = open_notebook(lab.write("plain.ipynb", cells))
    notebook.run_all()
    notebook.wait_run(4)
    load: Any = notebook.output(1)
    for number, first in ((1, "loaded in"), (2, "Fits: 3,000 tokens"), (3, "in use of")):
        output = notebook.output(number)
        expect(output).to_contain_text(first)
        line = output.locator("details code", has_text="num_blocks=").first
        expect(line).to_be_hidden()
        notebook.shot(f"plain-{number}", output)
        output.locator("summary", has_text="log line").first.click()
        expect(line).to_be_visible()
        assert line.inner_text().startswith("metal_limit=")
    expect(load).to_contain_text("Room for")
    expect(load.locator("code", has_text="/v1").first).to_contain_text("http://127.0.0.1:")
    expect(notebook.output(4)).to_contain_text("not loaded with these flags")
    expect(notebook.output(4)).to_contain_text("stays loaded")
    notebook.shot("plain-open", load)
    notebook.shot("plain-error", notebook.output(4))
