"""Lark as llguidance reads it: strings, regular expressions in ASCII, and which grammars are in Lark at all."""

import json
import re

from engine.errors import RequestError
from engine.text.guide.ascii_regex import ascii_classes, ascii_regex

_PART = re.compile(r"""("(?:\\.|[^"\\\n])*"|//[^\n]*|\#[^\n]*)|/(?!/)((?:\\.|[^/\\\n])+)/""", re.VERBOSE)
"""A string or a comment; or a regular expression, its text apart."""


def says_gbnf(grammar: str) -> bool:
    """Whether a grammar is written with ``::=``: in GBNF or EBNF. All others are Lark."""
    return "::=" in _PART.sub("", grammar)


def ascii_lark(grammar: str) -> str:
    """A Lark grammar whose regular expressions have their classes in ASCII."""
    return _PART.sub(lambda part: part[1] or f"/{ascii_classes(part[2])}/", grammar)


def lark_string(text: str) -> str:
    """A text as a Lark string: control characters, DEL among them, are escaped."""
    written = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda char: f"\\u{ord(char.group()):04x}", written)


def lark_regex(pattern: str) -> str:
    """The grammar of a text that matches ``pattern`` as a whole. Raises RequestError for what cannot be told."""
    regex = ascii_regex(pattern, anchored=True)
    if regex.lost:
        raise RequestError(
            f"bad grammar or schema: regex: {' and '.join(regex.lost)} cannot be used inside of a pattern, only at its "
            "beginning or end.",
            param="structured_outputs",
        )
    if not regex.also and not regex.never:
        return f"start: {_literal(regex.text)}"
    text = re.sub(r"^(?:\^|\\A)|(?:\$|\\z)$", "", regex.text)
    parts = [text, *regex.also]
    written = [*map(_literal, parts), *(f"~{_literal(never)}" for never in regex.never)]
    return "start: TEXT\nTEXT: " + " & ".join(written)


def _literal(pattern: str) -> str:
    """A regular expression between slashes."""
    escaped = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n"}
    text = re.sub(r"\\.|[/\n\r]", lambda part: escaped.get(part.group(), part.group()), pattern, flags=re.DOTALL)
    return f"/{text or '(?:)'}/"
