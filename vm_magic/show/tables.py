"""Small tables with a text and an HTML form."""

import html
from dataclasses import dataclass

from engine.params.settings import Settings
from vm_magic.show.safe_markdown import plain_html


@dataclass(frozen=True)
class Table:
    """Rows under a header. ``note`` stands below; an empty table says only that."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __repr__(self) -> str:
        lines = [self.header, *self.rows] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        note = f"<div>{html.escape(self.note)}</div>" if self.note else ""
        if not self.rows:
            return note
        head = "".join(f'<th style="text-align:left">{html.escape(cell)}</th>' for cell in self.header)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{plain_html(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def settings_text(settings: Settings) -> str:
    """``preset=qwen-coding temperature=0.6 top_p=0.95 …``: what is in force, the preset's values included."""
    return " ".join(f"{name}={value}" for name, value in settings.everything().items())
