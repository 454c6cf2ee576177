"""Parameter values that models write as plain text, as JSON of the type that the tool declares."""

import ast
import json
import math
import re
from typing import Any

from engine.text.parse.scan.lenient_json import LenientJson, dumps, loads, number, quoted
from engine.text.parse.scan.scanner import MarkupError, Scanner

_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_NULL = ("null", "none", "nil", "")
_LONGEST_LITERAL = 100_000


def to_json(text: str, kinds: frozenset[str]) -> str:
    """``text`` as one JSON value of a type in ``kinds`` (none: whatever it looks like).

    Text that fits none of the declared types stays a string: nothing is lost, and a validator reports what is wrong.
    """
    stripped = text.strip()
    if not kinds:
        return _guessed(text, stripped)
    if "null" in kinds and stripped.lower() in (_NULL if "string" not in kinds else _NULL[:1]):
        return "null"
    for kind in ("integer", "number", "boolean", "object", "array"):
        found = _converted(stripped, kind) if kind in kinds else None
        if found is not None:
            return found
    return f'"{quoted(text)}"'


def _converted(text: str, kind: str) -> str | None:
    if kind in ("object", "array"):
        return _container(text, dict if kind == "object" else list)
    return {"integer": _integer, "number": _number, "boolean": _boolean}[kind](text)


def _guessed(text: str, stripped: str) -> str:
    value = _number(stripped) or {"true": "true", "false": "false", "null": "null", "None": "null"}.get(stripped)
    return value or _container(stripped, dict) or _container(stripped, list) or f'"{quoted(text)}"'


def _integer(text: str) -> str | None:
    written = _number(text)
    if written is None:
        return None
    if written.lstrip("-").isdigit():
        return written
    value = float(written)
    return str(int(value)) if math.isfinite(value) and value.is_integer() else None


def _number(text: str) -> str | None:
    """Exactly a JSON number (nothing cut off, no leading zeros)."""
    written = number(text)
    return written if written is not None and written == text.lstrip("+") else None


def _boolean(text: str) -> str | None:
    word = text.lower()
    return "true" if word in _TRUE else "false" if word in _FALSE else None


def _container(text: str, kind: type) -> str | None:
    """A JSON object or array; also as Python writes it, or slightly broken."""
    if not text.startswith("{" if kind is dict else "["):
        return None
    for read in (_read_json, _read_python, _read_leniently):
        value = read(text)
        if isinstance(value, kind):
            return dumps(value)
    return None


def _read_json(text: str) -> Any:
    try:
        return loads(text)
    except ValueError:
        return None


_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_KNOWN_ESCAPES = "\\'\"abfnrtv01234567xuUN\n"


def _escaped(match: re.Match[str]) -> str:
    """An escape of Python's; it keeps the backslash of any other, and warns on stderr."""
    return match[0] if match[1] in _KNOWN_ESCAPES else "\\" + match[0]


def _read_python(text: str) -> Any:
    if len(text) > _LONGEST_LITERAL:
        return None
    try:
        value = ast.literal_eval(_ESCAPE.sub(_escaped, text))
        return loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _read_leniently(text: str) -> Any:
    scanner = Scanner()
    scanner.feed(text)
    scanner.close()
    parts: list[str] = []
    try:
        for _ in LenientJson(scanner).value(parts.append):
            raise AssertionError("a closed scanner has no more to wait for")
    except (MarkupError, RecursionError):
        return None
    return loads("".join(parts)) if not scanner.rest().strip() else None
