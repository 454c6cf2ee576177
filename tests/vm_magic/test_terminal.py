"""The magics in a plain terminal IPython: its own process, its own shell class."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.scripted_model import write_scripted_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
%load_ext vm_magic
from tests.vm_magic import fakes; fakes.install()
%vllm_metal load smollm2
ip = get_ipython()
ip.run_cell("%%chat --stats\\nhello")
ip.run_cell("%vllm_metal chat again?")
ip.run_cell("%%chat --compare temperature=0,1\\nhello")
ip.run_cell("print('kept', len(_.keep(0).messages))", store_history=True)
ip.run_cell("print(6 * 7)", store_history=True)
ip.run_cell("6 * 7", store_history=True)
ip.run_cell("{}['k']", store_history=True)
ip.run_cell("%%chat --new --cells 3 --error")
print("PROMPT", fakes.MADE[-1].prompts[-1], "END")
ip.run_cell("%vllm_metal load")
ip.run_cell("%vllm_metal")
ip.run_cell("%%capture kept\\n%%chat --stats\\nhello")
print("kept:", [output.data["text/plain"] for output in kept.outputs])
"""


def test_replies_are_written_once_and_errors_are_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.ipy"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("smollm2: 145.0 MB loaded in")
    assert lines.count("alpha beta gamma delta epsilon zeta eta theta") == 4
    assert done.stdout.count("── temperature=0 ──\nalpha beta gamma delta epsilon zeta eta theta\n(8 tokens · ") == 1
    assert "No reply is part of the conversation yet. Keep one: _.keep(0) or _.keep(1)" in lines
    assert "sent with: In [2] – In [4], the last error · " in done.stdout
    prompt = done.stdout.partition("PROMPT")[2].partition("END")[0]
    assert prompt.count("\n42\n") == 2
    assert "(error) KeyError: 'k'" in prompt
    assert "Out[" not in prompt
    assert "\x1b" not in prompt
    assert "8 tokens · " in done.stdout
    assert "UsageError" in done.stdout
    assert (done.stdout + done.stderr).count("Traceback") == 1  # that of the cell that was to fail
    assert "kept: ['alpha beta gamma delta epsilon zeta eta theta" in done.stdout
    assert "32 of 128 used" in done.stdout
    assert "weights" in done.stderr  # tqdm's bar


PROMPT = r"In \[\d+\]: "


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    """IPython as a person has it, but for its line editor."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "TERM": "dumb"}
    flags = ["-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt", "--no-confirm-exit"]
    child = pexpect.spawn(sys.executable, flags, env=environment, encoding="utf-8", timeout=60, echo=False)
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def said(terminal: Any, code: str) -> str:
    """What ``code`` prints."""
    terminal.sendline(code)
    terminal.expect(PROMPT)
    return str(terminal.before).replace("\r\n", "\n")


def test_ctrl_c_ends_a_request_that_is_awaited(terminal: Any, smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = write_scripted_model(tmp_path / "slow", smollm2_gguf, "word " * 900, step_seconds=0.02)
    said(terminal, "from tests.scripted_model import install; install(); from engine import LLM, SamplingParams")
    said(terminal, f"llm = LLM({str(folder)!r}, max_model_len=1024, gpu_memory_utilization=0.2)")
    said(terminal, "long, left = SamplingParams(max_tokens=900), lambda: len(llm.activity().requests)")
    said(terminal, "import threading, signal, os, time")
    said(terminal, "def press():\n    while not left(): time.sleep(0.01)\n    os.kill(os.getpid(), signal.SIGINT)\n")
    for wait in (
        "await llm.achat([{'role': 'user', 'content': 'Hi'}], long)",
        "[d async for d in llm.astream('Hi', long)]",
    ):
        said(terminal, "threading.Thread(target=press).start()")
        assert "KeyboardInterrupt" in said(terminal, wait)
        said(terminal, "_ = [time.sleep(0.05) for _ in range(900) if left()]")  # a busy machine takes its time
        assert "left: 0" in said(terminal, "print('left:', left())")
