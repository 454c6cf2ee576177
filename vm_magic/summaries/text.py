"""Texts of a bounded length, whatever an object says of itself."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Any

from engine.format.text import aligned, shortened

CELL = 40
"""Most characters of one cell of a table."""
VALUE = 80
"""Most characters of one value in a list."""
_DEEPEST = 3


def bounded(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters; the end says how much was left out."""
    if len(text) <= limit:
        return text
    note = f"\n… ({len(text) - limit:,} more characters left out)"
    return text[: max(limit - len(note) - 1, 0)].rstrip() + note


def count(number: int, what: str) -> str:
    """``1,000 rows``, ``1 row``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def number(value: Any) -> str:
    """A number in few digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def short_repr(value: Any, longest: int = VALUE, depth: int = _DEEPEST) -> str:
    """``repr(value)`` in one line of about ``longest`` characters. Never raises; long containers are not read whole."""
    kind = type(value)
    try:
        if kind in (str, bytes, bytearray) and len(value) > longest:
            unit = "characters" if kind is str else "bytes"
            return f"{value[:longest]!r}… ({len(value):,} {unit})"
        if kind in _BRACKETS:
            return _container(value, longest, depth)
        return shortened(" ".join(repr(value).split()), longest)
    except Exception as error:  # noqa: BLE001 - the object is the user's
        return f"<{_name(kind)} whose repr raises {type(error).__name__}>"


def _name(kind: type) -> str:
    """Its name, whatever its metaclass makes of that."""
    try:
        return str(kind.__name__)
    except Exception:  # noqa: BLE001 - the metaclass is the user's
        return "object"


def plain_text(value: Any, longest: int = VALUE) -> str:
    """``str(value)``; where that fails, what :func:`short_repr` makes of it."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - the object is the user's
        return short_repr(value, longest)


_BRACKETS: Mapping[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    dict: ("{", "}"),
}


def _container(value: Any, longest: int, depth: int) -> str:
    opening, closing = _BRACKETS[type(value)]
    if not value:
        return repr(value)
    if depth == 0:
        return f"{opening}…{closing}"
    parts: list[str] = []
    left = longest
    for item in value.items() if isinstance(value, dict) else value:
        if left <= 0:
            parts.append(f"… {len(value) - len(parts):,} more")
            break
        pair = item if isinstance(value, dict) else (item,)
        parts.append(": ".join(short_repr(part, max(left, 8), depth - 1) for part in pair))
        left -= len(parts[-1]) + 2
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{opening}{', '.join(parts)}{comma}{closing}"


def cell_text(value: Any) -> str:
    """A value of a table in at most :data:`CELL` characters, without quotes."""
    if type(value) is str:
        text = value[: CELL + 1]
    elif type(value) is float:
        text = number(value)
    else:  # times as people write them
        text = str(value) if hasattr(type(value), "isoformat") else short_repr(value, CELL)
    return shortened(" ".join(text.split()), CELL)


def is_small(value: Any, limit: int) -> bool:
    """Whether ``str(value)`` of a container may have at most ``limit`` characters; looks at few of its items."""
    left, size = [value], 0
    while left:  # an item that stands in many places is written in each of them, so it counts in each
        one = left.pop()
        size += len(one) if isinstance(one, str | bytes | bytearray) else 1
        if size > limit:
            return False
        if isinstance(one, Mapping | list | tuple | AnySet):
            if len(one) > limit:
                return False
            items = itertools.chain(one.keys(), one.values()) if isinstance(one, Mapping) else one
            left += itertools.islice(items, limit + 1)
    return True


def names_text(names: Sequence[Any], most: int) -> str:
    """``a, b, … 3 more``."""
    shown = [shortened(str(name), CELL) for name in names[:most]]
    more = [f"… {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*shown, *more])


def fitting(lines: Iterable[str], limit: int, what: str, total: int, most: int | None = None) -> list[str]:
    """As many of ``lines`` as ``limit`` characters hold, at most ``most``; the last counts the others of ``total``."""
    shown: list[str] = []
    left = limit - 30
    for line in itertools.islice(lines, most):
        left -= len(line) + 1
        if left < 0:
            break
        shown.append(line)
    hidden = total - len(shown)
    return [*shown, *([f"… {hidden:,} more {what}".rstrip()] if hidden > 0 else [])]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with its columns below each other."""
    return aligned([header, *rows])
