"""A real fault of the device, in a process of its own: said in one line to everybody, no hang, a proper end."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from tests.on_device.small_models import SmallModel

_STATUS = 3
_SECONDS = 90.0


def sticky(*, pretend: bool = False) -> bool:
    """Whether a process whose engine's thread writes far out of bounds tells all its requests and ends with its status.

    Only on CUDA; ``pretend`` raises the error's words elsewhere instead.
    """
    if not (pretend or mx.cuda.is_available()):
        print("sticky: not tried: the fault is one of CUDA's", flush=True)
        return True
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        SmallModel("qwen3", 64, "float32").write(Path(temporary))
        command = [sys.executable, "-m", "tests.on_device.sticky_process", temporary, "pretend" if pretend else "fault"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            print(f"sticky: WRONG: it hangs; so far {error.stdout!r} {error.stderr!r}", flush=True)
            return False
    problems = list(_problems(done))
    seconds = time.monotonic() - begin
    for problem in problems:
        print(f"sticky: WRONG: {problem}", flush=True)
    if problems:
        print(f"stdout:\n{done.stdout}\nstderr:\n{done.stderr[-4000:]}", flush=True)
    else:
        line = done.stdout.splitlines()[1]
        print(f"sticky: as it should: all were told {line!r}, status {done.returncode}; {seconds:.0f} s", flush=True)
    return not problems


def _problems(done: "subprocess.CompletedProcess[str]") -> list[str]:
    lines = done.stdout.splitlines()
    problems = [] if done.returncode == _STATUS else [f"exit status {done.returncode} and not {_STATUS}"]
    if lines[-1:] != ["closed"]:
        problems.append("it did not come to its end")
    told = [line for line in lines if line.startswith("the GPU failed (")]
    if len(told) < 5 or len(set(told)) != 1:
        problems.append("not everybody was told the one line")
    if [line for line in lines if line.startswith("port: ")] != ["port: 200", f"port: 503; 503 {''.join(told[:1])}"]:
        problems.append("the port did not answer 503 with that line")
    if f"kept: {sum(range(1000))}" not in lines:
        problems.append("a variable was lost")
    if len(lines) != len(told) + 4:
        problems.append("something else was said")
    if any(word in done.stderr for word in ("terminate called", "Traceback", "core dumped")):
        problems.append("stderr speaks of an abort")
    return problems
