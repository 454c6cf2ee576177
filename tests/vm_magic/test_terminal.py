"""The magics in a plain terminal IPython: its own process, its own shell class."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
%load_ext vm_magic
from tests.vm_magic import fakes; fakes.install()
%vllm_metal load smollm2
ip = get_ipython()
ip.run_cell("%%chat --stats\\nhello")
ip.run_cell("%vllm_metal chat again?")
ip.run_cell("%vllm_metal load")
ip.run_cell("%vllm_metal")
"""


def test_replies_are_written_once_and_errors_are_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.ipy"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("smollm2: 145.0 MB loaded in")
    assert lines.count("alpha beta gamma delta epsilon zeta eta theta") == 1
    assert "8 tokens · " in done.stdout
    assert "UsageError" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "32 of 128 used" in done.stdout
    assert "weights" in done.stderr  # tqdm's bar
