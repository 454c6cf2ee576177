"""Cases tried in a process of their own, which may die or hang without ending the tests."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMAND = (sys.executable, "-m", "tests.damaged")
WAYS = ("plan", "inspect", "load")
_ROOT = Path(__file__).parents[2]
_SILENCE = 120.0
"""Seconds without a line after which a process hangs; a case that computes ends earlier by itself."""


@dataclass(frozen=True)
class Tried:
    """What a case ended in: by way, "" or an error's type and line; a death is an error of every way."""

    number: int
    what: str
    ends: dict[str, str]
    megabytes: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """What should not have come."""
        return [f"case {self.number} ({self.what}): {way}: {end}" for way, end in self.ends.items() if _is_fault(end)]


def _is_fault(end: str) -> bool:
    """Also where the process's limit, not the engine, ended what would have taken all memory of a machine."""
    return end.startswith(("RAW", "died")) or "MemoryError" in end or "bad_alloc" in end


def tries(first: int, count: int, command: Sequence[str] = _COMMAND, silence: float = _SILENCE) -> Iterator[Tried]:
    """Try cases ``first`` … in a process that ``command`` starts, and in another after each that dies or hangs."""
    while count > 0:
        begun: dict[str, Any] = {}
        for line in _lines([*command, str(first), str(count)], silence):
            if "begins" in line:
                begun = line
            elif "ends" in line:
                yield Tried(line["ends"], begun["what"], {way: line[way] for way in WAYS}, line["mb"], line["cpu"])
                first, count, begun = first + 1, count - 1, {}
            else:
                yield Tried(first, begun.get("what", "a whole model"), {"process": f"died: {line['died']}"})
                first, count = first + 1, count - 1


def _lines(command: Sequence[str], silence: float) -> Iterator[dict[str, Any]]:
    """What a process says, and where it ends before its last case, how."""
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=_ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        errors: list[bytes] = []
        threads = [threading.Thread(target=_read, args=(process.stdout, said.put), daemon=True)]
        threads.append(threading.Thread(target=_read, args=(process.stderr, errors.append), daemon=True))
        for thread in threads:
            thread.start()
        try:
            while line := said.get(timeout=silence):
                yield json.loads(line)
            process.wait()
        except queue.Empty:
            yield {"died": "hangs"}
            return
        finally:
            process.kill()
            for thread in threads:
                thread.join()
    if process.returncode != 0:
        yield {"died": f"exit {process.returncode}: {b' '.join(errors).decode(errors='replace')[-800:]}"}


def _read(pipe: Any, put: Any) -> None:
    for line in pipe:
        put(line)
    put(b"")


if __name__ == "__main__":
    _faults = _cases = 0
    for _tried in tries(int(sys.argv[1]), int(sys.argv[2])):
        _cases += 1
        for _fault in _tried.faults:
            _faults += 1
            print(_fault, flush=True)
        if _tried.megabytes > 300 or _tried.seconds > 3:
            print(f"case {_tried.number} ({_tried.what}): {_tried.megabytes} MB, {_tried.seconds} s", flush=True)
    print(f"{_cases} cases, {_faults} faults")
