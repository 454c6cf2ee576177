"""Load progress: a bar in one display handle, or tqdm in a terminal."""

import html
import threading
import time
from typing import Any

from engine.params.sizes import size_text
from vm_magic.show.display import DisplayHandle, can_update
from vm_magic.show.reply_bundle import Bundle

_INTERVAL = 0.1


class LoadProgress:
    """Shows ``progress(stage, done, total)`` in bytes; called from any thread."""

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
        """Show that ``done`` of ``total`` bytes of ``stage`` are there."""
        with self._lock:
            now = time.monotonic()
            if stage == self._stage and done < total and now - self._last < _INTERVAL:
                return
            new_stage, self._stage, self._last = stage != self._stage, stage, now
            if self._update is not None:
                self._update(self._bundle(stage, done, total))
            else:
                self._advance_bar(stage, done, total, new_stage)

    def finish(self, text: str) -> None:
        """Replace the bar by one line."""
        with self._lock:
            self._close_bar()
            if self._update is None:
                print(text)
            else:
                self._update({"text/plain": text})

    @property
    def seconds(self) -> float:
        """Time since the load began."""
        return time.monotonic() - self.started

    def _bundle(self, stage: str, done: int, total: int) -> Bundle:
        share = f"{size_text(done)} of {size_text(total)}" if total else ""
        text = f"{self.model}: {stage} {share} ({self.seconds:.1f} s)"
        bar = f'<progress value="{done}" max="{total}"></progress>' if total else "<progress></progress>"
        return {"text/plain": text, "text/html": f"<div>{bar} {html.escape(text)}</div>"}

    def _advance_bar(self, stage: str, done: int, total: int, new_stage: bool) -> None:
        from tqdm import tqdm

        if new_stage:
            self._close_bar()
            self._bar = tqdm(total=total or None, unit="B", unit_scale=True, desc=f"{self.model}: {stage}")
        self._bar.update(done - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
