"""How near steps came to the device's best, and why not nearer: as lines and as HTML."""

import html
from collections.abc import Sequence

from engine.explain.speed import Reason, Speed

WHY = "why not faster"
NOTHING = "nothing that the engine knows of"
_ESTIMATED = "estimated: "


def speed_lines(speed: Speed) -> list[str]:
    """All of it as text."""
    lines = [*speed.lines, *([speed.missing] if speed.missing else [])]
    if speed.reasons:
        lines += [f"{WHY}:", *(f"  - {reason}" for reason in speed.reasons)]
    return lines + [f"{_ESTIMATED}{'; '.join(speed.estimates)}"] * bool(speed.estimates)


def speed_html(speed: Speed) -> str:
    """The same with the reasons folded away, inline and without script."""
    shown = [*speed.lines, *([f"speed: {speed.missing}"] if speed.missing else [])]
    lines = "".join(f'<div style="margin:2px 0">{html.escape(line)}</div>' for line in shown)
    if not speed.reasons:
        return lines + _estimated(speed)
    body = f"{reasons_html(speed.reasons)}{_estimated(speed)}"
    return f'{lines}<details style="margin:2px 0"><summary style="cursor:pointer">{WHY}</summary>{body}</details>'


def reasons_html(reasons: Sequence[Reason]) -> str:
    """A list: what took time, and what would help."""
    items = "".join(
        f"<li>{html.escape(reason.what)}"
        + (f'<span style="opacity:.75"> · what helps: {html.escape(reason.help)}</span>' if reason.help else "")
        + "</li>"
        for reason in reasons
    )
    return f'<ul style="margin:2px 0;padding-left:1.4em">{items}</ul>'


def _estimated(speed: Speed) -> str:
    if not speed.estimates:
        return ""
    return f'<div style="opacity:.75">{_ESTIMATED}{html.escape("; ".join(speed.estimates))}</div>'
