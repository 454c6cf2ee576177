"""Columns side by side, long texts cut, counts for people."""

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


def shortened(text: str, longest: int) -> str:
    """``text`` in at most ``longest`` characters, the last of them ``…`` if it is cut."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


REPLACEMENT = "\ufffd"
"""What bytes that are not a character decode to."""


def is_count(text: str) -> bool:
    """Whether ``text`` is a whole number that ``int`` reads: str.isdigit() takes ² too, and any length."""
    return text.isascii() and text.isdigit() and len(text) < 20
