"""The model card as HTML: what is wrong first, then facts by section with their sources, and the text to send."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vm_magic.show.safe_markdown import plain_html
from vm_magic.show.tables import row_html, table_html

if TYPE_CHECKING:
    from engine.model_card.card import Fact, ModelCard, Section

_FONT = (
    "padding:4px 0;max-width:1000px;font-family:var(--jp-ui-font-family,sans-serif);"
    "font-size:var(--jp-ui-font-size1,13px);color:var(--jp-ui-font-color1,inherit);line-height:1.45"
)
_CELL = "text-align:left;vertical-align:top;padding:1px 14px 1px 0;border:none"
_STYLES = (
    f"{_CELL};white-space:nowrap;font-weight:600",
    f"{_CELL};white-space:nowrap;opacity:.75",
    f"{_CELL};overflow-wrap:anywhere",
    f"{_CELL};opacity:.6;font-size:12px;overflow-wrap:anywhere",
)
_FIRST = "background:none;border-top:1px solid rgba(128,128,128,.35)"
_COLOURS = {"problem": "#b3403a", "remark": "#a8741d"}
_BOX = "margin:6px 0;padding:2px 0 2px 10px"


def model_card_html(card: "ModelCard") -> str:
    """All of a card; every text of the model's files is shown as text, never as markup."""
    rows = [row for section in card.sections for row in _rows(card, section)]
    origin = f' <span style="opacity:.7">from {plain_html(card.file)}</span>' if card.file else ""
    text = (
        '<details style="margin-top:8px"><summary style="cursor:pointer;opacity:.75">text to send</summary>'
        f'<pre style="white-space:pre-wrap;font-size:12px">{plain_html(str(card))}</pre></details>'
    )
    return (
        f'<div style="{_FONT}"><div><b>{plain_html(card.name)}</b>{origin}</div>'
        f"{_findings('problem', card.problems)}{_findings('remark', card.remarks)}"
        f"{table_html(rows, style='border-collapse:collapse;border:none;margin:8px 0 0;font-size:inherit')}{text}</div>"
    )


def _findings(kind: str, lines: Sequence[str]) -> str:
    """Lines in a box of their colour; without any problem, a line that says so."""
    if not lines:
        return f'<div style="{_BOX};border-left:3px solid #2a7857">no problems</div>' if kind == "problem" else ""
    count = f"{len(lines)} {kind}{'' if len(lines) == 1 else 's'}"
    items = "".join(f"<div>{plain_html(line)}</div>" for line in lines)
    colour = _COLOURS[kind]
    title = f'<div style="font-weight:600;color:{colour}">{count}</div>'
    return f'<div style="{_BOX};border-left:3px solid {colour}">{title}{items}</div>'


def _rows(card: "ModelCard", section: "Section") -> Iterator[str]:
    for place, fact in enumerate(section.facts):
        title = section.title if place == 0 else ""
        yield row_html(
            [plain_html(title), *_cells(card, fact)],
            *_STYLES,
            row=f'style="{_FIRST if place == 0 else "background:none"}"',
        )


def _cells(card: "ModelCard", fact: "Fact") -> list[str]:
    return [plain_html(fact.name), plain_html(fact.text), plain_html(card.shown_source(fact))]
