"""What a map with choices gave: a table of its first rows, with a bar for the probability of each label."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.batch.choices import CHOICE, COVERAGE
from engine.format.text import aligned, shortened
from vm_magic.show.safe_markdown import plain_html
from vm_magic.show.tables import row_html, table_html

if TYPE_CHECKING:
    import pandas

MAX_ROWS = 40
"""Rows that the picture shows; the DataFrame has all."""
MAX_BARS = 6
"""Labels of a row that are shown, the likeliest ones where there are more."""
MAX_TEXT = 240
MAX_LINE = 72
"""Characters of a cell in the text form, which shows the three likeliest labels."""
MEANS = "how probable it is that the model answers with one of these choices at all"
"""Of the coverage, for a pointer that rests on it."""
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:32em;padding:3px 12px 3px 0"
_BARS = "text-align:left;vertical-align:top;min-width:24em;padding:3px 12px 3px 0"


@dataclass(frozen=True)
class ChoiceRow:
    """One row: what it differs in, its likeliest label, labels with their probabilities, and the coverage.

    ``error`` is what went wrong instead.
    """

    differs: tuple[str, ...]
    choice: str
    shares: tuple[tuple[str, float], ...]
    coverage: float
    num_hidden: int = 0
    error: str = ""


@dataclass(frozen=True)
class ChoiceView:
    """A picture of a DataFrame of choices."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[ChoiceRow, ...]
    note: str = ""

    @staticmethod
    def shows(frame: "pandas.DataFrame") -> bool:
        """Whether ``frame`` is one of choices."""
        return CHOICE in frame.columns and COVERAGE in frame.columns

    @classmethod
    def of(cls, frame: "pandas.DataFrame") -> "ChoiceView":
        """The picture of ``frame``, the result of a map with choices."""
        names = list(frame.columns)
        before, labels = names[: names.index(CHOICE)], names[names.index(CHOICE) + 1 : names.index(COVERAGE)]
        differs = [name for name in before if frame[name].astype(str).nunique() > 1]
        if any(frame[name].dtype.kind not in "biuf" for name in differs if name != "prompt"):
            differs = [name for name in differs if name != "prompt"]  # what the template was filled with says it
        failed = int(frame["error"].notna().sum())
        same = [f"{name}={frame[name].iloc[0]}" for name in before if name not in (*differs, "prompt") and len(frame)]
        counts = f"{len(frame) - failed} prompts done" + (f", {failed} failed" if failed else "")
        rows = tuple(_row(row, differs, labels) for row in frame.head(MAX_ROWS).to_dict("records"))
        hidden = len(frame) - len(rows)
        note = f"… and {hidden} more rows; the DataFrame in _ has all" if hidden else ""
        caption = " · ".join([counts, f"{len(labels)} choices", *same])
        return cls(caption, (*differs, CHOICE, "probability", COVERAGE), rows, note)

    def __repr__(self) -> str:
        rows = [self.header, *(_text_cells(row) for row in self.rows)]
        short = [[shortened(" ".join(cell.split()), MAX_LINE) for cell in row] for row in rows]
        return "\n".join([self.caption, *aligned(short), *([self.note] if self.note else [])])

    def bundle(self) -> dict[str, Any]:
        """Both forms, for a display."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        styles = [_CELL] * (len(self.header) - 2) + [_BARS, _CELL]
        *names, last = map(html.escape, self.header)
        head = row_html([*names, f'<span title="{MEANS}">{last}</span>'], *styles, tag="th")
        table = table_html([row_html(_html_cells(row), *styles) for row in self.rows], head)
        return f"<div>{html.escape(self.caption)}</div>{table}<div>{html.escape(self.note)}</div>"


def _row(row: Mapping[Any, Any], differs: Sequence[str], labels: Sequence[str]) -> ChoiceRow:
    first = tuple(shortened(str(row[name]), MAX_TEXT) for name in differs)
    if isinstance(row["error"], str):
        return ChoiceRow(first, "", (), 0.0, error=shortened(row["error"], MAX_TEXT))
    shares = [(name[2:-1], float(row[name])) for name in labels]  # of p(LABEL)
    shown = shares if len(shares) <= MAX_BARS else sorted(shares, key=lambda share: -share[1])[:MAX_BARS]
    return ChoiceRow(first, str(row[CHOICE]), tuple(shown), float(row[COVERAGE]), len(shares) - len(shown))


def _text_cells(row: ChoiceRow) -> tuple[str, ...]:
    if row.error:
        return (*row.differs, "error", row.error, "")
    best = sorted(row.shares, key=lambda share: -share[1])[:3]
    shares = ", ".join(f"{shortened(label, 14)} {percent(share)}" for label, share in best)
    num_more = row.num_hidden + len(row.shares) - len(best)
    return (*row.differs, row.choice, shares + (f", {num_more} more" if num_more else ""), percent(row.coverage))


def _html_cells(row: ChoiceRow) -> tuple[str, ...]:
    first = tuple(map(plain_html, row.differs))
    if row.error:
        return (*first, "error", plain_html(row.error), "")
    bars = "".join(_bar(label, share, chosen=label == row.choice) for label, share in row.shares)
    more = f'<div style="opacity:.7">… and {row.num_hidden} more</div>' if row.num_hidden else ""
    return (*first, f"<b>{plain_html(row.choice)}</b>", bars + more, percent(row.coverage))


def _bar(label: str, share: float, *, chosen: bool) -> str:
    colour = "#1976d2" if chosen else "rgba(128,128,128,.55)"
    return (
        '<div style="display:flex;align-items:center;gap:6px;line-height:1.5">'
        f'<span style="flex:0 0 7em;overflow:hidden;text-overflow:ellipsis;white-space:nowrap" '
        f'title="{html.escape(label)}">{plain_html(label)}</span>'
        '<span style="flex:1 1 6em;min-width:3em;background:rgba(128,128,128,.15);border-radius:2px">'
        f'<span style="display:block;height:.8em;border-radius:2px;width:{100 * share:.1f}%;background:{colour}">'
        f'</span></span><span style="flex:0 0 4em;text-align:right">{percent(share)}</span></div>'
    )


def percent(share: float) -> str:
    """A probability for people: ``93.1%``, ``0.02%``, ``<0.01%``."""
    if share >= 0.01 or share == 0:
        return f"{100 * share:.1f}%"
    return f"{100 * share:.2f}%" if share >= 0.0001 else "<0.01%"
