"""The panel as a picture that stays in a saved notebook: what is shown where there is no kernel to draw its widgets.

A front end that has the widgets hides it, by the style sheet that comes with them; without a kernel that sheet is not
there. JupyterLab writes an error in the place of widgets that are gone; the picture's own sheet hides that.
"""

import html
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from engine.runtime.activity import CACHED, FREE, BlockMap
from vm_magic.panel.pictures import WINDOW_SECONDS, Rates, rates_per_second
from vm_magic.panel.snapshot import NO_MODEL, PanelSnapshot
from vm_magic.panel.style import hiding_gone_widgets
from vm_magic.show.display_handle import Bundle, DisplayHandle
from vm_magic.show.plan_view import plan_picture_html
from vm_magic.show.tables import settings_text

_FRAME = (
    "border:1px solid rgba(128,128,128,.45);border-radius:8px;padding:8px 12px;max-width:940px;font-size:13px;"
    "line-height:1.45;font-family:var(--jp-ui-font-family,sans-serif);color:var(--jp-ui-font-color1,inherit)"
)
_LINE = "display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline"
_HEADING = "margin:10px 0 4px;font-weight:600"
_ROW = "display:flex;overflow:hidden;max-width:880px"
_BLUE, _GREY, _PALE = "#1e88e5", "#80808099", "#80808026"
"""Half transparent greys read on light and dark pages."""
_HIGH = 48
"""Pixels of the highest bar."""
_CLOSED = '<div style="opacity:.75">The panel was closed.</div>'


class Still:
    """The picture below each place where the panel is open, made anew when the session comes to rest or is changed."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._name = f"vm-still-{uuid.uuid4().hex[:12]}"
        self._handles: list[DisplayHandle] = []
        self._shown: Any = None
        self._latest = ""
        self._blocks: BlockMap | None = None

    @property
    def hiding_sheet(self) -> str:
        """What hides the picture where the widgets are: for the widgets to bring along."""
        return f"<style>.{self._name}, .jp-OutputArea-child:has(.{self._name}) {{ display: none; }}</style>"

    def open(self, shell: Any, snapshot: PanelSnapshot) -> None:
        """Show the picture below what was displayed last, and keep it up to date."""
        # A cell that captures its outputs changes the shell's publisher meanwhile: this one stays.
        handle = DisplayHandle(SimpleNamespace(display_pub=shell.display_pub))
        self._shown, self._latest = _state(snapshot), self._drawn(still_html(snapshot, self._clock()))
        handle(self._bundle())
        self._handles.append(handle)

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Draw it anew if what it shows has changed; not while tokens come."""
        if not self._handles or (snapshot.activity is not None and snapshot.activity.requests):
            return
        self._blocks = snapshot.blocks or self._blocks
        state = _state(snapshot)
        if state != self._shown:
            self._shown = state
            # Sections that draw no blocks ask for none: those seen last are about right.
            self._show(still_html(replace(snapshot, blocks=self._blocks), self._clock()))

    def close(self) -> None:
        """The panel is closed: nothing is left to be shown."""
        self._show(_CLOSED)
        self._handles.clear()

    def _show(self, body: str) -> None:
        self._latest = self._drawn(body)
        for handle in self._handles:
            handle(self._bundle())

    def _drawn(self, body: str) -> str:
        return f'{hiding_gone_widgets(self._name)}<div class="{self._name}">{body}</div>'

    def _bundle(self) -> Bundle:
        return {"text/html": self._latest, "text/plain": ""}


def _state(snapshot: PanelSnapshot) -> tuple[Any, ...]:
    """What the picture follows."""
    llm, activity = snapshot.llm, snapshot.activity
    tokens = None if activity is None else (activity.stats.generation_tokens, activity.stats.prompt_tokens)
    plan = None if llm is None else id(llm.plan)
    port = None if snapshot.session.server is None else snapshot.session.server.base_url
    return snapshot.remote, plan, port, tokens, settings_text(snapshot.session.settings)


def still_html(snapshot: PanelSnapshot, now: float) -> str:
    """What the panel shows, on one page: inline styles, no script."""
    return f'<div style="{_FRAME}">{_head(snapshot, now)}{_body(snapshot)}</div>'


def _head(snapshot: PanelSnapshot, now: float) -> str:
    llm, remote = snapshot.llm, snapshot.remote
    if remote is not None:
        name, place = remote.model, remote.base_url
    elif llm is not None:
        port = snapshot.session.server
        name, place = llm.args.names[0], "port closed" if port is None else port.base_url
    else:
        return f"<b>vllm_metal</b> {html.escape(NO_MODEL)}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    values = settings_text(snapshot.session.settings) or "sampling values: the model's own"
    parts = [f'<b style="font-size:15px">{html.escape(name)}</b>']
    parts += [f"<span>{html.escape(part)}</span>" for part in (place, values)]
    parts.append(f'<span style="opacity:.75">the panel on {when}; %vllm_metal panel opens it</span>')
    return f'<div style="{_LINE}">{"".join(parts)}</div>'


def _body(snapshot: PanelSnapshot) -> str:
    llm, activity = snapshot.llm, snapshot.activity
    drawn = []
    if llm is not None and activity is not None:
        if snapshot.blocks is not None:
            drawn.append(("KV blocks", blocks_html(snapshot.blocks)))
        drawn.append(("Generated tokens per second", throughput_html(activity)))
        drawn.append(("Memory", plan_picture_html(llm.plan)))
    elif snapshot.server is not None and snapshot.server.state is not None:
        drawn.append(("Generated tokens per second, all clients", throughput_html(snapshot.server)))
    return "".join(f'<div style="{_HEADING}">{title}</div>{picture}' for title, picture in drawn)


def blocks_html(blocks: BlockMap) -> str:
    """A bar of the blocks in use, cached and free. No SVG: it is taken out of untrusted notebooks."""
    cached, free = (int((blocks.owners == owner).sum()) for owner in (CACHED, FREE))
    used = blocks.num_blocks - cached - free
    pieces = (("used", used, _BLUE), ("cached", cached, _GREY), ("free", free, _PALE))
    bar = "".join(
        f'<div style="width:{100 * count / blocks.num_blocks:.2f}%;height:14px;background-color:{colour}"></div>'
        for _, count, colour in pieces
        if count
    )
    words = ", ".join(f"{count:,} {name}" for name, count, _ in pieces if count or name == "free")
    return f'<div style="{_ROW}">{bar}</div><div style="opacity:.75">{words}, of {blocks.block_size} tokens each</div>'


def throughput_html(activity: Rates) -> str:
    """A bar for every moment of the last minutes, in inline styles alone."""
    values = rates_per_second(activity)
    peak = max(values)
    if not peak:
        return '<div style="opacity:.75">No tokens in the last three minutes.</div>'
    heights = [round(_HIGH * value / peak) for value in values]
    bars = "".join(
        f'<div style="width:{100 / len(values):.3f}%;height:{height}px;margin-top:{_HIGH - height}px;'
        f'background-color:{_BLUE}"></div>'
        for height in heights
    )
    words = f"the last {WINDOW_SECONDS // 60} minutes; peak {peak:,.1f} tokens/s"
    return f'<div style="{_ROW}">{bars}</div><div style="opacity:.75">{words}</div>'
