"""JupyterLab as a user has it: notebooks opened and run, the panel's sliders moved, its buttons pressed."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipykernel
import nbformat
import pytest

from tests.browser.conftest import PATIENCE, ROOT, Lab, Notebook, measured, wait_until
from tests.browser.http_stream import HttpStream
from tests.scripted_model import SUFFIX

COUNTING = " ".join(str(number) for number in range(1200))
PROMPT = f"Count!{SUFFIX}"
LOAD = "%load_ext vm_magic\nfrom tests.scripted_model import install; install()\n%vllm_metal load {folder} {flags}"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KERNEL_LISTENS = ipykernel.version_info >= (7,)
"""Whether a widget's events reach the kernel while a cell runs: from ipykernel 7 on, through subshells."""
ROW = """row => {
    const button = row.closest('.widget-hbox')?.querySelector('button');
    if (!button?.offsetParent) return null;
    button.scrollIntoView({block: 'nearest'});
    const [place, beside] = [row.getBoundingClientRect(), button.getBoundingClientRect()];
    const isCut = element => element.scrollWidth > element.clientWidth;
    return {cut: [...row.children].filter(isCut).map(cell => cell.textContent), right: place.right,
            button: button.textContent, button_cut: isCut(button), button_left: beside.left,
            button_right: beside.right};
}"""
"""A request's row and the button beside it."""
FLAGS = "--max-model-len 3000 --gpu-memory-utilization 0.02 --served-model-name scripted"


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as playwright_expect

    return playwright_expect(locator)


class PanelPage:
    """The panel's parts on a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.root = page.locator(".vm-panel").first
        self.head = self.root.locator(".vmp-head")
        self.requests = self.root.locator(".vmp-req[data-request]:visible")

    def tab(self, name: str) -> None:
        self.root.locator(".lm-TabBar-tab", has_text=name).click()

    def slider(self, name: str) -> Any:
        """The handle of a slider: Home and End, arrows."""
        return self.root.locator(".widget-hslider", has_text=name).locator(".noUi-handle")

    def readout(self, name: str) -> Any:
        """What a slider shows beside it."""
        return self.root.locator(".widget-hslider", has_text=name).locator(".widget-readout")

    def press(self, name: str, key: str, shown: str | None = None) -> None:
        """Press ``key`` on a slider until it shows ``shown`` (None: something else), as a person would.

        A slider that is still being drawn anew after its range changed takes no key.
        """
        readout = self.readout(name)
        before = readout.inner_text()

        def moved() -> bool:
            now = readout.inner_text()
            if now == shown or (shown is None and now != before):
                return True
            self.slider(name).press(key)
            return False

        wait_until(moved, f"{name} moves")

    def figure(self, name: str) -> Any:
        """A figure of the memory plan's identity."""
        return self.root.locator(f'[data-name="{name}"] .vmp-v')

    def button(self, name: str) -> Any:
        return self.root.get_by_role("button", name=name, exact=True)

    def width(self) -> float:
        return float(self.root.evaluate("root => root.getBoundingClientRect().width"))

    def check_rows(self, width: int) -> None:
        """In a window of ``width`` the first row is scrolled to: no column is cut, and its button is right of it."""
        row = measured(self.root, ".vmp-req[data-request]", ROW)[0]
        assert row["button"] == "Cancel"
        assert row["cut"] == []
        assert row["right"] <= row["button_left"]
        assert row["button_right"] <= width
        assert not row["button_cut"]


@pytest.fixture
def scripted(lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]) -> Any:
    """Opens a notebook whose first cell loads a model that counts, slowly."""

    def make(name: str, *cells: str, step_seconds: float = 0.05) -> Notebook:
        folder = script_folder(name, COUNTING, step_seconds=step_seconds)
        lab.write(f"{name}.ipynb", [LOAD.format(folder=folder, flags=FLAGS), *cells])
        return open_notebook(f"{name}.ipynb")

    return make


@pytest.fixture
def streams() -> Iterator[list[HttpStream]]:
    made: list[HttpStream] = []
    yield made
    for stream in made:
        stream.close()


def port_of(notebook: Notebook, number: int) -> tuple[str, str]:
    """(base URL, key) that a cell printed."""
    expect(notebook.output(number)).to_contain_text("sk-", timeout=PATIENCE)
    found = re.search(r"(http://\S+/v1) (sk-\S+)", notebook.output(number).inner_text())
    assert found is not None
    return found[1], found[2]


