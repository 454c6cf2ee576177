"""Where a cell's output is shown: what can update a display, what cannot, and what keeps it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.displaypub import DisplayPublisher
from IPython.utils.capture import capture_output

from tests.vm_magic import fakes
from tests.vm_magic.helpers import cell, line
from vm_magic.show.display_handle import can_update, open_handle
from vm_magic.show.front_end import front_end

SAID = " ".join(fakes.WORDS)
SESSION = "0123abcd-" + "0123456789abcdef01234567"


def asked(msg_id: str, *, allow_stdin: bool = True) -> SimpleNamespace:
    """A kernel's shell while it runs a request."""
    request = {"header": {"msg_id": msg_id}, "content": {"allow_stdin": allow_stdin}}
    return SimpleNamespace(display_pub=object(), parent_header=request)


@pytest.fixture
def process_called() -> Iterator[Any]:
    """Starts a process whose command line says what a test wants, and gives its id."""
    started = []

    def start(*words: str) -> int:
        code = "import sys; print(1, flush=True); sys.stdin.read()"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", code, *words], **pipes))
        started[-1].stdout.readline()
        return started[-1].pid

    yield start
    for process in started:
        process.communicate()


def test_a_terminal_prints(shell: Any) -> None:
    assert front_end(SimpleNamespace(display_pub=DisplayPublisher())) == "terminal"


def test_a_browser_and_what_runs_notebooks_update_displays(process_called: Any) -> None:
    pid = process_called("/usr/bin/jupyter-console")
    assert front_end(asked("7d4c1b1e-5a2b-4d7e-9a39-f3b8f2c41cdd")) == "notebook"  # JupyterLab's ids
    assert front_end(asked(f"{SESSION}_{pid}_3", allow_stdin=False)) == "notebook"  # nbclient, papermill, nbval
    assert front_end(asked(f"{SESSION}_{os.getpid()}_3")) == "notebook"  # some Python program
    assert front_end(SimpleNamespace(display_pub=object())) == "notebook"


@pytest.mark.parametrize("program", ["/usr/bin/jupyter-console", "jupyter-qtconsole", "/opt/jupyter-run", "spyder"])
def test_consoles_do_not(process_called: Any, program: str) -> None:
    shell = asked(f"{SESSION}_{process_called(program)}_3")
    assert front_end(shell) == "console"
    assert not can_update(shell)


def test_a_console_elsewhere_is_known_by_the_kernel_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    shell = asked(f"{SESSION}_{gone.pid}_3")
    monkeypatch.setattr("ipykernel.connect.get_connection_file", lambda: "/run/jupyter/kernel-4711.json")
    assert front_end(shell) == "console"
    monkeypatch.setattr("ipykernel.connect.get_connection_file", lambda: "/run/jupyter/kernel-7d4c1b1e-5a2b.json")
    assert front_end(shell) == "notebook"


def test_captured_output_holds_a_reply_once(loaded: fakes.FakeLLM, shell: Any) -> None:
    loaded.seconds = 0.05
    cell(shell, "capture kept", "%%chat\nhello")
    (output,) = shell.user_ns["kept"].outputs
    assert output.data["text/plain"] == SAID
    assert shell.display_pub.outputs == []
    shell.user_ns["kept"].show()
    assert shell.display_pub.outputs[-1]["data"]["text/markdown"] == SAID


def test_what_goes_on_behind_captured_output_ends_up_in_it(shell: Any) -> None:
    with capture_output() as kept:
        show = open_handle(shell, {"text/plain": "first"})
        print("between")
        open_handle(shell, {"text/plain": "another"})
    show({"text/plain": "last"})
    assert [output.data["text/plain"] for output in kept.outputs] == ["last", "another"]
    assert kept.stdout == "between\n"
    assert shell.display_pub.outputs == []


def test_captured_text_alone_leaves_displays_where_they_are(loaded: fakes.FakeLLM, shell: Any) -> None:
    cell(shell, "capture kept --no-display", "%%chat\nhello")
    assert shell.user_ns["kept"].stdout == ""
    assert shell.display_pub.outputs[-1]["data"]["text/plain"] == SAID


def test_a_loads_progress_is_captured_as_one_line(shell: Any) -> None:
    with capture_output() as kept:
        line(shell, "load smollm2")
    (output,) = kept.outputs
    assert output.data["text/plain"].startswith("smollm2: 145.0 MB loaded in")
