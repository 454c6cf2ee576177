"""Replies side by side while they are written: columns in a notebook, one after another in a terminal."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vm_magic.show.display_handle import Bundle
from vm_magic.show.reply_bundle import Format, growing_bundle, reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.safe_markdown import fenced
from vm_magic.show.terminal import write
from vm_magic.show.token_html import escaped

UPDATE_INTERVAL = 1 / 10
"""Seconds between two updates: each sends all columns."""
# Columns where there is room, below each other where there is not. Inline and half transparent: reads on every theme,
# and a notebook that is not trusted keeps it.
_ROW = "display:flex;flex-wrap:wrap;gap:10px;align-items:stretch"
_COLUMN = (
    "flex:1 1 280px;min-width:0;max-width:100%;box-sizing:border-box;overflow:auto;"
    "border:1px solid #80808059;border-radius:6px;padding:6px 12px"
)
_HEAD = "border-bottom:1px solid #80808059;padding:0 0 4px 0;margin:0 0 6px 0"


@dataclass(frozen=True)
class VariantShown:
    """One column: its label, its reply so far, what is known of it (tokens, speed), and why it was cut short."""

    label: str
    reply: ReplyText
    facts: str = ""
    mark: str = ""
    over: bool = False


class CompareView(Protocol):
    """Shows growing replies. ``refresh`` is called often, ``finish`` once."""

    def refresh(self, variants: Sequence[VariantShown]) -> None:
        """Show what there is so far."""
        ...

    def finish(self, variants: Sequence[VariantShown]) -> None:
        """Show the end."""
        ...


class SilentCompare:
    """Shows nothing."""

    def refresh(self, variants: Sequence[VariantShown]) -> None:
        """Nothing."""

    def finish(self, variants: Sequence[VariantShown]) -> None:
        """Nothing."""


class NotebookCompare:
    """Columns in one display handle, updated at most every :data:`UPDATE_INTERVAL` seconds."""

    def __init__(self, publish: Callable[[Bundle], None], format: Format, *, stream: bool = True) -> None:
        self._publish, self._format, self._stream = publish, format, stream
        self._last_update = float("-inf")
        self._shown: Sequence[VariantShown] = ()

    def refresh(self, variants: Sequence[VariantShown]) -> None:
        """Show ``variants`` if they changed and the last update is long enough ago."""
        now = time.monotonic()
        if self._stream and now - self._last_update >= UPDATE_INTERVAL and variants != self._shown:
            self._publish(compare_bundle(variants, self._format))
            self._shown, self._last_update = variants, now

    def finish(self, variants: Sequence[VariantShown]) -> None:
        """Show the whole."""
        self._publish(compare_bundle(variants, self._format))


class TerminalCompare:
    """Writes the first reply as it comes, then the next: a terminal has one place where it writes."""

    def __init__(self) -> None:
        self._place, self._written, self._headed = 0, 0, False

    def refresh(self, variants: Sequence[VariantShown]) -> None:
        """Write what is new of the reply whose turn it is, and whole ones behind it."""
        while self._place < len(variants):
            one = variants[self._place]
            text = plain_text(one)
            if not self._headed:
                write(f"{heading(one.label)}\n")
                self._headed = True
            write(text[self._written :])
            self._written = len(text)
            if not one.over:
                break
            write(f"\n{footer(one)}\n\n")
            self._place, self._written, self._headed = self._place + 1, 0, False
        sys.stdout.flush()

    def finish(self, variants: Sequence[VariantShown]) -> None:
        """Write the rest."""
        self.refresh(variants)


def compare_bundle(variants: Sequence[VariantShown], format: Format) -> Bundle:
    """All columns as Markdown with HTML around them, and as plain text."""
    plain = "\n\n".join("\n".join(filter(None, [heading(one.label), plain_text(one), footer(one)])) for one in variants)
    columns = "\n".join(_column(one, format) for one in variants)
    return {"text/plain": plain, "text/markdown": f'<div style="{_ROW}">\n{columns}\n</div>'}


def heading(label: str) -> str:
    """A label as a line of plain text."""
    return f"── {label} ──"


def plain_text(one: VariantShown) -> str:
    """A reply without marks."""
    return one.reply.whole()


def footer(one: VariantShown) -> str:
    """What is known of a reply, in one line of plain text."""
    told = " · ".join(filter(None, [one.facts, one.mark]))
    return f"({told})" if told else ""


def _column(one: VariantShown, format: Format) -> str:
    """A column; blank lines let Markdown begin again inside of HTML, and what is inside was made safe before."""
    bundle = reply_bundle(one.reply, format) if one.over else growing_bundle(one.reply, format)
    body = bundle.get("text/markdown") or fenced(bundle["text/plain"])
    told = " · ".join(filter(None, [one.facts, one.mark])) or "…"
    head = (
        f'<div style="{_HEAD}"><strong>{escaped(one.label)}</strong> '
        f'<span style="opacity:0.7;font-size:12px">{escaped(told)}</span></div>'
    )
    return f'<div style="{_COLUMN}">{head}\n\n{body}\n\n</div>'
