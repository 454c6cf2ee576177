"""Progress as a bar in one display handle, which what was waited for takes the place of."""

import html
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.format.text import harmless
from engine.handover import interruptible
from engine.params.sizes import size_text
from vm_magic.show.display_handle import Bundle, DisplayHandle, can_update, open_handle
from vm_magic.show.terminal import say

_COUNTED = ("kernels",)
"""Stages of a load that are counted; others are in bytes."""
_INTERVAL = 0.1
"""Seconds between two updates of a bar."""


def _bundle(text: str, done: int, total: int) -> Bundle:
    """A bar with ``text`` behind it; without a ``total`` it only moves."""
    known = f' value="{done}" max="{total}"' if total else ""
    return {"text/plain": text, "text/html": f"<div><progress{known}></progress> {html.escape(text)}</div>"}


class LoadProgress:
    """Shows ``progress(stage, done, total)``; called from any thread. In a terminal it is tqdm's bar."""

    def __init__(self, shell: Any, model: str) -> None:
        self.model = model
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._last = float("-inf")
        self._stage = ""
        self._update = DisplayHandle(shell) if can_update(shell) else None
        self._bar: Any = None

    def open(self) -> None:
        """Show that it begins."""
        if self._update is not None:
            self._update(self._bundle("loading", 0, 0))

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of ``stage`` are there."""
        with self._lock:
            now = time.monotonic()
            if stage == self._stage and done < total and now - self._last < _INTERVAL:
                return
            new_stage, self._stage, self._last = stage != self._stage, stage, now
            if self._update is not None:
                self._update(self._bundle(stage, done, total))
            else:
                self._advance_bar(stage, done, total, new_stage)

    def finish(self, text: str, bundle: Bundle | None = None) -> None:
        """Replace the bar by one line, or in a notebook by ``bundle`` if there is one."""
        with self._lock:
            self._close_bar()
            if self._update is None:
                say(text)
            else:
                self._update(bundle or {"text/plain": text})

    @property
    def seconds(self) -> float:
        """Time since the load began."""
        return time.monotonic() - self.started

    def _bundle(self, stage: str, done: int, total: int) -> Bundle:
        amount: Callable[[int], str] = str if stage in _COUNTED else size_text
        share = f"{amount(done)} of {amount(total)}" if total else ""
        text = f"{self.model}: {stage} {share} ({self.seconds:.1f} s)"
        return _bundle(text, done, total)

    def _advance_bar(self, stage: str, done: int, total: int, new_stage: bool) -> None:
        from tqdm import tqdm

        if new_stage:
            self._close_bar()
            in_bytes = stage not in _COUNTED
            self._bar = interruptible(tqdm)(
                total=total or None,
                unit="B" if in_bytes else "it",
                unit_scale=in_bytes,
                desc=harmless(f"{self.model}: {stage}"),
                bar_format=None if total else "{desc} ({elapsed})",  # of an unknown length: no count of nothing
            )
        self._bar.update(done - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class DisplayBar:
    """Shows progress with tqdm's methods; called (``bar(total=…, desc=…)``) it gives itself, as vLLM's ``use_tqdm``."""

    def __init__(self, shell: Any, desc: str) -> None:
        self._desc = desc
        self._total: int | None = None
        self._postfix, self._count = "", 0
        self._started = time.monotonic()
        self._last = float("-inf")
        self._update = open_handle(shell, self._bundle())

    def __call__(self, *, total: int | None = None, desc: str = "", **_: Any) -> "DisplayBar":
        """Begin; other keywords of tqdm's are about its looks."""
        self._total, self._desc, self._started = total, desc or self._desc, time.monotonic()
        self._show()
        return self

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands behind the bar."""
        self._postfix = text
        if refresh:
            self._show()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self._count += n
        self._show()

    def close(self) -> None:
        """Nothing: :meth:`replace` says what stays."""

    def replace(self, bundle: Bundle) -> None:
        """Show ``bundle`` in the bar's place."""
        self._update(bundle)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= _INTERVAL:
            self._last = now
            self._update(self._bundle())

    def _bundle(self) -> Bundle:
        of = f"{self._count} of {self._total}" if self._total is not None else str(self._count)
        text = f"{self._desc}: {of} ({time.monotonic() - self._started:.1f} s) {self._postfix}".rstrip()
        return _bundle(text, self._count, self._total or 0)


def bar_for(shell: Any, desc: str) -> DisplayBar | None:
    """A bar where ``shell`` can replace what it displayed; None in a terminal, where tqdm is for that."""
    return DisplayBar(shell, desc) if can_update(shell) else None
