"""What a message takes along and replies side by side, as JupyterLab shows them: light, dark, narrow, saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from tests.browser.conftest import PATIENCE, Lab, Notebook, measured, wait_until
from tests.browser.test_lab import FLAGS, LOAD, expect

LIST = "**Three** towns:\n\n1. Ulm\n2. Bonn\n\n   ```python\n   price = 5\n   ```\n3. Köln: $5 and $6"
UNCLOSED = "<b>bold</b></div></div><script>document.title = 'hacked'</script>\n\n- one\n\n```\n</div> code"
TABLE = "| town | rain |\n|---|---|\n| Ulm | 4 mm |\n\n> a quote without an end"
DATA = '''
import pandas
df = pandas.DataFrame({"town": ["Ulm", "Bonn", None], "rain": [4.5, None, 2.0]})
def share(town):
    """Part of all rain."""
    return df.set_index("town").rain[town] / df.rain.sum()
share("Ulm")
'''
COMPARE = (
    '%%chat --max-tokens 60 --compare "system=List <|script_0|>" --compare "system=Hostile <|script_1|>" '
    '--compare "system=Table <|script_2|>"\nHow will the weather be?'
)


def save(page: Any) -> None:
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")


COLUMN = ".jp-RenderedMarkdown div[style*='1 1 280px']"


def columns(output: Any) -> Any:
    return output.locator(COLUMN)


def num_lines(output: Any) -> int:
    """In how many lines the three columns stand."""
    boxes = measured(output, COLUMN)
    assert len(boxes) == 3
    return len({box["y"] for box in boxes})


def test_variants_stand_side_by_side_and_one_is_kept_with_a_click(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("compare", LIST, UNCLOSED, TABLE)
    grid = "%%vllm_metal grid -t 0,0.7 --max-tokens 8\nHow will the weather be?"
    cells = [LOAD.format(folder=folder, flags=FLAGS), COMPARE, "%vllm_metal history", grid, "%vllm_metal set"]
    notebook = open_notebook(lab.write("compare.ipynb", cells))
    for number in (0, 1):
        notebook.run(number)
        notebook.wait_run(number)
    page, output = notebook.page, notebook.output(1)
    expect(columns(output)).to_have_count(3)
    expect(output.locator("td", has_text="4 mm")).to_be_visible()
    expect(output.locator("code", has_text="price = 5")).to_be_visible()
    expect(output).to_contain_text("</div></div><script>")
    assert output.locator(".jp-RenderedMarkdown script").count() == 0
    wait_until(lambda: num_lines(output) == 1, "they stand side by side")
    notebook.shot("compare", notebook.cell(1))
    page.set_viewport_size({"width": 560, "height": 1000})
    wait_until(lambda: num_lines(output) == 3, "they are stacked")
    notebook.shot("compare-narrow", notebook.cell(1))
    page.set_viewport_size({"width": 1280, "height": 1000})
    output.get_by_role("button", name="Keep system=Table").click()
    expect(output).to_contain_text("Kept in the conversation: system=Table")
    notebook.run(2)
    notebook.wait_run(2)
    expect(notebook.output(2).locator("td", has_text="4 mm")).to_be_visible()
    expect(notebook.output(2)).not_to_contain_text("towns")
    notebook.run(3)
    notebook.output(3).get_by_role("button", name="Use temperature=0.7").click()
    expect(notebook.output(3)).to_contain_text("Set for all requests: temperature=0.7")
    notebook.shot("grid-buttons", notebook.cell(3))
    notebook.run(4)
    expect(notebook.output(4)).to_contain_text("temperature=0.7")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    expect(page.locator("body[data-jp-theme-light='false']")).to_have_count(1, timeout=PATIENCE)
    notebook.cell(1).scroll_into_view_if_needed()
    notebook.shot("compare-dark", notebook.cell(1))
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    save(page)
    wait_until(lambda: "Kept in the conversation" in (lab.root / "compare.ipynb").read_text(), "it is saved")
    lab.end_kernels()
    page.goto(f"{lab.url}/doc/tree/compare.ipynb?token={lab.token}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    expect(notebook.output(1)).to_contain_text("Kept in the conversation", timeout=PATIENCE)
    expect(columns(notebook.output(1))).to_have_count(3)
    gone = page.get_by_text("Error displaying widget")
    expect(gone).to_have_count(2, timeout=PATIENCE)
    for place in range(2):
        expect(gone.nth(place)).to_be_hidden()
    notebook.shot("compare-saved", notebook.cell(1))
    _check_untrusted(lab, notebook)


def _check_untrusted(lab: Lab, notebook: Notebook) -> None:
    """Another's notebook: JupyterLab cleans what it shows."""
    saved = nbformat.read(lab.root / "compare.ipynb", as_version=4)
    saved.cells[0].source += "\n# another's"
    nbformat.write(saved, lab.root / "others.ipynb")
    notebook.page.goto(f"{lab.url}/doc/tree/others.ipynb?token={lab.token}")
    notebook.page.wait_for_selector(".jp-Notebook .jp-Cell")
    output = notebook.output(1)
    expect(output.locator("td", has_text="4 mm")).to_be_visible(timeout=PATIENCE)
    expect(columns(output)).to_have_count(3)
    wait_until(lambda: num_lines(output) == 1, "they stand side by side")
    notebook.shot("compare-untrusted", notebook.cell(1))


def test_what_a_message_took_along_is_a_click_away(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("context", "The sum is right, the town is not.")
    cells = [
        LOAD.format(folder=folder, flags=FLAGS) + DATA,
        "%%chat --error",
        "%%chat --new --cells 1\nWhat is the share of Ulm?",
        "%%chat --new\nWhat is missing here?\n\n{{ df }}",
    ]
    cells[0] = cells[0].replace('share("Ulm")', 'print("<b>loaded</b> ```")\nshare("Paris")')
    notebook = open_notebook(lab.write("context.ipynb", cells))
    for number in range(len(cells)):
        notebook.run(number)
        notebook.wait_run(number)
    for number, name in ((1, "the last error"), (2, "In [1]"), (3, "pandas DataFrame: 3 rows × 2 columns")):
        output: Any = notebook.output(number)
        expect(output.locator("summary")).to_contain_text(f"sent with: {name} · ")
        expect(output.locator("pre")).to_be_hidden()
        expect(output).to_contain_text("The sum is right")
        output.locator("summary").click()
        expect(output.locator("pre").first).to_be_visible()
        notebook.shot(f"context-{number}", notebook.cell(number))
    expect(notebook.output(1).locator("pre")).to_contain_text("KeyError: 'Paris'")
    expect(notebook.output(2).locator("pre")).to_contain_text("<b>loaded</b> ```")
    assert notebook.output(2).locator("pre b").count() == 0
    expect(notebook.output(3).locator("pre")).to_contain_text("1 missing")