def test_the_panel_steers_requests_that_run(scripted: Any, streams: list[HttpStream]) -> None:
    notebook = scripted(
        "steering",
        "server = %vllm_metal serve --port 0\nprint(server.base_url, server.api_key)",
        "%vllm_metal set temperature=1000 ignore_eos=true\n%vllm_metal panel",
    )
    notebook.run_all()
    panel = PanelPage(notebook.page)
    panel.root.wait_for()
    url, key = port_of(notebook, 1)
    streams += [HttpStream(url, key, PROMPT, max_tokens=2900) for _ in range(2)]
    expect(panel.requests).to_have_count(2, timeout=PATIENCE)
    expect(panel.requests.first).to_contain_text("tok/s", timeout=PATIENCE)
    panel.root.locator('.vmp-blocks [data-kind="1"]').first.wait_for()
    notebook.shot("panel-activity", panel.root)

    # in a narrow window every column and the button can be read
    notebook.page.set_viewport_size({"width": 720, "height": 1000})
    panel.check_rows(720)
    notebook.shot("panel-activity-narrow", panel.root)
    notebook.page.set_viewport_size({"width": 1280, "height": 1000})

    # lower the temperature of the streams under way
    wait_until(lambda: len(streams[0].text) > 30, "words of the first stream")
    assert "10 11 12" not in streams[0].text
    panel.tab("Sampling")
    panel.press("temperature", "Home", "0")
    wait_until(lambda: re.search(r"(\d+) \d+ \d+ \d+ \d+", streams[0].text) is not None, "the script, in order")
    notebook.shot("panel-sampling", panel.root)

    # cancel one of them; the other goes on
    panel.tab("Activity")
    expect(panel.requests).to_have_count(2, timeout=PATIENCE)
    expect(panel.requests.first).to_contain_text(re.compile(r"s\s*0$"), timeout=PATIENCE)
    panel.button("Cancel").last.click()
    wait_until(lambda: any(stream.finished for stream in streams), "the cancelled stream ends")
    expect(panel.requests).to_have_count(1, timeout=PATIENCE)
    cancelled, other = sorted(streams, key=lambda stream: not stream.finished)
    assert cancelled.error is not None
    assert "cancelled" in cancelled.error
    assert not other.finished


def test_the_sliders_show_what_was_set_and_only_a_hand_changes_it(scripted: Any) -> None:
    notebook = scripted(
        "echo",
        "%vllm_metal panel",
        "%vllm_metal set temperature=0.333 top_p=0.123 top_k=250 repetition_penalty=3.3",
        "%vllm_metal set temperature=3.3",
        "%vllm_metal set preset=qwen-coding",
        "%vllm_metal set",
    )
    notebook.run(0)
    notebook.wait_run(0)
    notebook.run(1)
    panel = PanelPage(notebook.page)
    panel.root.wait_for()
    panel.tab("Sampling")
    panel.slider("temperature").wait_for()

    def set_and_shown(number: int, **shown: str) -> str:
        """What ``set`` tells after a cell's values stood on the page and a front end had the time to answer."""
        notebook.run(number)
        for name, value in shown.items():
            expect(panel.readout(name)).to_have_text(value, timeout=PATIENCE)
        notebook.page.wait_for_timeout(1500)
        before = notebook.cell(5).locator(".jp-InputPrompt").inner_text()
        notebook.run(5)
        expect(notebook.cell(5).locator(".jp-InputPrompt")).not_to_have_text(before, timeout=PATIENCE)
        notebook.wait_run(5)
        text: str = notebook.output(5).inner_text()
        return text

    told = set_and_shown(2, temperature="0.333", top_p="0.123", top_k="250", repetition_penalty="3.3")
    assert all(word in told for word in ("temperature=0.333", "top_p=0.123", "top_k=250", "repetition_penalty=3.3"))
    told = set_and_shown(3, temperature="3.3", top_p="0.123")
    assert "temperature=3.3" in told
    set_and_shown(4, temperature="0.6", top_p="0.95", top_k="20")
    row = panel.root.locator(".widget-hbox", has=panel.page.locator(".widget-hslider", has_text="top_p")).last
    expect(row).to_contain_text("preset qwen-coding")
    notebook.shot("panel-preset", panel.root)
    panel.press("top_p", "ArrowLeft", "0.94")
    expect(row).to_contain_text("set", timeout=PATIENCE)
    assert "top_p=0.94 " in set_and_shown(5, top_p="0.94") + " "
    panel.press("top_p", "ArrowRight", "0.95")
    assert "top_p=0.95 " in set_and_shown(5, top_p="0.95") + " "


