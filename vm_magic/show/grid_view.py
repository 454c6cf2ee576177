"""What a map or grid gave, as a table of its first rows."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.format.text import aligned, shortened
from vm_magic.show.safe_markdown import plain_html
from vm_magic.show.tables import LEFT, row_html, table_html

if TYPE_CHECKING:
    import pandas

MAX_ROWS = 40
"""Rows that the picture shows; the DataFrame has all."""
MAX_TEXT = 700
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:48em;padding:3px 12px 3px 0"
_RESULT_COLUMNS = (
    *("prompt", "text", "reasoning", "tokens", "prompt_tokens", "cached_tokens", "time", "finish_reason", "error"),
)


@dataclass(frozen=True)
class GridView:
    """A picture of a grid's DataFrame: whole texts, and only the columns in which rows differ."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @classmethod
    def of(cls, frame: "pandas.DataFrame") -> "GridView":
        """The picture of ``frame``, a map's or grid's result."""
        before = [name for name in frame.columns if name not in _RESULT_COLUMNS]
        varied = [name for name in before if frame[name].astype(str).nunique() > 1]
        same = [f"{name}={frame[name].iloc[0]}" for name in before if name not in varied and len(frame)]
        if frame["prompt"].nunique() > 1 and all(frame[name].dtype.kind in "biuf" for name in varied):
            varied.append("prompt")
        failed = int(frame["error"].notna().sum())
        cut = int((frame["finish_reason"] == "abort").sum())
        parts = [
            f"{len(frame) - failed - cut} prompts done"
            + (f", {failed} failed" if failed else "")
            + (f", {cut} cut off" if cut else ""),
            f"{int(frame['tokens'].fillna(0).sum())} tokens",
            *same,
        ]
        rows = tuple(_view_row(row, varied) for row in frame.head(MAX_ROWS).to_dict("records"))
        hidden = len(frame) - len(rows)
        note = f"… and {hidden} more rows; the DataFrame in _ has all" if hidden else ""
        return cls(" · ".join(parts), (*varied, "text", "tokens", "seconds", "finish"), rows, note)

    def __repr__(self) -> str:
        rows = [[shortened(" ".join(cell.split()), 60) for cell in row] for row in (self.header, *self.rows)]
        return "\n".join([self.caption, *aligned(rows), *([self.note] if self.note else [])])

    def bundle(self) -> dict[str, Any]:
        """Both forms, for a display."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        head = row_html(map(html.escape, self.header), LEFT, tag="th")
        table = table_html([row_html(map(plain_html, row), _CELL) for row in self.rows], head)
        return f"<div>{html.escape(self.caption)}</div>{table}<div>{html.escape(self.note)}</div>"


def _view_row(row: Mapping[Any, Any], varied: Sequence[str]) -> tuple[str, ...]:
    failed = isinstance(row["error"], str)
    text = row["error"] if failed else str(row["text"])
    numbers = (
        ("", "") if failed else (str(row["tokens"]), f"{float(row['time']):.2f}" if row["time"] == row["time"] else "")
    )
    first = (shortened(str(row[name]), MAX_TEXT // 3) for name in varied)
    return (*first, shortened(text, MAX_TEXT), *numbers, "error" if failed else str(row["finish_reason"]))
