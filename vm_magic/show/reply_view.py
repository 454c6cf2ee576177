"""Where a reply appears while it is generated: a display handle, a terminal, or nowhere."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from engine.batch.scored_token import unlikely_text
from vm_magic.show.display_handle import Bundle, DisplayHandle
from vm_magic.show.reply_bundle import Format, code_text, growing_bundle, reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.terminal import write
from vm_magic.show.tool_cards import call_line

WAITING = ReplyText("…")
"""What a handle shows until the first words come."""
UPDATE_INTERVAL = 1 / 15
"""Seconds between two updates of a display handle: quick enough to read along, light on the browser."""
PICTURE_INTERVAL = 1 / 4
"""The same where each token is a coloured span: several hundred bytes each."""


class ReplyView(Protocol):
    """Shows a growing reply. ``refresh`` is called often; ``finish`` once, with a mark if it was cut short."""

    def refresh(self, reply: ReplyText, *, at_once: bool = False) -> None:
        """Show ``reply``, the whole of it so far; ``at_once`` before something that takes long."""
        ...

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Show the end; ``mark`` says why it was cut short."""
        ...

    def add_notes(self, notes: Sequence[str]) -> None:
        """Say more below what was finished, a line each."""
        ...


class SilentView:
    """Shows nothing."""

    def refresh(self, reply: ReplyText, *, at_once: bool = False) -> None:
        """Nothing."""

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Nothing."""

    def add_notes(self, notes: Sequence[str]) -> None:
        """Nothing."""


class NotebookView:
    """One display handle, updated at most every :data:`UPDATE_INTERVAL` seconds.

    ``publish`` sends a mime bundle; it may be bound to the context of the cell that asked, so that a
    thread's updates carry that cell's header.
    """

    def __init__(self, publish: Callable[[Bundle], None], format: Format, *, stream: bool = True) -> None:
        self._publish = publish
        self._format = format
        self._stream = stream
        self._shown, self._mark = ReplyText(), ""
        self._last_update = float("-inf")

    def refresh(self, reply: ReplyText, *, at_once: bool = False) -> None:
        """Show ``reply`` if it changed and the last update is long enough ago."""
        now = time.monotonic()
        interval = PICTURE_INTERVAL if reply.tokens else UPDATE_INTERVAL
        due = at_once or now - self._last_update >= interval
        if self._stream and due and reply != self._shown:
            self._publish(growing_bundle(reply, self._format))
            self._shown, self._last_update = reply, now

    def annotate(self, metadata: dict[str, Any]) -> None:
        """Give the output ``metadata``, where it is a place in a notebook."""
        if isinstance(self._publish, DisplayHandle):
            self._publish.annotate(metadata)

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Show the whole of ``reply``."""
        self._shown, self._mark = reply, mark
        self._publish(reply_bundle(reply, self._format, mark=mark))

    def add_notes(self, notes: Sequence[str]) -> None:
        """Show it again, with ``notes`` below, small and faint."""
        self._publish(reply_bundle(self._shown, self._format, mark=self._mark, notes=notes))


class TerminalCodeView:
    """Writes the code of a reply once it is whole: which block counts is known only then."""

    def refresh(self, reply: ReplyText, *, at_once: bool = False) -> None:
        """Nothing yet."""

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Write the code, or the text where there is none, and the mark."""
        write("\n".join(filter(None, [code_text(reply), mark])) + "\n")

    def add_notes(self, notes: Sequence[str]) -> None:
        """Write ``notes`` as last lines."""
        write("".join(f"{note}\n" for note in notes))


class TerminalView:
    """Writes deltas as they come: a terminal cannot replace what it printed. A thought is only counted."""

    def __init__(self) -> None:
        self._num_turns = 0
        self._begin_turn()

    def refresh(self, reply: ReplyText, *, at_once: bool = False) -> None:  # noqa: ARG002 - always at once
        """Write what is new: of the turns that ended meanwhile, then of this one."""
        for turn in reply.earlier[self._num_turns :]:
            self._write(turn)
            write("\n")
            self._num_turns += 1
            self._begin_turn()
        self._write(reply)
        sys.stdout.flush()

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Write the rest, calls without an outcome too, the mark and a line end."""
        self.refresh(reply)
        for call, outcome in reply.calls()[self._num_calls :]:
            write(f"\n{call_line(call, outcome)}")
        tokens = [token for turn in (*reply.earlier, reply) for token in turn.tokens]
        write(f" {mark}\n" if mark else "\n")
        if unlikely := unlikely_text(tokens):
            write(f"\n{unlikely}\n")

    def add_notes(self, notes: Sequence[str]) -> None:
        """Write ``notes`` as last lines."""
        write("".join(f"{note}\n" for note in notes))

    def _begin_turn(self) -> None:
        self._written = 0
        self._num_calls = 0
        self._thought: Literal["none", "open", "over"] = "none"

    def _write(self, turn: ReplyText) -> None:
        if turn.reasoning and self._thought == "none":
            self._thought = "open"
            write("thinking …")
        if (turn.text or turn.tool_calls) and self._thought == "open":
            self._thought = "over"
            write(f" {turn.thought_size()}\n\n")
        write(turn.text[self._written :])
        self._written = len(turn.text)
        for call, outcome in turn.calls()[self._num_calls :]:
            if outcome is None or outcome.running:
                break
            write(f"{chr(10) if self._written or self._num_calls else ''}{call_line(call, outcome)}")
            self._num_calls += 1
