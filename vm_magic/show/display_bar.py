"""A progress bar in one display handle, which what was waited for can take the place of."""

import html
import time
from typing import Any

from vm_magic.show.display import can_update, open_handle
from vm_magic.show.reply_bundle import Bundle

_INTERVAL = 0.1


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
        known = f' value="{self._count}" max="{self._total}"' if self._total else ""
        return {"text/plain": text, "text/html": f"<div><progress{known}></progress> {html.escape(text)}</div>"}


def bar_for(shell: Any, desc: str) -> DisplayBar | None:
    """A bar where ``shell`` can replace what it displayed; None in a terminal, where tqdm is for that."""
    return DisplayBar(shell, desc) if can_update(shell) else None
