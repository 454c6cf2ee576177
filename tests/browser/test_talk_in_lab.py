"""How a person talks to the model in JupyterLab: cells of plain text, %chat, code that goes into the next cell."""

from collections.abc import Callable
from pathlib import Path

from tests.browser.conftest import Lab, Notebook
from tests.browser.test_lab import FLAGS, LOAD, expect

PROGRAM = 'Here is a program:\n\n```python\nfor i in range(3):\n    print(f"row {i}")\n```\n\nIt prints three rows.'
CITY = '{"name": "Ulm", "size": 3}'


def test_plain_cells_are_messages_and_code_goes_into_a_cell(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("talk", PROGRAM, CITY, "It is **Paris**.")
    cells = [
        LOAD.format(folder=folder, flags=FLAGS) + "\n%vllm_metal talk -t 0 --new",
        "What is the capital of France? <|script_2|>",
        "x = 6 * 7\nx",
        "for the win",
        "%chat -t 0 -n What is the capital of France? <|script_2|> ?",
        '%chat -t 0 -n --json {"type": "object"} A city <|script_1|>',
        "%llm Hello",
        "%%chat -n -t 0 -f code --to-cell\nThree rows",
    ]
    notebook = open_notebook(lab.write("talk.ipynb", cells))
    for number in range(len(cells)):
        notebook.run(number)
        notebook.wait_run(number)
    expect(notebook.output(1)).to_contain_text("» to scripted")
    expect(notebook.output(1).locator("strong", has_text="Paris")).to_be_visible()
    expect(notebook.output(2)).to_contain_text("42")
    expect(notebook.output(3)).to_contain_text("talk is on, but this starts like Python; %%chat sends it")
    expect(notebook.output(4).locator("strong", has_text="Paris")).to_be_visible()
    expect(notebook.output(5).locator("pre", has_text='"name": "Ulm"')).to_be_visible()
    expect(notebook.output(6)).to_contain_text("did you mean %chat TEXT?")
    expect(notebook.output(7).locator("pre", has_text="for i in range(3)")).to_be_visible()
    assert "Here is a program" not in notebook.output(7).inner_text()
    made = notebook.cell(8)
    expect(made).to_contain_text('print(f"row {i}")')
    assert made.locator(".jp-OutputArea-output").count() == 0
    notebook.run(8)
    expect(notebook.output(8)).to_contain_text("row 2")
    notebook.cell(1).scroll_into_view_if_needed()
    notebook.shot("talk")
    made.scroll_into_view_if_needed()
    notebook.shot("to-cell")
