"""Tries damaged models in this process, a line of JSON before and after each."""

import json
import logging
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS = 20.0
"""Of processor time that a case may take: then the process ends, whatever it is in."""
_BYTES = 3 << 30
"""Of address space that the cases may take beyond what a whole model does."""
_LONGEST = 700
"""Characters of a line that people can read."""


def main(first: int, count: int) -> None:
    """Try ``count`` cases from number ``first`` on."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import engine
    from tests.damaged import cases

    with tempfile.TemporaryDirectory() as scratch:
        _use(engine, _whole(Path(scratch)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory() as scratch:
            case = cases.write(number, Path(scratch))
            _say({"begins": number, "what": case.what})
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)
            before, began = _held(reset=True), time.process_time()
            found = _use(engine, case.path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            more = _held() - before
            _say({"ends": number, "cpu": round(time.process_time() - began, 2), "mb": more >> 20, **found})


def _whole(scratch: Path) -> Path:
    from tests.damaged import whole

    folder = scratch / "model"
    folder.mkdir()
    for name, data in whole.folder("llama", scratch).items():
        (folder / name).write_bytes(data)
    return folder


def _use(engine: Any, path: Path) -> dict[str, str]:
    """What a plan, a card and a load of ``path`` end in: "" or the error."""

    def load() -> None:
        engine.LLM(str(path), max_num_seqs=2, gpu_memory_utilization=0.05).close()

    def card() -> None:
        found = engine.inspect(str(path))
        str(found)
        for line in (*found.problems, *found.remarks):
            if "\n" in line or len(line) > _LONGEST:
                raise AssertionError(f"not one line: {line!r}")
            if "MemoryError" in line:
                raise MemoryError(line)

    return {
        "plan": end_of(lambda: engine.plan(str(path), fraction=0.05)),
        "inspect": end_of(card),
        "load": end_of(load),
    }


def end_of(do: Callable[[], Any]) -> str:
    from engine.errors import VMMagicError

    try:
        do()
    except VMMagicError as error:
        line = str(error)
        good = line.strip() and "\n" not in line and len(line) <= _LONGEST
        return f"{type(error).__name__}: {line}" if good else f"RAW not one line: {line!r}"
    except BaseException as error:  # noqa: BLE001  (the test says what came)
        calls = traceback.extract_tb(error.__traceback__)[-2:]
        where = ", ".join(f"{call.filename.rpartition('/')[2]}:{call.lineno}" for call in calls)
        return f"RAW {type(error).__name__}: {str(error)[:200]} ({where})"
    return ""


def _held(*, reset: bool = False) -> int:
    """The most memory held since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
