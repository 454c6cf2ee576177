"""The panel's activity section: requests with a cancel button each, the map of blocks, throughput."""

import html
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ipywidgets as widgets

from engine.runtime.activity import RequestActivity
from vm_magic.panel.pictures import Palette, block_map_svg, short_id, throughput_svg
from vm_magic.panel.snapshot import NO_MODEL, PanelSnapshot, Source
from vm_magic.panel.speed import SpeedLine
from vm_magic.panel.style import faint, swatch

MOST_ROWS = 12
"""Requests with a row of their own; the others are counted."""
OLD = 1.0
"""Age in seconds from which on it is told."""
NO_REQUESTS = faint("No requests running. Run a ") + "<code>%%chat</code>" + faint(" cell or call the port.")
_NOTEBOOK_PREFIXES = ("req-", "remote-")
COLUMNS = ("request", "state", "prompt", "tokens", "speed", "first token", "temp.")
_WIDTHS: Mapping[str, tuple[str, str]] = {
    "request": ("minmax(150px, 2fr)", ""),
    "state": ("84px", "minmax(56px, 72px)"),
    "prompt": ("116px", "minmax(60px, 1fr)"),
    "tokens": ("82px", "minmax(42px, 58px)"),
    "speed": ("92px", "minmax(70px, 84px)"),
    "first token": ("92px", "minmax(70px, 84px)"),
    "temp.": ("minmax(60px, 1fr)", "42px"),
}
"""Of columns: in one line, and where there is no room for that, in a line below the request's name."""


class RequestRow:
    """One row of the table, used for one request after another."""

    def __init__(self, cancel: Callable[[str], None], columns: Sequence[str]) -> None:
        self._cancel = cancel
        self._columns = columns
        self._request_id: str | None = None
        self.text = widgets.HTML(layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        self.button = widgets.Button(
            description="Cancel", layout=widgets.Layout(width="74px", height="24px", flex="0 0 auto")
        )
        self.widget = widgets.HBox(
            [self.text, self.button], layout=widgets.Layout(align_items="center", display="none")
        )
        self.button.on_click(self._clicked)

    def show(self, request: RequestActivity | None, palette: Palette) -> None:
        """Show ``request``, or nothing."""
        wanted = None if request is None else request.request_id
        if wanted != self._request_id:
            self._request_id = wanted
            self.widget.layout.display = "none" if request is None else "flex"
            self.button.disabled = False
            self.button.tooltip = "" if wanted is None else f"end request {wanted} now"
        if request is not None:
            self.text.value = row_html(request, palette, self._columns)

    def _clicked(self, _: Any) -> None:
        if self._request_id is not None:
            self.button.disabled = True
            self._cancel(self._request_id)


class ActivitySection:
    """Who runs, who waits, whose blocks are where."""

    title = "Activity"
    wants_blocks = True
    columns: tuple[str, ...] = COLUMNS

    def __init__(self, lock: AbstractContextManager[Any], wake: Callable[[], None]) -> None:
        self._lock = lock
        self._wake = wake
        self._source: Source | None = None
        self.palette = Palette()
        self.header = widgets.HTML()
        self.rows = [RequestRow(self._cancel, self.columns) for _ in range(MOST_ROWS)]
        self.more = widgets.HTML()
        self.blocks = widgets.HTML()
        self.throughput = widgets.HTML()
        self.speed = SpeedLine(lock, wake)
        rows = (row.widget for row in self.rows)
        self.widget = widgets.VBox([self.header, *rows, self.more, self.blocks, self.throughput, self.speed.widget])

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Show the requests, the blocks and the speed as they are."""
        self._source = snapshot.source
        activity = snapshot.activity
        if activity is None:
            self._show_nothing()
            return
        names = [request.request_id for request in activity.requests]
        drawn = () if snapshot.blocks is None else snapshot.blocks.request_ids
        self.palette.assign(list(dict.fromkeys([*drawn, *names])))
        if snapshot.blocks is not None:
            self.blocks.value = f"<h4>KV blocks</h4>{block_map_svg(snapshot.blocks, self.palette)}"
        self._show_requests(activity.requests)
        if activity.age >= OLD:
            self.more.value += faint(f"As of {activity.age:.0f} s ago, when the step that runs now began.")
        self.throughput.value = f"<h4>Generated tokens per second</h4>{throughput_svg(activity)}"
        if snapshot.llm is not None:
            self.speed.refresh(snapshot.llm, activity)

    def _show_nothing(self) -> None:
        self.header.value = faint(NO_MODEL)
        for row in self.rows:
            row.show(None, self.palette)
        self.more.value = self.blocks.value = self.throughput.value = ""
        self.speed.show_nothing()

    def _show_requests(self, requests: Sequence[RequestActivity], none: str = NO_REQUESTS) -> None:
        self.header.value = header_html(self.columns) if requests else none
        for index, row in enumerate(self.rows):
            row.show(requests[index] if index < len(requests) else None, self.palette)
        others = len(requests) - len(self.rows)
        self.more.value = faint(f"and {others:,} more") if others > 0 else ""

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            source = self._source
        if source is not None:
            source.abort(request_id)
            self._wake()


def header_html(columns: Sequence[str]) -> str:
    """The table's header."""
    cells = "".join(f'<span class="vmp-faint">{name}</span>' for name in columns)
    row = f'<div class="vmp-req" style="{_grid(columns)}">{cells}</div>'
    return f'<div class="vmp-line" style="padding-right:80px">{row}</div>'


def row_html(request: RequestActivity, palette: Palette, columns: Sequence[str] = COLUMNS) -> str:
    """A request as the cells of a row."""
    origin = "notebook" if request.request_id.startswith(_NOTEBOOK_PREFIXES) else "port"
    speed = "" if request.tokens_per_second is None else f"{request.tokens_per_second:.1f} tok/s"
    first = request.time_to_first_token
    cells = {
        "request": f"{swatch(palette.colour(request.request_id))}"
        f"<code>{html.escape(short_id(request.request_id))}</code> {faint(origin)}",
        "state": _state_text(request),
        "prompt": _prompt_text(request) if "prompt" in columns else "",
        "tokens": f"{request.num_output_tokens:,}",
        "speed": speed,
        "first token": f"{request.age:.0f} s so far" if first is None else f"{first:.2f} s",
        "temp.": f"{request.params.temperature:g}",
    }
    title = html.escape(request.request_id)
    spans = "".join(f'<span class="vmp-num">{cells[name]}</span>' for name in columns)
    row = f'<div class="vmp-req" style="{_grid(columns)}" title="{title}" data-request="{title}">{spans}</div>'
    return f'<div class="vmp-line">{row}</div>'


def _state_text(request: RequestActivity) -> str:
    if request.state == "running":
        return "thinking" if request.thinking else "running"
    return request.state if request.place is None else f"{request.state} #{request.place}"


def _prompt_text(request: RequestActivity) -> str:
    if request.state == "running" and request.prompt_share < 1:
        return f"{request.prompt_share:.0%} of {request.num_prompt_tokens:,}"
    share = request.cached_share
    return f"{request.num_prompt_tokens:,}" + ("" if not share else f", {share:.0%} cached")


def _grid(columns: Sequence[str]) -> str:
    wide, narrow = (" ".join(_WIDTHS[name][i] for name in columns) for i in (0, 1))
    return f"--vmp-wide:{wide};--vmp-narrow:{narrow.strip()}"
