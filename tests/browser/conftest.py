"""JupyterLab in headless Chromium, with notebooks that load models which say what a test wrote.

Skipped where chromium or playwright is missing. Screenshots go to ``test-artefacts/`` in the checkout.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.scripted_model import write_scripted_model

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = ROOT / "test-artefacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000
"""Milliseconds that anything on a page may take."""


BOX = "element => element.getBoundingClientRect().toJSON()"
"""Where an element is: x, y, width, height; left, right, top, bottom."""


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not true():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.05)


def measured(root: Any, selector: str, look: str = BOX) -> list[Any]:
    """What ``look``, a function in JavaScript, gives for each visible element below ``root`` that fits ``selector``.

    A live panel draws its elements anew: one that was found may be gone when it is measured. So all are found and
    measured at one moment, again and again until there is one; where ``look`` gives null, it counts as not there.
    """
    found: list[Any] = []

    def there() -> bool:
        found[:] = root.evaluate(
            f"(root, selector) => [...root.querySelectorAll(selector)].filter(element => element.offsetParent)"
            f".map({look}).filter(one => one !== null)",
            selector,
        )
        return bool(found)

    wait_until(there, f"{selector} is there")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("browser")
            item.add_marker(pytest.mark.timeout(300))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Lets fixtures know that their test failed."""
    report = yield
    if report.when == "call" and report.failed:
        item.failed = True
    return report


@dataclass
class Lab:
    """A running JupyterLab. ``root`` is where its notebooks are."""

    root: Path
    url: str
    token: str

    def write(self, name: str, cells: list[str]) -> str:
        """A notebook with ``cells``; gives its name."""
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(notebook, self.root / name)
        return name

    def request(self, path: str, method: str = "GET") -> Any:
        """Jupyter's REST API."""
        headers = {"Authorization": f"token {self.token}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}{path}", method=method, headers=headers), timeout=60
        ) as reply:
            return json.loads(reply.read() or b"null")

    def end_kernels(self) -> None:
        """Each notebook begins with a kernel of its own."""
        for kernel in self.request("/api/kernels"):
            self.request(f"/api/kernels/{kernel['id']}", "DELETE")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    env = {
        **os.environ,
        **{f"JUPYTER_{name}": str(home / folder) for name, folder in folders.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    }
    env.pop("PYTEST_CURRENT_TEST", None)
    flags = [
        "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--ip=127.0.0.1",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.terminals_enabled=False",
    ]  # fmt: skip
    with (home / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *flags],
            env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        running = Lab(root, f"http://127.0.0.1:{port}", token)
        try:
            _wait_for(process, running, home / "lab.log")
            yield running
            running.end_kernels()
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", lab: Lab, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            lab.request("/api/status")
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"JupyterLab did not start: {log.read_text()}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def browser(lab: Lab) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, device_scale_factor=1)
    context.set_default_timeout(PATIENCE)
    shown = context.new_page()
    yield shown
    failed = getattr(request.node, "failed", False)
    if failed:
        ARTEFACTS.mkdir(exist_ok=True)
        shown.screenshot(path=str(ARTEFACTS / f"failed-{request.node.name}.png"))
    context.close()
    lab.end_kernels()


@dataclass
class Notebook:
    """A notebook open in the browser. Cells are counted from 0."""

    page: Any
    lab: Lab

    def run_all(self) -> None:
        """Run all cells; does not wait."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def run(self, number: int) -> None:
        """Run one cell; does not wait."""
        self.page.evaluate(
            "async number => { const panel = window.jupyterapp.shell.currentWidget;"
            " panel.content.activeCellIndex = number;"
            " panel.content.deselectAll();"
            " window.jupyterapp.commands.execute('notebook:run-cell'); }",
            number,
        )

    def command(self, name: str) -> None:
        """Any of JupyterLab's commands."""
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)

    def cell(self, number: int) -> Any:
        """A code cell."""
        return self.page.locator(".jp-CodeCell").nth(number)

    def output(self, number: int) -> Any:
        """What a cell put out."""
        return self.cell(number).locator(".jp-OutputArea").first

    def wait_run(self, number: int) -> None:
        """Until a cell has its number, which is when it ended."""
        from playwright.sync_api import expect

        expect(self.cell(number).locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=PATIENCE)

    def shot(self, name: str, locator: Any = None) -> Path:
        """A screenshot in ``test-artefacts/``."""
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        (self.page if locator is None else locator).screenshot(path=str(path))
        return path


@pytest.fixture
def open_notebook(page: Any, lab: Lab) -> Callable[[str], Notebook]:
    def open_it(name: str) -> Notebook:
        page.goto(f"{lab.url}/doc/tree/{name}?token={lab.token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        return Notebook(page, lab)

    return open_it


@pytest.fixture(scope="session")
def script_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model folder that says a text (see tests/scripted_model.py)."""

    def make(name: str, *texts: str, **options: Any) -> Path:
        return write_scripted_model(tmp_path_factory.mktemp("script") / name, smollm2_gguf, texts, **options)

    return make
