"""JSON as models write it, to JSON as it should be, while it is being written.

Repaired on the way: raw line breaks and bad escapes in strings, unescaped quotes, single quotes, bare
keys and words, Python's literals, trailing commas. What is cut off is closed, so the result is always
one valid JSON value, in the form of ``json.dumps(value, ensure_ascii=False)``.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine.text.parse.scan.scanner import Emit, Markers, MarkupError, Scanner, Steps

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", '"': '"', "\\": "\\", "'": "'"}
_HEX = set("0123456789abcdefABCDEF")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_WORD = 4096
"""Characters of a word without quotes. Python reads no longer numbers than 4300 digits."""
_DEEPEST = 100
"""Levels of nesting: each takes several of Python's stack frames."""


def quoted(text: str) -> str:
    """The inside of a JSON string that holds ``text``."""
    return dumps(text)[1:-1]


def dumps(value: Any) -> str:
    """``value`` as JSON that a client can read: halves of surrogate pairs, which UTF-8 cannot carry, are replaced."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def loads(text: str) -> Any:
    """The value of a JSON text; numbers that are not JSON's, or too large for a float, stay text.

    Raises ValueError, also for a value that is nested too deep for its readers.
    """
    try:
        value = json.loads(text, strict=False, parse_constant=str, parse_float=_finite)
    except RecursionError:
        raise ValueError("too deep") from None
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("too deep")
    return value


def _finite(text: str) -> float | str:
    return float(text) if math.isfinite(float(text)) else text


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def number(text: str) -> str | None:
    """``text`` as a JSON number, or None. What is cut off (``1.``, ``2e``) is a number up to there.

    None too for a number that clients cannot hold: past the range of a float, or of thousands of digits.
    """
    text = text.lstrip("+")
    if text.startswith((".", "-.")):
        text = text.replace(".", "0.", 1)
    match = _NUMBER.match(text)
    if match is None or match.end() > _LONGEST_WORD:
        return None
    if not match.group().lstrip("-").isdigit() and not math.isfinite(float(match.group())):
        return None
    return match.group() if text[match.end() :] in ("", ".", "e", "E", "e+", "e-", "E+", "E-") else None


class LenientJson:
    """Reads one JSON value at the scanner's position.

    ``stops`` are marks that end a call: outside a string they end the value. ``raw_quote`` is a mark
    that delimits strings without escapes (Gemma 4's).
    """

    def __init__(self, scanner: Scanner, stops: Sequence[str] = (), raw_quote: str = "") -> None:
        self._scanner = scanner
        self.cut = False
        """Whether a string was not closed."""
        self._ran_over = False
        """Whether it was not closed although it contains quotes: then it was malformed, not cut off."""
        self._depth = 0
        self._stops = tuple(stops)
        self._raw_quote = raw_quote
        self._raw = Markers([raw_quote])
        self._quotes = {quote: Markers([quote, "\\"]) for quote in "\"'"}

    def value(self, emit: Emit, lead: str = "") -> Steps[None]:
        """Read a value and emit it after ``lead``.

        Raises MarkupError where there is no value (nothing was emitted), and after a malformed value (which was
        emitted up to the fault, and closed).
        """
        yield from self._scanner.skip_space()
        char = yield from self._scanner.peek()
        if char == "{":
            yield from self._object(emit, lead)
        elif char == "[":
            yield from self._array(emit, lead)
        elif (quote := (yield from self._opening_quote())) is not None:
            emit(lead + '"')
            yield from self.string(quote, emit, lambda: self._ends_here(",}])"))
            emit('"')
        else:
            emit(lead + (yield from self._bare()))

    def collect(self) -> Steps[str]:
        """The JSON text of a whole value."""
        parts: list[str] = []
        yield from self.value(parts.append)
        self._refuse_overrun()
        return "".join(parts)

    def _refuse_overrun(self) -> None:
        if self._ran_over:
            self._scanner.at_end = False
            raise MarkupError("quote")

    def key(self) -> Steps[str]:
        """An object's key, quoted or bare; its colon is consumed."""
        quote = yield from self._opening_quote()
        if quote is not None:
            parts: list[str] = []
            yield from self.string(quote, parts.append, lambda: self._ends_here(":"))
            name = str(json.loads('"' + "".join(parts) + '"'))
            self._refuse_overrun()
        else:
            name = (yield from self._scanner.word(":,{}[]\"'\n")).strip()
            if not name:
                raise MarkupError("key")
        yield from self._scanner.skip_space()
        yield from self._scanner.expect(":")
        return name

    def _object(self, emit: Emit, lead: str) -> Steps[None]:
        yield from self._members(emit, lead, "{", "}", self._pair)

    def _array(self, emit: Emit, lead: str) -> Steps[None]:
        yield from self._members(emit, lead, "[", "]", self.value)

    def _pair(self, emit: Emit, lead: str) -> Steps[None]:
        name = yield from self.key()
        yield from self.value(emit, f'{lead}"{quoted(name)}": ')

    def _members(
        self, emit: Emit, lead: str, begin: str, end: str, member: Callable[[Emit, str], Steps[None]]
    ) -> Steps[None]:
        if self._depth >= _DEEPEST:
            raise MarkupError("too deep")
        self._scanner.take()
        emit(lead + begin)
        separator = ""
        self._depth += 1
        try:
            while (yield from self._more(end, first=not separator)):
                yield from self._member(member, emit, separator)
                separator = ", "
        except MarkupError:
            emit(end)
            raise
        finally:
            self._depth -= 1
        emit(end)

    def _member(self, member: Callable[[Emit, str], Steps[None]], emit: Emit, lead: str) -> Steps[None]:
        """A member; if it fails before any of it was emitted, its text can be read again."""
        mark = self._scanner.mark()

        def settle(text: str) -> None:
            self._scanner.release(mark)
            emit(text)

        try:
            yield from member(settle, lead)
        except MarkupError:
            self._scanner.rewind(mark)
            raise
        finally:
            self._scanner.release(mark)

    def _more(self, end: str, *, first: bool) -> Steps[bool]:
        """Whether another member follows; consumes commas and ``end``. Raises MarkupError where there is neither."""
        separated = first
        while True:
            yield from self._scanner.skip_space()
            char = yield from self._scanner.peek()
            if char == end:
                self._scanner.take()
                return False
            if char != ",":
                if not separated or not char:
                    raise MarkupError(end)
                return True
            self._scanner.take()
            separated = True

    def _opening_quote(self) -> Steps[str | None]:
        marks = ['"', "'", self._raw_quote] if self._raw_quote else ['"', "'"]
        return (yield from self._scanner.accept(*marks))

    def string(self, quote: str, emit: Emit, ends_here: Callable[[], Steps[bool]]) -> Steps[None]:
        """The inside of a string up to its closing quote, or to the end of the text.

        ``ends_here`` decides by the text after a quote whether it closes the string or belongs to it.
        """

        def emit_plain(text: str) -> None:
            emit(quoted(text))

        if quote == self._raw_quote:
            self.cut = (yield from self._scanner.until(self._raw, emit_plain, self._cut_mark(emit_plain))) is None
            return
        num_inside = 0
        while (found := (yield from self._scanner.until(self._quotes[quote], emit_plain))) is not None:
            if found == "\\":
                emit((yield from self._escape()))
            elif (yield from ends_here()):
                return
            else:
                emit_plain(quote)
                num_inside += 1
        self.cut, self._ran_over = True, num_inside > 0

    def _cut_mark(self, emit: Emit) -> Emit:
        """Where the beginning of a mark goes: nowhere if a limit cut it off."""
        return lambda text: None if self._scanner.cut else emit(text)

    def _ends_here(self, followers: str) -> Steps[bool]:
        """Whether what follows a quote is what follows a string: else the quote belongs to it."""
        return (yield from self._scanner.after_space([*followers, *self._stops])) is not None

    def _escape(self) -> Steps[str]:
        char = yield from self._scanner.peek()
        if char in _ESCAPES:
            self._scanner.take()
            return quoted(_ESCAPES[char])
        digits = (yield from self._scanner.look(5))[1:] if char == "u" else ""
        if len(digits) < 4 or not _HEX.issuperset(digits):
            return r"\\"
        for _ in range(5):
            self._scanner.take()
        unit = chr(int(digits, 16))
        if not "\ud800" <= unit <= "\udbff":
            return quoted(unit)
        low = yield from self._scanner.look(6)
        if re.fullmatch(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}", low):
            for _ in range(6):
                self._scanner.take()
            return str(json.loads(f'"\\u{digits}{low}"'))
        return quoted(unit)

    def _bare(self) -> Steps[str]:
        """A number, a literal, or a word that should have been quoted."""
        word = ""
        while (char := (yield from self._scanner.peek())) and char not in ",{}[]()\"'\n" and len(word) < _LONGEST_WORD:
            if self._raw_quote and (yield from self._scanner.at([self._raw_quote])):
                break
            if (yield from self._scanner.at(self._stops)):
                break
            word += self._scanner.take()
        word = word.strip()
        if not word:
            raise MarkupError("value")
        if word in _WORDS:
            return _WORDS[word]
        if not char:  # cut off: the one literal that begins like this
            for literal, json_text in _WORDS.items():
                if literal.startswith(word):
                    return json_text
        return number(word) or (f'"{quoted(word)}"' if word != "-" else "0")
