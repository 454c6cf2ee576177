r"""Regular expressions as vLLM's back end reads them: ``\d``, ``\w`` and ``\s`` are ASCII, ``[`` in a set is itself.

llguidance takes Rust's syntax, in which these classes are Unicode's and sets stand inside sets, and looks neither ahead
nor back. What a text must be as a whole (``\bword\b``, ``(?=.*\d).{8,}``) is given apart, to be intersected.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""\\(?:x\{[^}]{0,64}\}|x..|u\{[^}]{0,64}\}|u....|[pP](?:\{[^}]{0,64}\}|.)|c.|.)
    | \[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*(?:\]|\\?\Z)
    | \((?:\?(?:[:=!>]|<[=!]|P?<\w+>|[a-zA-Z-]+[:)]))?
    | (?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})[?+]?
    | .""",
    re.DOTALL | re.VERBOSE,
)
"""An escape, a set, the beginning of a group, a quantifier, or a single character."""
_IN_SET = re.compile(r"\[:\^?\w+:\]|\\.|.", re.DOTALL)
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\x0B\f\r "}
_OTHERWISE = {r"\<": "<", r"\>": ">", r"\Z": r"\z", r"\0": r"\x00"}
"""Escapes that Rust reads otherwise, or not at all."""
_NEAR = 8
r"""Tokens beside a ``\b`` that are looked at."""
_ANY = "(?s:.*)"
_WORD = "[0-9A-Za-z_]"
_ONE_CLASS = re.compile(r"(\[(?:\\.|[^\]\\])+\]|\\[dws]|[^\\.^$*+?{}\[\]|()])")


@dataclass(frozen=True)
class AsciiRegex:
    r"""``text`` has no class of Unicode's, no ``\b`` and, but for what is ``lost``, looks neither ahead nor back.

    The whole text must match each of ``also`` and none of ``never``. ``lost`` says what cannot be told to a grammar.
    """

    text: str
    also: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass
class _Found:
    """What is read so far of a pattern."""

    written: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def ascii_regex(pattern: str, *, anchored: bool) -> AsciiRegex:
    """``pattern`` in ASCII; ``anchored``: it always matches whole texts, without ``^`` and ``$`` too."""
    tokens: list[str] = _TOKEN.findall(pattern)
    found = _Found()
    begins, ends = tokens[:1] in (["^"], [r"\A"]), tokens[-1:] in (["$"], [r"\z"], [r"\Z"])
    place, end = int(begins), len(tokens) - int(ends)
    if not _has_alternatives(tokens):
        if begins or anchored:
            place = _look_ahead(tokens, place, end, found)
            if tokens[place:end][:1] == [r"\b"]:
                place, found.also = place + 1, [*found.also, _WORD + _ANY]
        if (ends or anchored) and place < end and tokens[end - 1] == r"\b":
            end, found.also = end - 1, [*found.also, _ANY + _WORD]
    _inner(tokens[place:end], found)
    text = "".join([*tokens[: int(begins)], *found.written, *(map(_ascii, tokens[-1:]) if ends else ())])
    return AsciiRegex(text, tuple(found.also), tuple(found.never), tuple(dict.fromkeys(found.lost)))


def ascii_classes(pattern: str) -> str:
    """``pattern`` with its classes in ASCII, else as it is."""
    return "".join(map(_ascii, _TOKEN.findall(pattern)))


def _inner(tokens: Sequence[str], found: _Found) -> None:
    """The tokens between what was said of the whole text."""
    place, grouped = 0, "|" not in tokens
    while place < len(tokens):
        token = tokens[place]
        if token in ("(?=", "(?!", "(?<=", "(?<!"):
            found.lost.append(token + "…)")
            place = _group_end(tokens, place)
        elif token == r"\b":
            before = _side(_near(tokens[max(0, place - _NEAR) : place], grouped), -1)
            behind = _side(_near(tokens[place + 1 : place + 1 + _NEAR], grouped), 1)
            if before is None or before == behind:
                found.lost.append(token)
        elif token == r"\B":
            found.lost.append(token)
        else:
            found.written.append(_ascii(token))
        place += 1


