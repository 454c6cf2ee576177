"""Markdown that is still being written, without what may yet change its kind: what is shown does not jump."""

import re

from vm_magic.show.safe_markdown import open_fence

_UNDECIDED = re.compile(r"^\s*(?:[-=*+_#>|:~` ]+|\d+[.)]?\s*|[-*+]\s*\[[ xX]?\]?\s*)$")
"""A last line that may become a heading's underline, a list, a rule, a fence or a table."""
_DELIMITER_ROW = re.compile(r"^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})")


def steady(text: str) -> str:
    """``text`` without an end that the next words would turn into something else, and with open marks closed."""
    *lines, last = text.split("\n")
    before = "\n".join(lines)
    fence = open_fence(before)
    if fence is not None:
        closing = bool(last.strip()) and not last.strip().strip(fence[0])
        return before if closing and open_fence(text) is not None else text
    if open_fence(text) is not None:
        return before  # the fence's own line: its language is not complete yet
    if _UNDECIDED.match(last):
        last = ""
    return _with_closed_marks(_without_half_table([*lines, last]))


def _without_half_table(lines: list[str]) -> list[str]:
    """Hold back a table's head until the row below it is complete, and each row until it is: bars are not text."""
    end = len(lines) - (lines[-1] == "")
    start = end
    while start and "|" in lines[start - 1]:
        start -= 1
    block = lines[start:end]
    if not block or not block[0].lstrip().startswith("|"):
        return lines
    whole_rows = block if end < len(lines) else block[:-1]
    if len(whole_rows) < 2:
        return lines[:start]
    return [*lines[: start + len(whole_rows)], ""] if _DELIMITER_ROW.match(whole_rows[1]) else lines


def _with_closed_marks(lines: list[str]) -> str:
    """Close bold text and a code span of the last paragraph."""
    start = len(lines)
    while start and lines[start - 1].strip() and not _FENCE_LINE.match(lines[start - 1]):
        start -= 1
    paragraph = "\n".join(lines[start:])
    plain = re.sub(r"`[^`]*`", "", paragraph)
    if plain.count("`") % 2:
        paragraph = paragraph[:-1] if paragraph.endswith("`") else f"{paragraph}`"
    elif plain.count("**") % 2:
        paragraph = paragraph.removesuffix("*")
        paragraph = paragraph[:-1] if paragraph.endswith("*") else f"{paragraph.rstrip()}**"
    return "\n".join([*lines[:start], paragraph]) if start < len(lines) else "\n".join(lines)
