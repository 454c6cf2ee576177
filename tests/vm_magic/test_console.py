"""The magics in ``jupyter console`` and ``jupyter run``, which show a display once and never update it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.vm_magic import fakes

ROOT = Path(__file__).resolve().parents[2]
PROMPT = r"In \[\d+\]: "
SAID = " ".join(fakes.WORDS)
BEGIN = "%load_ext vm_magic\nfrom tests.vm_magic import fakes; fakes.install()\n%vllm_metal load smollm2\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    return {**os.environ, **folders, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "TERM": "dumb"}


@pytest.fixture
def console(environment: dict[str, str]) -> Iterator[Any]:
    pytest.importorskip("jupyter_console")
    flags = ["-m", "jupyter_console", "--simple-prompt"]
    child = pexpect.spawn(sys.executable, flags, env=environment, encoding="utf-8", timeout=60, echo=False)
    child.expect(PROMPT)
    yield child
    child.sendline("exit")  # ends the kernel, too
    child.expect(pexpect.EOF)
    child.close()


def said(console: Any, code: str) -> str:
    """What ``code`` prints."""
    console.sendline(code)
    console.expect(PROMPT)
    return str(console.before).replace("\r\n", "\n")


def test_a_reply_is_seen_whole_in_jupyter_console(console: Any) -> None:
    for code in BEGIN.splitlines():
        loaded = said(console, code)
    assert "smollm2: 145.0 MB loaded in" in loaded
    shown = said(console, "get_ipython().run_cell('%%chat --stats\\nhello');")
    assert SAID in shown
    assert "8 tokens · " in shown
    assert "…" not in shown
    assert SAID in said(console, "_.text")
    assert "panel: smollm2; " in said(console, "%vllm_metal panel")
    assert "in a terminal add --out NAME" in said(console, "%vllm_metal chat --detach hello")
    said(console, "get_ipython().run_cell('%%capture kept\\n%%chat\\nhello');")
    assert f"1 {SAID}" in said(console, "print(len(kept.outputs), kept.outputs[0].data['text/plain'])")


def test_a_reply_is_seen_whole_under_jupyter_run(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.ipy"
    script.write_text(BEGIN + "get_ipython().run_cell('%%chat\\nhello');\n")
    program = Path(sys.executable).parent / "jupyter-run"
    done = subprocess.run([program, script], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert SAID in done.stdout
    assert "…" not in done.stdout
