"""Pictures as inline SVG: the map of KV blocks, and throughput as a line. No script, no canvas."""

import html
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.format.text import shortened
from engine.runtime.activity import CACHED, FREE, SHARED, BlockMap, Rate
from vm_magic.panel.style import COLOURS, SHARED_COLOUR, faint, swatch

COLUMNS = 80
MOST_CELLS = COLUMNS * 12
CELL, GAP = 10, 2
_LEGEND = "display:flex;flex-wrap:wrap;gap:2px 14px;margin-top:4px;font-variant-numeric:tabular-nums"
WINDOW_SECONDS, BUCKET_SECONDS = 180, 3
_WIDTH, _HEIGHT = 480, 64
_FREE, _CACHED, _SHARED = "free", "cached", "shared"


class Rates(Protocol):
    """Tokens per second of the last minutes: the engine's activity, or a remote server's."""

    @property
    def rates(self) -> tuple[Rate, ...]:
        """An entry per second with tokens, oldest first."""

    @property
    def second(self) -> int:
        """The clock's now."""


class Palette:
    """Gives every request a colour that stays its own while it runs."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def assign(self, request_ids: Sequence[str]) -> None:
        """Note which requests there are; the colours of those that are gone become free."""
        self._taken = {name: number for name, number in self._taken.items() if name in set(request_ids)}
        for name in request_ids:
            if name not in self._taken:
                used = set(self._taken.values())
                self._taken[name] = next(number for number in range(len(used) + 1) if number not in used)

    def colour(self, request_id: str) -> str:
        """The colour of a request; one that is not known (any more) has the shared colour."""
        number = self._taken.get(request_id)
        return SHARED_COLOUR if number is None else COLOURS[number % len(COLOURS)]


def block_map_svg(blocks: BlockMap, palette: Palette) -> str:
    """The pool as a grid, a cell per block or per bin of blocks, with a legend; of a large pool, the part in use.

    A bin has the colour of whoever holds most of its used blocks, paler where much of it is unused.
    """
    num_shown = _num_shown(blocks)
    per_cell = max(1, -(-num_shown // MOST_CELLS))
    cells = _bins(blocks, num_shown, per_cell)
    num_cells = -(-num_shown // per_cell)
    num_rows = -(-num_cells // COLUMNS)
    width, height = COLUMNS * (CELL + GAP), num_rows * (CELL + GAP)
    paths = "".join(
        _path(kind, _fill(kind, strength, blocks, palette), places)
        for (kind, strength), places in sorted(cells.items())
    )
    counts = f"{blocks.num_blocks:,} blocks of {blocks.block_size} tokens"
    if per_cell > 1:
        counts += f", {per_cell:,} to a square"
    if num_shown < blocks.num_blocks:
        counts += f"; the first {num_shown:,} shown, the rest is free"
    return (
        f'<svg class="vmp-blocks" role="img" aria-label="{counts}" viewBox="0 0 {width} {height}" '
        f'style="width:100%;max-width:{width}px;height:auto;display:block" data-cells="{num_cells}">{paths}</svg>'
        f'<div style="{_LEGEND}">{_legend(blocks, palette)}{faint(counts)}</div>'
    )


def _num_shown(blocks: BlockMap) -> int:
    """All blocks of a small pool; of a large one those up to the last in use, in powers of two so that it stays."""
    used = np.flatnonzero(blocks.owners != FREE)
    num_shown = MOST_CELLS
    while used.size and num_shown <= used[-1]:
        num_shown *= 2
    return min(num_shown, blocks.num_blocks)


def _bins(blocks: BlockMap, num_shown: int, per_cell: int) -> dict[tuple[str, int], list[int]]:
    """(kind, strength from 1 to 4) -> cells; a kind is a state or a request's number."""
    num_kinds = len(blocks.request_ids) + 3
    padded = np.full(-(-num_shown // per_cell) * per_cell, FREE, np.int32)
    padded[:num_shown] = blocks.owners[:num_shown]
    cell = np.arange(len(padded)) // per_cell
    counts = np.bincount(cell * num_kinds + padded + 3, minlength=(cell[-1] + 1) * num_kinds).reshape(-1, num_kinds)
    held = counts.copy()
    held[:, FREE + 3] = 0
    held[:, CACHED + 3] = 0
    best = _best_kind(counts, held)
    used = np.where(held.sum(1) > 0, held.sum(1), counts[:, CACHED + 3])
    strength = np.clip(np.ceil(4 * used / per_cell), 1, 4).astype(int)
    found: dict[tuple[str, int], list[int]] = {}
    for place, (kind, strong) in enumerate(zip(best.tolist(), strength.tolist(), strict=True)):
        found.setdefault((_kind_name(kind - 3), strong), []).append(place)
    return found


def _best_kind(counts: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.int64]:
    cached = np.where(counts[:, CACHED + 3] > 0, CACHED + 3, FREE + 3)
    best: NDArray[np.int64] = np.where(held.sum(1) > 0, held.argmax(1), cached)
    return best


def _kind_name(owner: int) -> str:
    return {FREE: _FREE, CACHED: _CACHED, SHARED: _SHARED}.get(owner, str(owner))


def _path(kind: str, fill: str, places: Sequence[int]) -> str:
    """All cells of one colour as one path; neighbours in a row are drawn as one step each."""
    steps = "".join(
        f"M{place % COLUMNS * (CELL + GAP)} {place // COLUMNS * (CELL + GAP)}h{CELL}v{CELL}h-{CELL}z"
        for place in places
    )
    return f'<path data-kind="{kind}" data-count="{len(places)}" d="{steps}" {fill}/>'


def _fill(kind: str, strength: int, blocks: BlockMap, palette: Palette) -> str:
    if kind == _FREE:
        return 'fill="currentColor" fill-opacity="0.09"'
    if kind == _CACHED:
        return f'fill="currentColor" fill-opacity="{0.12 + 0.07 * strength:.2f}"'
    colour = SHARED_COLOUR if kind == _SHARED else palette.colour(blocks.request_ids[int(kind)])
    return f'fill="{colour}" fill-opacity="{0.4 + 0.15 * strength:.2f}"'


def _legend(blocks: BlockMap, palette: Palette) -> str:
    owners = blocks.owners
    entries = [
        (f"used by {short_id(name)}", palette.colour(name), int((owners == index).sum()))
        for index, name in enumerate(blocks.request_ids[: len(COLOURS)])
    ]
    entries += [
        ("shared prefix", SHARED_COLOUR, int((owners == SHARED).sum())),
        ("cached", "color-mix(in srgb, currentColor 40%, transparent)", int((owners == CACHED).sum())),
        ("free", "color-mix(in srgb, currentColor 9%, transparent)", int((owners == FREE).sum())),
    ]
    shown = [entry for entry in entries if entry[2] or entry[0] == "free"]
    return "".join(
        f'<span class="vmp-num">{swatch(colour)}{html.escape(name)} {count:,}</span>' for name, colour, count in shown
    )


def short_id(request_id: str) -> str:
    """A request's id, cut where it is long."""
    return shortened(request_id, 16)


def rates_per_second(activity: Rates) -> list[float]:
    """Generated tokens per second over :data:`WINDOW_SECONDS`, one value per :data:`BUCKET_SECONDS`, oldest first."""
    end = activity.second // BUCKET_SECONDS + 1
    tokens = [0] * (WINDOW_SECONDS // BUCKET_SECONDS + 1)
    for rate in activity.rates:
        place = rate.second // BUCKET_SECONDS - end + len(tokens)
        if 0 <= place < len(tokens):
            tokens[place] += rate.generation_tokens
    *whole, under_way = tokens
    if any(whole):
        return [count / BUCKET_SECONDS for count in whole]
    return [*([0.0] * (len(whole) - 1)), under_way / (activity.second % BUCKET_SECONDS + 1)]


def throughput_svg(activity: Rates) -> str:
    """Tokens per second over the last minutes: an area under a line, the peak named."""
    values = rates_per_second(activity)
    peak = max(values)
    if not peak:
        return f"<div>{faint('No tokens in the last three minutes.')}</div>"
    step = _WIDTH / (len(values) - 1)
    points = " ".join(
        f"{index * step:.0f},{_HEIGHT - 2 - value / peak * (_HEIGHT - 8):.1f}" for index, value in enumerate(values)
    )
    colour = "var(--jp-brand-color1, #1976d2)"
    label = f"peak {peak:,.1f} tokens/s"
    return (
        f'<svg role="img" aria-label="generated tokens per second, {label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'preserveAspectRatio="none" style="width:100%;max-width:960px;height:{_HEIGHT}px;display:block">'
        f'<polygon points="0,{_HEIGHT} {points} {_WIDTH},{_HEIGHT}" style="fill:{colour}" fill-opacity=".15"/>'
        f'<polyline points="{points}" style="stroke:{colour}" fill="none" stroke-width="1.5" '
        f'vector-effect="non-scaling-stroke"/></svg>'
        f'<div style="{_LEGEND};max-width:960px">{faint(f"{WINDOW_SECONDS // 60} minutes ago")}'
        f'<span style="flex:1"></span>{faint(label)}<span style="flex:1"></span>{faint("now")}</div>'
    )
