"""Ctrl-C at a chosen moment: before the k-th call that this thread makes of a function of ours."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_OURS = (str(ROOT / "engine") + "/", str(ROOT / "vm_magic") + "/")


class Interrupts:
    """Counts the calls of a function, or interrupts one of them."""

    def __init__(self) -> None:
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
        if event != "call" or not frame.f_code.co_filename.startswith(_OURS):
            return
        number, self.passed = self.passed, self.passed + 1
        if number == self._target:
            self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            raise KeyboardInterrupt
