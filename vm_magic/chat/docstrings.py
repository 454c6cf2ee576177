"""What a function's docstring says of it and of its arguments: Google's, NumPy's or Sphinx's style."""

import inspect
import re
from collections.abc import Callable
from typing import Any

_NAMES = r"\\?\*{0,2}\w+(?:\s*,\s*\\?\*{0,2}\w+)*"
_SPHINX = re.compile(rf"^(\s*):(?:param|parameter|arg|argument|key|keyword)\s+(?:\S[^\n:]*?\s)??({_NAMES})\s*:", re.M)


def documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The description, and what is said of each argument: an entry for several (``x, y : int``) is said of each."""
    from docstring_parser import ParseError, parse

    written = inspect.getdoc(function) or ""
    try:
        parsed = parse(_SPHINX.sub(_without_type, written))
    except ParseError:
        return written, {}
    text = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    said = ((one.arg_name, one.description) for one in parsed.params if one.description)
    return text, {name: description for names, description in said for name in _split(names)}


def _without_type(field: re.Match[str]) -> str:
    """``:param list[int] a, b:`` as ``:param a,b:``. The parser takes one word at most for a type, else gives all up;
    types are read from the hints anyway."""
    return f"{field[1]}:param {','.join(_split(field[2]))}:"


def _split(names: str) -> list[str]:
    return [name.strip().lstrip("\\*") for name in names.split(",") if name.strip()]
