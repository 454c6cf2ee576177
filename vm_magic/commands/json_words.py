"""JSON that stands in a magic's line without quotes: ``--json {"type": "object"}`` up to the matching brace."""

import re
from collections.abc import Callable

from engine.errors import ConfigError
from engine.format.text import shortened

_FLAG = re.compile(r"\s*(--[\w-]+)(=|\s+)(?=[{\[])")
_PAIRS = {"{": "}", "[": "]"}
_LONGEST = 40
TOKEN = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)""")
"""A word of a line, with what is quoted in it."""


def json_word(line: str, start: int, takes_json: Callable[[str], bool]) -> tuple[str, str, int] | None:
    """A flag that takes JSON at ``start``, its value that is not quoted, and where that ends; None if none is there.

    Raises ConfigError where the value's first bracket is not closed.
    """
    found = _FLAG.match(line, start)
    if not found or not takes_json(found[1]):
        return None
    end = _matching_end(line, found.end())
    if end is None:
        value, opening = line[found.end() :].strip(), line[found.end()]
        raise ConfigError(
            f"{found[1]} {shortened(value, _LONGEST)}: not valid JSON: its {opening} is not closed with a "
            f"{_PAIRS[opening]}",
            flag=found[1].lstrip("-"),
        )
    return found[1], line[found.end() : end], end


def _matching_end(text: str, start: int) -> int | None:
    """Where the bracket at ``start`` is closed; what stands in strings does not count."""
    open_brackets: list[str] = []
    quote = ""
    position = start
    while position < len(text):
        char = text[position]
        if quote:
            position += char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _PAIRS:
            open_brackets.append(_PAIRS[char])
        elif char in _PAIRS.values():
            if char != open_brackets.pop():
                return None
            if not open_brackets:
                return position + 1
        position += 1
    return None


def pieces(line: str, takes_json: Callable[[str], bool]) -> list[tuple[str, bool]]:
    """``line`` in pieces: text to be split as a shell would, and (True) words that stay as they are."""
    result: list[tuple[str, bool]] = []
    begin = position = 0
    while position < len(line):
        json = json_word(line, position, takes_json)
        if json is not None:
            flag, value, end = json
            result += [(line[begin:position], False), (flag, True), (value, True)]
            begin = position = end
            continue
        word = TOKEN.match(line, position)
        if word is None:
            break
        position = word.end()
    return [*result, (line[begin:], False)]
