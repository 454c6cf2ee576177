"""A run's step times as a picture: ours beside mlx-lm's and the floor, by the number of rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 400, 56, 64, 56
_BAR, _SPACE = 40, 4
_FONT = "font-family='sans-serif'"
_COLOURS = {"LLM": "#2563eb", "mlx-lm BatchGenerator": "#9ca3af", "floor": "#111827"}


@dataclass(frozen=True)
class Group:
    """Milliseconds per step at one number of rows, by who took them; ``floor`` may be among them."""

    rows: int
    times: Mapping[str, float]


def plot_file(run: Path, picture: Path) -> None:
    """Draw the JSON of a run as an SVG file. Raises ValueError where it holds no step times of bfloat16 weights."""
    picture.write_text(draw(json.loads(run.read_text(encoding="utf-8"))), encoding="utf-8")


def draw(run: Mapping[str, Any]) -> str:
    """The SVG text of a run."""
    groups = step_times(run["cases"])
    if not groups:
        raise ValueError("this run has no decode steps of bfloat16 weights")
    machine, sizes = run["machine"], run["settings"]["sizes"]
    card = machine["gpu"].split(",")[0] or machine["processor"]
    title = f"Decode step, {sizes['shape']} shape, bfloat16, {sizes['context']} tokens of context"
    below = f"{card}, {machine['date'][:10]}, commit {machine['commit'][:12]}, mlx {machine['packages'].get('mlx')}"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>",
            _text(_LEFT, 22, title, size=15),
            *_legend(groups),
            *_bars(groups),
            _text(_LEFT, _HEIGHT - 8, below, size=11, colour="#6b7280"),
            "</svg>\n",
        ]
    )


def step_times(cases: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The decode cases of bfloat16 weights, fewest rows first."""
    found = []
    for case in cases:
        settings = case["settings"]
        if settings.get("kind") == "decode" and settings["bits"] == 16:
            times = {name: case["median"][name] for name in _COLOURS if name in case["median"]}
            found.append(Group(settings["rows"], times | ({"floor": case["floor"]} if case["floor"] else {})))
    return sorted(found, key=lambda group: group.rows)


def _bars(groups: Sequence[Group]) -> Iterator[str]:
    most = max(time for group in groups for time in group.times.values())
    ground, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP - 16
    each = (_WIDTH - _LEFT) / len(groups)
    yield _text(_LEFT - 8, ground - room - 20, "ms", anchor="end", size=11)
    yield f"<line x1='{_LEFT}' y1='{ground}' x2='{_WIDTH - 12}' y2='{ground}' stroke='#6b7280'/>"
    for place, group in enumerate(groups):
        width = len(group.times) * (_BAR + _SPACE) - _SPACE
        left = _LEFT + place * each + (each - width) / 2
        for number, (name, time) in enumerate(group.times.items()):
            x, height = left + number * (_BAR + _SPACE), room * time / most
            yield (
                f"<rect x='{x:.1f}' y='{ground - height:.1f}' width='{_BAR}' height='{height:.1f}' "
                f"fill='{_COLOURS[name]}'><title>{escape(name)}: {time:.2f} ms</title></rect>"
            )
            yield _text(x + _BAR / 2, ground - height - 4, f"{time:.3g}", anchor="middle", size=11)
        label = f"{group.rows} row{'s' if group.rows > 1 else ''}"
        yield _text(left + width / 2, ground + 18, label, anchor="middle", size=13)


def _legend(groups: Sequence[Group]) -> Iterator[str]:
    x = _LEFT
    for name, colour in _COLOURS.items():
        if any(name in group.times for group in groups):
            yield f"<rect x='{x}' y='34' width='11' height='11' fill='{colour}'/>"
            yield _text(x + 16, 44, name, size=12)
            x += 40 + 7 * len(name)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int, colour: str = "#111827") -> str:
    style = f"{_FONT} font-size='{size}' text-anchor='{anchor}' fill='{colour}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(text)}</text>"
