"""The memory plan as HTML: a stacked bar with its legend, what it means for requests, a table of groups."""

import html
from typing import TYPE_CHECKING

from engine.memory.plan import GROUP_HEADER, Part, PartKind, group_rows, layer_ranges, parts, summary, verdict
from engine.memory.plan_table import MEANINGS
from engine.params.sizes import exact_size, gb
from vm_magic.show.tables import log_line_html, row_html, table_html

if TYPE_CHECKING:
    from engine.memory.plan import MemoryPlan
    from engine.memory.plan_table import PlanTable

_COLOURS: dict[PartKind, str] = {
    "weights": "#3d6aad", "overhead": "#75589f", "windows": "#a8511d", "states": "#a03a6b", "kv": "#2a7857",
    "outside": "rgba(128,128,128,.16)",
}  # fmt: skip
"""Dark enough for white letters, light enough for a dark theme; plain colours pass JupyterLab's sanitizer."""
_HATCH = ";background-image:repeating-linear-gradient(45deg,rgba(128,128,128,.22) 0 5px,transparent 5px 10px)"
_LINE = "rgba(128,128,128,.45)"
_FONT = (
    "padding:4px 0;font-family:var(--jp-ui-font-family,sans-serif);font-size:var(--jp-ui-font-size1,13px);"
    "color:var(--jp-ui-font-color1,inherit);line-height:1.45"
)
_BAR = f"display:flex;gap:1px;height:36px;border-radius:6px;overflow:hidden;border:1px solid {_LINE}"
_CELL = "padding:2px 12px 2px 0;text-align:right;white-space:nowrap;border:none"
_GRID = "border-collapse:collapse;border:none;margin:8px 0 0;font-size:inherit"
_HEAD = f'style="border-bottom:1px solid {_LINE}"'
_WIDE, _NARROW = 0.17, 0.08
"""Shares of the bar from which a piece carries its name and size, or its size alone."""


def plan_html(plan: "MemoryPlan") -> str:
    """All of a plan: the verdict, the picture, what it means, its groups, and vllm-metal's line to copy."""
    meaning = "".join(f"<div>{html.escape(line)}</div>" for line in summary(plan))
    line = log_line_html(plan.log_line(), "margin-top:8px")
    return (
        f'<div style="max-width:880px;{_FONT}"><div style="margin-bottom:6px"><b>{html.escape(verdict(plan))}</b></div>'
        f"{_headline(plan)}{plan_picture_html(plan)}"
        f'<div style="margin-top:8px">{meaning}</div>{_groups(plan)}{line}</div>'
    )


def plan_picture_html(plan: "MemoryPlan") -> str:
    """A stacked bar over the whole device and its legend; inline, without script, to embed anywhere."""
    pieces = [part for part in parts(plan) if part.num_bytes > 0]
    spoken = ", ".join(f"{part.name} {exact_size(part.num_bytes)}" for part in pieces)
    label = f"memory of {gb(plan.device_limit)}: {spoken}"
    bar = "".join(_piece(part, part.num_bytes / plan.device_limit) for part in pieces)
    legend = "".join(_legend(part) for part in pieces)
    return (
        f'<div role="img" aria-label="{html.escape(label)}" style="{_BAR}">{bar}</div>'
        f'<div style="margin-top:6px;display:grid;grid-template-columns:max-content max-content 1fr;'
        f'column-gap:10px;row-gap:1px">{legend}</div>'
    )


def plan_table_html(table: "PlanTable") -> str:
    """Plans side by side; what does not fit says how much is missing."""
    cells = map(html.escape, table.header)
    titles = [MEANINGS.get(name, "") for name in table.header]
    head = row_html(cells, f"{_CELL};font-weight:600", tag="th", row=_HEAD, titles=titles)
    rows = [
        row_html(map(html.escape, cells), _CELL, row=f'style="background:none;{"" if row.fits else "opacity:.65"}"')
        for row, cells in zip(table.rows, table.cells(), strict=True)
    ]
    return f'<div style="{_FONT};overflow-x:auto">{table_html(rows, head, _GRID)}</div>'


def _headline(plan: "MemoryPlan") -> str:
    return (
        f'<div style="margin-bottom:4px"><b>{gb(plan.device_limit)}</b> × {plan.fraction:.2f} '
        f"({html.escape(plan.inputs.memory_flag)}) = <b>{gb(plan.usable)}</b> usable</div>"
    )


def _piece(part: Part, share: float) -> str:
    text = f"<b>{exact_size(part.num_bytes)}</b>" if share >= _NARROW else ""
    if share >= _WIDE:
        text = f"{part.name}&nbsp;{text}"
    colour = "inherit" if part.kind == "outside" else "#fff"
    title = html.escape(f"{part.name}: {exact_size(part.num_bytes)}, {part.remark}")
    return (
        f'<div title="{title}" style="flex:{share:.6f} 1 0;'
        f"min-width:3px;background-color:{_colour(part)};color:{colour};display:flex;align-items:center;"
        f'justify-content:center;overflow:hidden;white-space:nowrap;font-size:12px">{text}</div>'
    )


def _colour(part: Part) -> str:
    return _COLOURS[part.kind] + (_HATCH if part.kind == "outside" else "")


def _legend(part: Part) -> str:
    swatch = (
        f"display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px;"
        f"background-color:{_colour(part)};border:1px solid {_LINE if part.kind == 'outside' else 'transparent'}"
    )
    return (
        f'<span><span style="{swatch}"></span>{part.name}</span>'
        f'<span style="text-align:right;font-variant-numeric:tabular-nums">{exact_size(part.num_bytes)}</span>'
        f'<span style="opacity:.75">{html.escape(part.remark)}</span>'
    )


def _groups(plan: "MemoryPlan") -> str:
    left = _CELL.replace("right", "left")
    bold = [f"{style};font-weight:600" for style in (left, left, _CELL)]
    layers_of = [*(group.layers for group in plan.groups), plan.inputs.shared_layers]
    rows = [
        row_html(map(html.escape, cells), left, left, _CELL, row=f'title="layers {ranges}" style="background:none"')
        for cells, ranges in zip(group_rows(plan), map(layer_ranges, layers_of), strict=False)
    ]
    return table_html(rows, row_html(GROUP_HEADER, *bold, tag="th", row=_HEAD), _GRID)
