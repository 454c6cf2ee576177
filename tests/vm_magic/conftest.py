"""A real shell in this process, and a real kernel in another, both with the scripted model."""

import atexit
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config

from tests.vm_magic import fakes
from vm_magic.state import session

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shell(engine_shell: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in fakes.REPLACED:  # so that the real ones come back
        monkeypatch.setattr(session, name, getattr(session, name))
    fakes.install()
    return engine_shell


@pytest.fixture
def engine_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A shell with the magics over the real engine."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    InteractiveShell.clear_instance()
    config = Config()
    config.HistoryManager.enabled = False
    instance = InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher, config=config)
    instance.extension_manager.load_extension("vm_magic")
    yield instance
    instance.extension_manager.unload_extension("vm_magic")
    instance.atexit_operations()
    atexit.unregister(instance.atexit_operations)
    InteractiveShell.clear_instance()


@pytest.fixture
def loaded(shell: Any, capsys: pytest.CaptureFixture[str]) -> fakes.FakeLLM:
    """The scripted model, loaded through the magic."""
    shell.run_line_magic("vllm_metal", "load smollm2")
    capsys.readouterr()
    shell.display_pub.outputs.clear()
    return fakes.MADE[-1]


class Kernel:
    """A kernel and its messages, cell by cell."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str, timeout: float = 120) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        messages: list[dict[str, Any]] = []
        reply = self.client.execute_interactive(code, timeout=timeout, output_hook=messages.append, store_history=True)
        return reply["content"], messages

    def text(self, code: str) -> str:
        """What ``code`` prints."""
        _, messages = self.run(code)
        return "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    from jupyter_client.manager import start_new_kernel

    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    manager, client = start_new_kernel(
        kernel_name="python3", startup_timeout=120, env={**os.environ, "PYTHONPATH": path}
    )
    running = Kernel(manager, client)
    running.run("from tests.vm_magic import fakes; fakes.install()")
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)
