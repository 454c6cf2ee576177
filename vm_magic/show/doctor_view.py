"""What ``%vllm_metal doctor`` found, as HTML: what is wrong first, each with what to do, then what is well."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vm_magic.show.cards import CARD_STYLE
from vm_magic.show.safe_markdown import plain_html
from vm_magic.show.tables import row_html, table_html

if TYPE_CHECKING:
    from engine.checkup.findings import Examination, Finding

_COLOURS = {"problem": "#b3403a", "warning": "#a8741d", "ok": "#2a7857"}
_CELL = "text-align:left;vertical-align:top;padding:1px 14px 1px 0;border:none"
_STYLES = (
    f"{_CELL};white-space:nowrap",
    f"{_CELL};white-space:nowrap;opacity:.75",
    f"{_CELL};white-space:nowrap",
    f"{_CELL};overflow-wrap:anywhere",
)
_TABLE = "border-collapse:collapse;border:none;margin:4px 0 0;font-size:inherit"


def examination_html(found: "Examination") -> str:
    """All findings; those that ask for something stand above the others, which are folded behind them."""
    wanting = [*found.of_state("problem"), *found.of_state("warning")]
    fine = found.of_state("ok")
    rest = _table(fine)
    if wanting:
        summary = f'<summary style="cursor:pointer;opacity:.75">{len(fine)} things that are well</summary>'
        rest = f'{_table(wanting)}<details style="margin-top:6px">{summary}{rest}</details>'
    return f'<div style="{CARD_STYLE};max-width:1000px"><b>{plain_html(found.title)}</b>{rest}</div>'


def _table(findings: "Sequence[Finding]") -> str:
    return table_html([row for finding in findings for row in _rows(finding)], style=_TABLE)


def _rows(finding: "Finding") -> Iterator[str]:
    state = f'<span style="color:{_COLOURS[finding.state]};font-weight:600">{finding.state}</span>'
    fix = f"<div><b>→</b> {plain_html(finding.fix)}</div>" if finding.fix else ""
    cells = [state, plain_html(finding.area), plain_html(finding.name), plain_html(finding.text) + fix]
    yield row_html(cells, *_STYLES, row='style="background:none"')
