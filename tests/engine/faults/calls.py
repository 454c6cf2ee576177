"""Ctrl-C at a chosen moment: before the k-th call that this thread makes of a function of ours.

Or behind the k-th call of C that Python's own ``logging`` and ``threading`` make, and :mod:`engine.handover`: there
locks are taken.
"""

import concurrent.futures
import logging
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from engine import handover

ROOT = Path(__file__).resolve().parents[3]
_OURS = (str(ROOT / "engine") + "/", str(ROOT / "vm_magic") + "/")
_LOCKING = tuple(str(module.__file__) for module in (logging, threading, queue, concurrent.futures._base, handover))


class Interrupts:
    """Counts the calls of a function, or interrupts one of them; ``in_locks``: those of C where locks are taken."""

    def __init__(self, *, in_locks: bool = False) -> None:
        self._event, self._files = ("c_return", _LOCKING) if in_locks else ("call", _OURS)
        self.passed = 0
        self.at = ""
        self._target = -1

    def count(self, action: Callable[[], Any]) -> int:
        """The moments of ``action`` at which it can be interrupted."""
        self._target = -1
        self._run(action)
        return self.passed

    def interrupt(self, action: Callable[[], Any], number: int) -> bool:
        """Run ``action`` and interrupt it at moment ``number``; whether that reached the caller."""
        self._target = number
        try:
            self._run(action)
        except KeyboardInterrupt:
            return True
        return False

    def _run(self, action: Callable[[], Any]) -> None:
        self.passed, self.at = 0, ""
        sys.setprofile(self._on_event)
        try:
            action()
        finally:
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != self._event or not frame.f_code.co_filename.startswith(self._files):
            return
        number, self.passed = self.passed, self.passed + 1
        if number == self._target:
            self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            raise KeyboardInterrupt
