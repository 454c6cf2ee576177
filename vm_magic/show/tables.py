"""Small tables with a text and an HTML form."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.format.text import aligned
from engine.memory.plan import LOG_LABEL
from engine.params.settings import Settings
from vm_magic.show.safe_markdown import plain_html

LEFT = "text-align:left"


def row_html(
    cells: Iterable[str],
    *styles: str,
    tag: Literal["td", "th"] = "td",
    row: str = "",
    titles: Sequence[str] | None = None,
) -> str:
    """One ``<tr>`` of ``cells`` (HTML); columns without a style of their own take the last of ``styles``.

    ``row`` is what stands in the row's own tag, ``titles`` what is shown while the mouse is over a cell.
    """
    start = f"<{tag}" if tag == "td" else '<th scope="col"'
    parts = []
    for i, cell in enumerate(cells):
        title = "" if titles is None else f' title="{html.escape(titles[i])}"'
        parts.append(f'{start}{title} style="{styles[min(i, len(styles) - 1)]}">{cell}</{tag}>')
    return (f"<tr {row}>" if row else "<tr>") + "".join(parts) + "</tr>"


def table_html(rows: Iterable[str], head: str = "", style: str = "") -> str:
    """A ``<table>`` of :func:`row_html`'s rows, under ``head`` if there is one."""
    body = "".join(rows)
    inner = f"<thead>{head}</thead><tbody>{body}</tbody>" if head else body
    return (f'<table style="{style}">' if style else "<table>") + inner + "</table>"


def log_line_html(line: str, style: str = "margin-top:4px", title: str = "") -> str:
    """vllm-metal's line of a plan, folded away for those who look for it; below ``title`` (HTML), if there is one."""
    faint = "" if title else ";opacity:.75"
    return (
        f'<details style="{style}"><summary style="cursor:pointer{faint}">{title or LOG_LABEL}</summary>'
        f'<code style="white-space:pre-wrap">{html.escape(line)}</code></details>'
    )


@dataclass(frozen=True)
class Table:
    """Rows under a header. ``note`` stands below; an empty table says only that."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __repr__(self) -> str:
        lines = aligned([self.header, *self.rows]) if self.rows else []
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        note = f"<div>{html.escape(self.note)}</div>" if self.note else ""
        if not self.rows:
            return note
        head = row_html(map(html.escape, self.header), LEFT, tag="th")
        body = [row_html(map(plain_html, row), LEFT) for row in self.rows]
        return table_html(body, head) + note


def settings_text(settings: Settings) -> str:
    """``preset=qwen-coding temperature=0.6 top_p=0.95 …``: the values set, the preset's included."""
    return " ".join(f"{name}={value}" for name, value in settings.everything().items())
