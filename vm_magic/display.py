"""Where a reply appears while it is generated: a display handle, a terminal, or nowhere."""

import html
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from IPython.core.displaypub import DisplayPublisher

Format = Literal["markdown", "text", "code", "json"]
Bundle = dict[str, Any]
WAITING = "…"
"""What a handle shows until the first words come."""
UPDATE_INTERVAL = 1 / 15
"""Seconds between two updates of a display handle: quick enough to read along, light on the browser."""


def can_update(shell: Any) -> bool:
    """Whether ``shell`` can replace what it displayed (a notebook); a terminal prints a new copy."""
    return type(shell.display_pub) is not DisplayPublisher


class ReplyView(Protocol):
    """Shows a growing text. ``refresh`` is called often; ``finish`` once, with a mark if it was cut short."""

    def refresh(self, text: str) -> None:
        """Show ``text``, the whole of it so far."""
        ...

    def finish(self, text: str, mark: str = "") -> None:
        """Show the end; ``mark`` says why it was cut short."""
        ...


class SilentView:
    """Shows nothing."""

    def refresh(self, text: str) -> None:
        """Nothing."""

    def finish(self, text: str, mark: str = "") -> None:
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
        self._shown = ""
        self._last_update = float("-inf")

    def refresh(self, text: str) -> None:
        """Show ``text`` if it changed and the last update is long enough ago."""
        now = time.monotonic()
        if self._stream and text != self._shown and now - self._last_update >= UPDATE_INTERVAL:
            self._publish(growing_bundle(text, self._format))
            self._shown, self._last_update = text, now

    def finish(self, text: str, mark: str = "") -> None:
        """Show the whole ``text``."""
        self._publish(reply_bundle(text, self._format, mark=mark))


class TerminalView:
    """Writes deltas as they come: a terminal cannot replace what it printed."""

    def __init__(self) -> None:
        self._written = 0

    def refresh(self, text: str) -> None:
        """Write what is new in ``text``."""
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)

    def finish(self, text: str, mark: str = "") -> None:
        """Write the rest, the mark and a line end."""
        self.refresh(text)
        sys.stdout.write(f" {mark}\n" if mark else "\n")


def growing_bundle(text: str, format: Format) -> Bundle:
    """The bundle of an unfinished reply: JSON is shown as text until it is whole."""
    return reply_bundle(text, "code" if format == "json" else format)


def reply_bundle(text: str, format: Format, *, mark: str = "") -> Bundle:
    """Mime types for ``text``, with ``mark`` after it. In Markdown the model's thinking is folded away."""
    marked = f"{text} {mark}" if mark else text
    if format == "text":
        return {"text/plain": marked}
    if format == "json":
        return _json_bundle(text, mark)
    if format == "code":
        return {"text/plain": marked, "text/markdown": fenced(text) + (f"\n\n{mark}" if mark else "")}
    thinking, answer = split_thinking(text)
    markdown = f"{answer}\n\n*{mark}*" if mark else answer
    return {"text/plain": marked, "text/markdown": folded(thinking) + markdown}


def fenced(text: str, language: str = "") -> str:
    """``text`` as a Markdown code block, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def split_thinking(text: str) -> tuple[str, str]:
    """What stands between ``<think>`` and ``</think>`` at the beginning, and the answer after it.

    Templates may open ``<think>`` in the prompt, so that the text has only its end.
    """
    before, end, answer = text.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not end and not opened:
        return "", text
    return before.lstrip().removeprefix("<think>").strip(), answer.lstrip()


def folded(thinking: str) -> str:
    """A closed ``<details>`` with the model's thinking, or nothing."""
    if not thinking:
        return ""
    return f"<details><summary>thinking</summary>\n\n{html.escape(thinking)}\n\n</details>\n\n"


def _json_bundle(text: str, mark: str) -> Bundle:
    body = re.sub(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", r"\1", text, flags=re.DOTALL)
    try:
        value = json.loads(body)
    except ValueError:
        note = mark or "(not JSON)"
        return {"text/plain": f"{text} {note}", "text/markdown": f"{fenced(text)}\n\n*{note}*"}
    pretty = json.dumps(value, indent=2, ensure_ascii=False)
    bundle: Bundle = {"text/plain": pretty, "text/markdown": fenced(pretty, "json")}
    if isinstance(value, dict | list):
        bundle["application/json"] = value
    return bundle


def open_handle(shell: Any, bundle: Bundle) -> Callable[[Bundle], None]:
    """Display ``bundle`` and return what replaces it. Safe from any thread: see below.

    ipykernel keeps the header of the cell in a context variable; updates run in a copy of the
    opening cell's context, so they land there whatever runs by then.
    """
    import contextvars
    import uuid

    transient = {"display_id": uuid.uuid4().hex}
    context = contextvars.copy_context()
    shell.display_pub.publish(bundle, {}, transient=transient)

    def update(new: Bundle) -> None:
        context.copy().run(shell.display_pub.publish, new, {}, transient=transient, update=True)

    return update
