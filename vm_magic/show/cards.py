"""What commands return: small objects with a text and a rich form that hold numbers and text, never a model."""

import html
from dataclasses import dataclass

from engine.format.text import aligned
from engine.memory.plan import LOG_LABEL
from engine.outputs import Reply
from vm_magic.show.safe_markdown import fenced
from vm_magic.show.tables import log_line_html, row_html, table_html

CARD_STYLE = "display:inline-block;padding:8px 14px;border:1px solid #80808059;border-radius:6px;font-size:13px"
"""Half transparent and without variables: reads on every theme, and a notebook that is not trusted keeps it."""
_PLAIN = 'style="background:none"'
_BAR_STYLE = (
    "display:inline-block;width:160px;height:8px;border-radius:4px;overflow:hidden;vertical-align:middle;"
    "margin-right:8px;background-color:#80808040"
)


@dataclass(frozen=True)
class StatusCard:
    """A snapshot of the session; ``fields`` in the order shown, ``usage`` the KV cache's share in use.

    ``snippets`` are (client, text to copy) for the open port; only the HTML form shows them. ``log_line`` is
    vllm-metal's of the plan: folded in HTML, last in text.
    """

    title: str
    fields: tuple[tuple[str, str], ...] = ()
    usage: float | None = None
    snippets: tuple[tuple[str, str], ...] = ()
    log_line: str = ""

    def __repr__(self) -> str:
        rows = [*self.fields, *([(LOG_LABEL, self.log_line)] if self.log_line else [])]
        return "\n".join([self.title, *(f"  {line}" for line in aligned(rows))])

    def _repr_html_(self) -> str:
        name_style = "text-align:left;opacity:.7;padding:1px 12px 1px 0;white-space:nowrap;vertical-align:top"
        value_style = "text-align:left;padding:1px 0"
        rows = [
            row_html([html.escape(name), self._bar(name) + html.escape(value)], name_style, value_style, row=_PLAIN)
            for name, value in self.fields
        ]
        table = table_html(rows, style="margin:4px 0 0;border:none") if rows else ""
        more = self._snippets() + (log_line_html(self.log_line) if self.log_line else "")
        return f'<div style="{CARD_STYLE}"><b>{html.escape(self.title)}</b>{table}{more}</div>'

    def _snippets(self) -> str:
        if not self.snippets:
            return ""
        texts = "".join(
            f'<div style="opacity:.7">{html.escape(name)}</div><pre style="margin:2px 0 8px">{html.escape(text)}</pre>'
            for name, text in self.snippets
        )
        return f"<details><summary>clients</summary>{texts}</details>"

    def _bar(self, name: str) -> str:
        if name != "KV blocks" or self.usage is None:
            return ""
        fill = f"width:{self.usage * 100:.1f}%;height:100%;display:block;background-color:#1976d2"
        return f'<span style="{_BAR_STYLE}"><span style="{fill}"></span></span>'


@dataclass(frozen=True)
class CodeText:
    """``text`` in ``language``; ``str()`` of it is the text. ``note`` stands below and is not part of it."""

    text: str
    language: str = "bash"
    note: str = ""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{self.text.rstrip()}\n\n{self.note}" if self.note else self.text.rstrip()

    def _repr_markdown_(self) -> str:
        note = f"\n\n{self.note}" if self.note else ""
        return fenced(self.text.rstrip("\n"), self.language) + note


def speed_text(first: Reply, *later: Reply) -> str:
    """Tokens, tokens per second, time to the first token and the prompt's cached part.

    Of a turn of several requests (the model called tools between them) the sums, and the first one's first token.
    """
    replies = (first, *later)
    num_tokens, num_thinking, num_prompt, num_cached = (
        sum(getattr(reply.usage, f"{name}_tokens") for reply in replies)
        for name in ("completion", "reasoning", "prompt", "cached")
    )
    rates = [
        (r.usage.completion_tokens, r.metrics.decode_rate(r.usage.completion_tokens)) for r in replies if r.metrics
    ]
    seconds = sum((count - 1) / rate for count, rate in rates if rate)
    waited = first.metrics.time_to_first_token if first.metrics else None
    parts = [
        f"{len(replies)} requests" if later else "",
        f"{num_tokens} tokens" + (f" ({num_thinking} thinking)" if num_thinking else ""),
        f"{sum(count - 1 for count, rate in rates if rate) / seconds:.1f} tokens/s" if seconds else "",
        f"first after {waited:.2f} s" if waited is not None else "",
        f"prompt{'s' * bool(later)} {num_prompt} tokens, {num_cached} cached",
    ]
    return " · ".join(part for part in parts if part)
