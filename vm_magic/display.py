"""Where a reply appears while it is generated: a display handle, a terminal, or nowhere."""

import html
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from IPython.core.displaypub import DisplayPublisher

from vm_magic.reply_reader import ReplyText

Format = Literal["markdown", "text", "code", "json"]
Bundle = dict[str, Any]
WAITING = ReplyText("…")
"""What a handle shows until the first words come."""
UPDATE_INTERVAL = 1 / 15
"""Seconds between two updates of a display handle: quick enough to read along, light on the browser."""


def can_update(shell: Any) -> bool:
    """Whether ``shell`` can replace what it displayed (a notebook); a terminal prints a new copy."""
    return type(shell.display_pub) is not DisplayPublisher


class ReplyView(Protocol):
    """Shows a growing reply. ``refresh`` is called often; ``finish`` once, with a mark if it was cut short."""

    def refresh(self, reply: ReplyText) -> None:
        """Show ``reply``, the whole of it so far."""
        ...

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Show the end; ``mark`` says why it was cut short."""
        ...


class SilentView:
    """Shows nothing."""

    def refresh(self, reply: ReplyText) -> None:
        """Nothing."""

    def finish(self, reply: ReplyText, mark: str = "") -> None:
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
        self._shown = ReplyText()
        self._last_update = float("-inf")

    def refresh(self, reply: ReplyText) -> None:
        """Show ``reply`` if it changed and the last update is long enough ago."""
        now = time.monotonic()
        if self._stream and reply != self._shown and now - self._last_update >= UPDATE_INTERVAL:
            self._publish(growing_bundle(reply, self._format))
            self._shown, self._last_update = reply, now

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Show the whole of ``reply``."""
        self._publish(reply_bundle(reply, self._format, mark=mark))


class TerminalView:
    """Writes deltas as they come: a terminal cannot replace what it printed. A thought is only counted."""

    def __init__(self) -> None:
        self._written = 0
        self._thinking = False

    def refresh(self, reply: ReplyText) -> None:
        """Write what is new in the answer, after a line about the thought."""
        if reply.reasoning and not self._thinking:
            self._thinking = True
            sys.stdout.write("thinking …")
        text = reply.whole() if reply.tool_calls else reply.text
        if text and not self._written and self._thinking:
            sys.stdout.write(f" {reply.num_reasoning_tokens} tokens\n\n")
        if not reply.tool_calls:
            sys.stdout.write(text[self._written :])
            self._written = len(text)
        sys.stdout.flush()

    def finish(self, reply: ReplyText, mark: str = "") -> None:
        """Write the rest, the mark and a line end."""
        self.refresh(reply)
        sys.stdout.write(reply.whole()[self._written :] if reply.tool_calls else "")
        sys.stdout.write(f" {mark}\n" if mark else "\n")


def growing_bundle(reply: ReplyText, format: Format) -> Bundle:
    """The bundle of an unfinished reply: JSON is shown as text until it is whole."""
    return reply_bundle(reply, "code" if format == "json" else format, growing=True)


def reply_bundle(reply: ReplyText, format: Format, *, mark: str = "", growing: bool = False) -> Bundle:
    """Mime types for ``reply``, with ``mark`` after it. In Markdown the model's thinking is folded away.

    The plain form is the answer alone; while there is none, it says that the model thinks.
    """
    text = reply.whole()
    thinking = growing and reply.reasoning != "" and not text
    marked = f"{text} {mark}" if mark else f"thinking … {reply.num_reasoning_tokens} tokens" if thinking else text
    if format == "text":
        return {"text/plain": marked}
    fold = folded(reply, growing=thinking)
    if format == "json":
        bundle = _json_bundle(text, mark)
        return {**bundle, "text/markdown": fold + bundle["text/markdown"]}
    if format == "code":
        body = "" if thinking else fenced(text)
        return {"text/plain": marked, "text/markdown": fold + body + (f"\n\n{mark}" if mark else "")}
    answer = "\n\n".join([*([reply.text] if reply.text else []), *map(_call_markdown, reply.tool_calls)])
    return {"text/plain": marked, "text/markdown": fold + (f"{answer}\n\n*{mark}*" if mark else answer)}


def _call_markdown(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return f"**{function['name']}**\n\n{fenced(function['arguments'], 'json')}"


def fenced(text: str, language: str = "") -> str:
    """``text`` as a Markdown code block, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def folded(reply: ReplyText, *, growing: bool = False) -> str:
    """A closed ``<details>`` with the model's thinking and its length, or nothing."""
    if not reply.reasoning:
        return ""
    title = f"thinking{' …' if growing else ''} ({reply.num_reasoning_tokens} tokens)"
    return f"<details><summary>{title}</summary>\n\n{html.escape(reply.reasoning.strip())}\n\n</details>\n\n"


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
