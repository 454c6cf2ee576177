"""The flags of ``chat`` that send something of the notebook along: ``--cells`` and ``--error``."""

import argparse
import re
from dataclasses import dataclass

from engine.format.text import is_count
from vm_magic.state.cell_record import MAX_CELLS


@dataclass(frozen=True)
class CellChoice:
    """Which cells: the ``last`` ones, or those of ``numbers`` (In numbers). ``text`` is what was typed."""

    text: str
    last: int = 0
    numbers: frozenset[int] = frozenset()


def add_context_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` ``--cells`` and ``--error``."""
    parser.add_argument(
        "--cells",
        type=cell_choice,
        metavar="N",
        help="send the last N executed cells along, with what they put out; 3-5 or 3,7: those In numbers. "
        "Cells of vm_magic are left out",
    )
    parser.add_argument(
        "--error",
        action="store_true",
        help="send the last traceback along, with the code around it; without a message it asks why that failed",
    )


def cell_choice(text: str) -> CellChoice:
    """``3`` (the last three), ``3-5`` or ``3,7`` (In numbers)."""
    if is_count(text):
        if not 1 <= int(text) <= MAX_CELLS:
            raise argparse.ArgumentTypeError(f"{text}: from 1 to {MAX_CELLS} cells can be sent")
        return CellChoice(text, last=int(text))
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not low <= high < low + MAX_CELLS:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither how many of the last cells (3) nor In numbers (3-5 or 3,7), at most {MAX_CELLS}"
            )
        numbers |= set(range(low, high + 1))
    return CellChoice(text, numbers=frozenset(numbers))