def test_memory_is_planned_while_the_slider_moves_and_replanned_under_a_request(
    scripted: Any, streams: list[HttpStream]
) -> None:
    notebook = scripted(
        "memory",
        "server = %vllm_metal serve --port 0\nprint(server.base_url, server.api_key)",
        "%vllm_metal panel",
        "import vm_magic; print('blocks', vm_magic.current().stats().num_blocks)",
    )
    notebook.run_all()
    panel = PanelPage(notebook.page)
    url, key = port_of(notebook, 1)
    streams.append(HttpStream(url, key, PROMPT, max_tokens=2900, temperature=0))
    expect(panel.requests).to_have_count(1, timeout=PATIENCE)
    panel.tab("Memory")
    before = panel.figure("blocks").inner_text()
    plain = before.replace(",", "")
    expect(notebook.output(3)).to_contain_text(f"blocks {plain}", timeout=PATIENCE)
    panel.press("fraction", "ArrowRight")
    expect(panel.figure("blocks")).not_to_have_text(before, timeout=PATIENCE)
    planned = panel.figure("blocks").inner_text()
    assert int(planned.replace(",", "")) > int(plain)
    notebook.run(3)
    expect(notebook.output(3)).to_contain_text(f"blocks {plain}", timeout=PATIENCE)
    notebook.shot("panel-memory", panel.root)
    panel.button("Apply").click()
    expect(panel.root.get_by_role("status")).to_contain_text("Applied", timeout=PATIENCE)
    expect(panel.head).to_contain_text(f"of {planned} blocks", timeout=PATIENCE)
    text = len(streams[0].text)
    wait_until(lambda: len(streams[0].text) > text, "the request runs on")
    panel.root.locator(".widget-text", has_text="max_model_len").locator("input").fill("9999")
    expect(panel.root.get_by_role("alert")).to_contain_text("max_model_len", timeout=PATIENCE)
    notebook.command("apputils:toggle-header")
    notebook.page.evaluate(
        "() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    expect(notebook.page.locator("body[data-jp-theme-light='false']")).to_have_count(1, timeout=PATIENCE)
    notebook.shot("panel-memory-dark", panel.root)
    notebook.page.evaluate(
        "() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})"
    )


def test_in_a_streaming_cell_the_panel_moves_and_listens_and_stop_keeps_the_words(scripted: Any) -> None:
    notebook = scripted("stopping", "%vllm_metal panel", "%%chat -t 0\nCount!", "print('the next cell ran')")
    notebook.run_all()
    panel = PanelPage(notebook.page)
    expect(notebook.output(2)).to_contain_text("10 11 12", timeout=PATIENCE)
    expect(panel.requests).to_contain_text("notebook", timeout=PATIENCE)
    told = panel.requests.inner_text()
    expect(panel.requests).not_to_have_text(told, timeout=PATIENCE)
    if KERNEL_LISTENS:
        panel.tab("Sampling")
        panel.press("top_p", "ArrowLeft")
        row = panel.root.locator(".widget-hbox", has=panel.page.locator(".widget-hslider", has_text="top_p"))
        expect(row.last).to_contain_text("set", timeout=PATIENCE)
    expect(notebook.cell(2).locator(".jp-InputPrompt")).to_have_text("[*]:")
    notebook.page.locator('[data-jp-item-name="interrupt"] button, [data-jp-item-name="interrupt"]').first.click()
    expect(notebook.output(2)).to_contain_text("interrupted", timeout=PATIENCE)
    expect(notebook.output(2)).to_contain_text("0 1 2 3 4 5 6 7 8 9 10 11 12")
    expect(notebook.cell(3).locator(".jp-InputPrompt")).to_have_text("[ ]:", timeout=PATIENCE)
    assert notebook.output(3).inner_text() == ""
    notebook.shot("chat-stopped")


def errors_shown(page: Any) -> list[str]:
    """Error outputs of the notebook in front, but those of cells that are there to raise."""
    found: list[str] = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
            .filter(cell => cell.model.type === 'code')
            .filter(cell => !(cell.model.getMetadata('tags') || []).includes('raises-exception'))
            .flatMap(cell => cell.model.sharedModel.outputs)
            .filter(output => output.output_type === 'error' || output.name === 'stderr')
            .map(output => output.evalue || output.text)"""
    )
    return found


def test_the_quickstart_runs(lab: Lab, open_notebook: Callable[[str], Notebook], smollm2_gguf: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, lab.root / "quickstart.ipynb")
    opened = open_notebook("quickstart.ipynb")
    opened.run_all()
    opened.page.wait_for_function(
        "last => window.jupyterapp.shell.currentWidget.content.widgets"
        ".filter(cell => cell.model.type === 'code')[last].model.executionCount !== null",
        arg=len(code) - 1,
        timeout=4 * PATIENCE,
    )
    assert errors_shown(opened.page) == []
    opened.shot("quickstart")


def test_every_notebook_opens_without_an_error_output(lab: Lab, page: Any) -> None:
    page.goto(f"{lab.url}/lab?token={lab.token}&reset")
    page.locator(".jp-Launcher").wait_for()
    for source in NOTEBOOKS:
        shutil.copy(source, lab.root / f"opened-{source.name}")
        page.evaluate(
            "path => { window.jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook',"
            " kernelPreference: {shouldStart: false, canStart: false, autoStartDefault: false}}); }",
            f"opened-{source.name}",
        )
        front = page.locator(".jp-NotebookPanel:visible .jp-Notebook .jp-Cell").first
        page.locator(".lm-mod-current .lm-TabBar-tabLabel", has_text=f"opened-{source.name}").first.wait_for()
        front.wait_for()
        assert errors_shown(page) == [], source.name
    assert not lab.request("/api/kernels")