def _look_ahead(tokens: Sequence[str], place: int, end: int, found: _Found) -> int:
    """What stands at the beginning and looks ahead says something of the whole text; gives the place behind it."""
    while place < end and tokens[place] in ("(?=", "(?!"):
        close = _group_end(tokens, place)
        inside = [token for token in tokens[place + 1 : close] if token]
        to_end = inside[-1:] == ["$"]
        inner = _Found()
        _inner(inside[int(inside[:1] == ["^"]) : len(inside) - to_end], inner)
        if inner.lost or "^" in inner.written or "$" in inner.written:
            return place
        text = "".join(inner.written)
        whole = f"(?:{text})" + ("" if to_end else _ANY)
        if tokens[place] == "(?=":
            found.also.append(whole)
        else:
            said = _said_positively(text, to_end=to_end)
            (found.never if said is None else found.also).append(whole if said is None else said)
        place = close + 1
    return place


def _said_positively(text: str, *, to_end: bool) -> str | None:
    """What a text is that does not match ``[…]*$``, or ``.*[…]``; None where that is not simple."""
    if to_end and (made := re.fullmatch(_ONE_CLASS.pattern + r"([*+])", text)):
        other = f"{_ANY}[^{made[1]}]{_ANY}"
        return other if made[2] == "*" else f"(?:{other})?"
    if not to_end and text.startswith(".*") and (made := _ONE_CLASS.fullmatch(text[2:])):
        return f"[^{made[1]}]*"
    return None


def _has_alternatives(tokens: Sequence[str]) -> bool:
    """Whether a pattern is one of several, outside of any group."""
    depth = 0
    for token in tokens:
        depth += (token[0] == "(" and token[-1] != ")") - (token == ")")
        if token == "|" and not depth:
            return True
    return False


def _group_end(tokens: Sequence[str], place: int) -> int:
    """Where the group that begins at ``place`` ends."""
    depth = 0
    for at in range(place, len(tokens)):
        depth += (tokens[at][0] == "(" and tokens[at][-1] != ")") - (tokens[at] == ")")
        if not depth:
            return at
    return len(tokens) - 1


def _near(tokens: Sequence[str], grouped: bool) -> Sequence[str]:
    """``tokens`` without the brackets of groups, where no group is one of several."""
    return [token for token in tokens if token not in ("(", "(?:", ")")] if grouped else tokens


def _side(tokens: Sequence[str], step: int) -> bool | None:
    r"""Whether next to a ``\b`` there is always a character of a word (True), or never one (False)."""
    near = list(tokens[-2:] if step < 0 else tokens[:2])
    quantifier = r"(?:[*+?]|\{[\d,]+\})[?+]?"
    if step < 0 and near and re.fullmatch(quantifier, near[-1]):
        atom, count = near[0] if len(near) == 2 else "", near[-1]
    else:
        atom, count = (near[-1] if step < 0 else near[0]) if near else "", near[1] if step > 0 and near[1:] else ""
    if count and re.fullmatch(quantifier, count) and count[0] in "*?{" and not re.match(r"\{[1-9]", count):
        return None
    if atom in ("", ".", "^", "$", "|", ")") or atom[0] == "(":
        return None
    return _kind(atom)


@functools.lru_cache(maxsize=256)
def _kind(atom: str) -> bool | None:
    """Whether one class of characters holds those of words only (True), or none of them (False)."""
    try:
        known = re.compile(atom, re.ASCII)
    except re.error:
        return None
    kinds = {char.isascii() and (char.isalnum() or char == "_") for char in map(chr, range(256)) if known.match(char)}
    return kinds.pop() if len(kinds) == 1 else None


def _ascii(token: str) -> str:
    """One token as Rust reads it: a class of characters is a set of its own, since sets may stand inside sets."""
    if token[0] == "[" and token[-1] == "]":
        head = re.match(r"\[\^?", token)
        assert head is not None, "a set begins so"
        return head.group() + "".join(map(_in_set, _IN_SET.findall(token[head.end() : -1]))) + "]"
    characters = _CLASSES.get(token[1:].lower()) if token[0] == "\\" else None
    if characters is None:
        return _OTHERWISE.get(token, token)
    return f"[{'^' if token[1].isupper() else ''}{characters}]"


def _in_set(part: str) -> str:
    if part == r"\b":
        return r"\x08"
    return "\\" + part if part in ("[", "]", "&", "~") else _ascii(part)
