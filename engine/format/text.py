"""Columns side by side, long texts cut, counts for people."""

import re
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> list[str]:
    """``rows`` as lines with their columns below each other; those from ``numbers_from`` on stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = len(widths) if numbers_from is None else numbers_from
    return [
        "  ".join(
            cell.ljust(width) if i < first else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def count_text(number: int) -> str:
    """A count as people read it: ``131,072``. Not for what is copied into a flag, or read by a program."""
    return f"{number:,}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` names, and how many more there are: ``a, b, c and 2 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortened(text: str, longest: int) -> str:
    """``text`` in at most ``longest`` characters, the last of them ``…`` if it is cut."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def one_line(text: str, longest: int) -> str:
    """``text`` without line breaks and other controls; of a longer one the middle is left out."""
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} … {text[len(text) - longest // 4 + 3 :]}"
    return _CONTROL.sub(" ", text)


REPLACEMENT = "\ufffd"
"""What bytes that are not a character decode to."""

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """``text`` as a terminal may show it: it moves no cursor, sets no title and no clipboard, and clears nothing.

    Tabs, line breaks and all that is printed stay. Other control characters become their pictures (``␛`` for escape),
    those of U+0080 to U+009F and halves of surrogate pairs U+FFFD. Each stands for itself, so a sequence that comes in
    pieces is as harmless. Marks of the direction of writing stay: texts in Arabic and Hebrew need them.
    """
    return _CONTROLS.sub(_picture, text.replace("\r\n", "\n"))


def harmless_line(text: str) -> str:
    """:func:`harmless`, for a text that stands within a line of ours: what turns the direction is U+FFFD too, for it
    would turn the words behind it."""
    return _TURNS.sub(REPLACEMENT, harmless(text))


def _picture(control: re.Match[str]) -> str:
    code = ord(control[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else REPLACEMENT


def is_count(text: str) -> bool:
    """Whether ``text`` is a whole number that ``int`` reads: str.isdigit() takes ² too, and any length."""
    return text.isascii() and text.isdigit() and len(text) < 20
