"""The panel in JupyterLab beside what test_lab.py steers: texts that copy, narrow windows, a saved notebook."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import PATIENCE, Lab, Notebook, measured, wait_until
from tests.browser.test_lab import COUNTING, FLAGS, LOAD, PanelPage, expect

NARROW = (560, 400)
"""Widths of a window in which the panel was hard to use."""
BEYOND_THE_PANEL = """element => {
    const [own, panel] = [element, element.closest('.vm-panel')].map(one => one.getBoundingClientRect().right);
    return own > panel + 1 ? element.className || element.tagName : '';
}"""
"""What an element that leaves the panel on the right is, else nothing."""


@pytest.fixture
def opened(lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]) -> Any:
    """Opens a notebook with a model, whose cells have run."""

    def make(name: str, *cells: str) -> Notebook:
        folder = script_folder(name, COUNTING)
        lab.write(f"{name}.ipynb", [LOAD.format(folder=folder, flags=FLAGS), *cells])
        notebook = open_notebook(f"{name}.ipynb")
        notebook.run_all()
        notebook.wait_run(len(cells))
        return notebook

    return make


def clipboard(page: Any) -> str:
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


def test_texts_are_copied_with_and_without_the_clipboards_leave_and_narrow_windows_do(opened: Any) -> None:
    notebook = opened("copying", "server = %vllm_metal serve --port 0\n%vllm_metal panel")
    page = notebook.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel = PanelPage(page)
    panel.tab("Server")
    address = panel.root.locator('[data-name="base_url"]').inner_text()
    panel.button("copy base_url").click()
    expect(panel.button("copy base_url")).to_have_text("Copied", timeout=PATIENCE)
    assert clipboard(page) == address
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", address)
    assert panel.button("copy api_key").count() == 0
    notebook.shot("panel-server", panel.root)
    panel.root.get_by_text("Show key", exact=True).click()
    panel.button("copy api_key").click()
    wait_until(lambda: clipboard(page).startswith("sk-"), "the key is copied")
    key = clipboard(page)
    panel.root.get_by_label("client").select_option("curl")
    panel.button("copy the curl text").click()
    wait_until(lambda: clipboard(page).startswith("curl "), "the snippet is copied")
    assert f"Bearer {key}" in clipboard(page)
    assert clipboard(page).count("\n") == panel.root.locator("pre").inner_text().count("\n")
    # where a page may not write to the clipboard, as on another host without HTTPS
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    panel.button("copy model").click()
    expect(panel.button("copy model")).to_have_text(re.compile("Copied|Press Ctrl"), timeout=PATIENCE)
    assert page.evaluate("() => getSelection().toString()") == "scripted"
    _check_narrow(notebook, panel)


def _check_narrow(notebook: Notebook, panel: PanelPage) -> None:
    """Every slider can be moved, and nothing is cut."""
    page = notebook.page
    for width in NARROW:
        page.set_viewport_size({"width": width, "height": 1000})
        wait_until(lambda width=width: panel.width() < width, "the panel gets narrow")
        for tab in ("Activity", "Sampling", "Memory", "Server"):
            panel.tab(tab)
            notebook.shot(f"panel-{tab.lower()}-{width}", panel.root)
            wait_until(lambda: not any(measured(panel.root, "*", BEYOND_THE_PANEL)), f"all of {tab} fits {width}")
        panel.tab("Sampling")
        tracks = measured(panel.root, ".slider, .noUi-target")
        assert len(tracks) >= 7
        assert min(track["width"] for track in tracks) >= 120, width
        panel.press("top_p", "ArrowLeft")


def test_it_tells_the_devices_share_and_a_saved_notebook_shows_its_picture_without_a_kernel(
    opened: Any, lab: Lab
) -> None:
    notebook = opened("saved", "%vllm_metal panel", "%vllm_metal chat --max-tokens 40 Count!")
    page, panel = notebook.page, PanelPage(notebook.page)
    panel.button("Measure").click()
    expect(panel.root.get_by_text(re.compile(r"\d+% of what the memory's speed allows"))).to_be_visible(
        timeout=PATIENCE
    )
    expect(panel.button("Measure")).to_be_hidden()
    panel.button("Why?").click()
    expect(panel.root.get_by_text("measured on this device").first).to_be_visible(timeout=PATIENCE)
    notebook.shot("panel-speed", panel.root)
    still = page.locator("[class^=vm-still]")
    expect(still).to_contain_text("peak", timeout=PATIENCE)  # the picture of after the request
    expect(still).to_be_hidden()
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")
    wait_until(lambda: "peak " in (lab.root / "saved.ipynb").read_text(), "the notebook is saved")
    lab.end_kernels()
    page.goto(f"{lab.url}/doc/tree/saved.ipynb?token={lab.token}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    expect(still).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Error displaying widget")).to_have_count(1, timeout=PATIENCE)
    expect(page.get_by_text("Error displaying widget")).to_be_hidden()
    notebook.shot("panel-saved")
