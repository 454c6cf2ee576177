"""A recorded reply survives saving in JupyterLab and is repeated from the file; choices as bars."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import Lab, Notebook
from tests.browser.test_chat_in_lab import run_cells
from tests.browser.test_lab import FLAGS, LOAD, expect, wait_until


def test_a_record_is_saved_with_its_cell_and_a_rerun_says_what_differs(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("recorded", "The capital of France is **Paris**, on the Seine.")
    cells = [LOAD.format(folder=folder, flags=FLAGS), "%%chat --record\nWhat is the capital of France?"]
    notebook = run_cells(lab, open_notebook, "recorded.ipynb", cells)
    expect(notebook.output(1).locator("strong", has_text="Paris")).to_be_visible()
    file = lab.root / "recorded.ipynb"
    notebook.command("docmanager:save")

    def saved() -> Any:
        try:
            outputs = json.loads(file.read_text())["cells"][1]["outputs"]
        except ValueError:  # it is being written
            return None
        return outputs and outputs[0]["metadata"].get("vm_magic")

    wait_until(lambda: bool(saved()), "the record is in the file")
    assert len(saved()["records"]) == 1
    assert str(lab.root) not in json.dumps(saved())
    changed = json.loads(file.read_text())
    theirs = copy.deepcopy(saved()["records"][0])
    theirs["reply"] |= {"text": "The capital of France is Lyon, on the Rhône.", "token_ids": None}
    theirs["versions"]["mlx"] = "0.31.0"
    theirs["engine"]["device"] = "Apple M3 Max (metal)"
    theirs["sampling"]["temperature"] = 0.7
    changed["cells"][1]["outputs"][0]["metadata"]["vm_magic"]["records"] = [theirs]
    (lab.root / "theirs.ipynb").write_text(json.dumps(changed))
    second = run_cells(
        lab,
        open_notebook,
        "again.ipynb",
        [
            LOAD.format(folder=folder, flags=FLAGS),
            "%vllm_metal rerun recorded.ipynb",
            "%vllm_metal rerun theirs.ipynb",
            "%vllm_metal rerun theirs.ipynb --all",
        ],
    )
    expect(second.output(1)).to_contain_text("the same 1")
    expect(second.output(1)).to_contain_text("Nothing differs in how it was made.")
    expect(second.output(2)).to_contain_text("Lyon, on the Rhône")
    expect(second.output(2).get_by_role("cell", name="Apple M3 Max (metal)")).to_be_visible()
    expect(second.output(3)).to_contain_text("0 of 1 replies are the same")
    for number, name in ((1, "rerun-same"), (2, "rerun"), (3, "rerun-all")):
        second.cell(number).scroll_into_view_if_needed()
        second.shot(name, second.cell(number))


def test_choices_have_bars(lab: Lab, open_notebook: Callable[[str], Notebook]) -> None:
    cells = [
        "%load_ext vm_magic\n%vllm_metal load smollm2 --max-model-len 1024",
        'review = ["I love this film.", "What a waste of time.", "It was fine, I guess."]',
        "%%vllm_metal grid --over review --choices positive,negative,neutral\n"
        "Is this review positive, negative or neutral? Answer with one word.\n\n{{ review }}",
    ]
    notebook = open_notebook(lab.write("choices.ipynb", cells))
    notebook.run_all()
    for number in range(3):  # each has its time
        notebook.wait_run(number)
    expect(notebook.output(2)).to_contain_text("3 prompts done · 3 choices")
    expect(notebook.output(2).get_by_role("cell", name="What a waste of time.")).to_be_visible()
    notebook.cell(2).scroll_into_view_if_needed()
    for theme in ("Dark", "Light"):
        change = f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})"
        notebook.page.evaluate(f"() => {change}")
        light = str(theme == "Light").lower()
        expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", light)
        notebook.page.locator("#jupyterlab-splash").wait_for(state="detached")
        notebook.shot(f"choices-{theme.lower()}", notebook.cell(2))
