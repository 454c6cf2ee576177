"""Reading a text that is still being written.

Parsers are generators that yield when they need more text and are resumed when there is some (or when
nothing more comes). Every choice depends on the text alone, never on how it was cut, so the result
is the same for all cuts; what is certain is emitted at once.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Emit = Callable[[str], None]


class MarkupError(Exception):
    """The text is not what the parser expected at this point. Never leaves the parsers."""


class Markers:
    """A set of literal marks to search for. The one that begins first wins, of several the longest."""

    def __init__(self, marks: Sequence[str]) -> None:
        self.marks = tuple(sorted(set(filter(None, marks)), key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.marks)) or r"(?!)")
        self._first = re.compile("|".join(sorted({re.escape(mark[0]) for mark in self.marks})) or r"(?!)")
        self._longest = max(map(len, self.marks), default=0)

    def find(self, text: str, begin: int, *, final: bool) -> tuple[int, str | None]:
        """Where the text stops being plain, and the mark there; None while the mark may still be growing."""
        if not self.marks or self._first.search(text, begin) is None:  # as nearly always
            return len(text), None
        match = self._pattern.search(text, begin)
        partial = len(text) if final else self.partial(text, begin)
        if match is not None and match.start() < partial:
            return match.start(), match.group()
        return partial, None

    def partial(self, text: str, begin: int) -> int:
        """Where a mark begins that the text's end cuts off (the end of the text if none does)."""
        for found in self._first.finditer(text, max(begin, len(text) - self._longest + 1)):
            tail = text[found.start() :]
            if any(len(mark) > len(tail) and mark.startswith(tail) for mark in self.marks):
                return found.start()
        return len(text)


class Scanner:
    """The text so far and how far it was read. A parser asks for text with ``yield from``.

    ``at_end``: whether a parser wanted more than there is. ``cut``: the text was cut off there, not ended.
    """

    def __init__(self) -> None:
        self.closed = False
        self.at_end = False
        self.cut = False
        self._text = ""
        self._position = 0
        self._forgotten = 0
        self._marks: dict[int, int] = {}
        self._num_marks = 0

    def feed(self, text: str) -> None:
        """Add text; what was read before every mark is forgotten."""
        keep = self._position
        if self._marks:
            keep = min(keep, min(self._marks.values()) - self._forgotten)
        self._text = self._text[keep:] + text
        self._position -= keep
        self._forgotten += keep

    def close(self, *, cut: bool = False) -> None:
        """Nothing more comes; ``cut``: it would have, but for a limit."""
        self.closed, self.cut = True, cut

    def mark(self) -> int:
        """Remember this position, so that :meth:`rewind` can go back to it until :meth:`release`."""
        self._num_marks += 1
        self._marks[self._num_marks] = self._forgotten + self._position
        return self._num_marks

    def rewind(self, mark: int) -> None:
        """Read on from a mark again, if it was not forgotten."""
        if mark in self._marks:
            self._position = self._marks[mark] - self._forgotten

    def release(self, mark: int) -> None:
        """Forget a mark. Safe to repeat."""
        self._marks.pop(mark, None)

    def attempt(self, steps: Steps[T]) -> Steps[T]:
        """Run a part of a parser. If it raises MarkupError before :meth:`commit`, its text can be read again."""
        mark = self.mark()
        try:
            return (yield from steps)
        except MarkupError:
            self.rewind(mark)
            raise
        finally:
            self.release(mark)

    def commit(self) -> None:
        """Forget all marks: what was read is settled."""
        self._marks.clear()

    def peek(self) -> Steps[str]:
        """The next character, left in place; empty at the end."""
        while self._position >= len(self._text):
            if self.closed:
                self.at_end = True
                break
            yield
        return self._text[self._position : self._position + 1]

    def take(self) -> str:
        """Read the character that :meth:`peek` saw."""
        self._position += 1
        return self._text[self._position - 1]

    def put_back(self, text: str) -> None:
        """Let ``text``, just read, come next once more."""
        forgotten = max(0, len(text) - self._position)
        self._text = text[:forgotten] + self._text
        self._forgotten -= forgotten
        self._position += forgotten - len(text)
        assert self._text.startswith(text, self._position), "only what was just read can be put back"

    def insert(self, text: str) -> None:
        """Let ``text`` come next. What was read before must be settled (see :meth:`commit`)."""
        assert not self._marks, "a mark would have its text twice"
        self._text = text + self.rest()
        self._position = 0

    def rest(self) -> str:
        """The text after this position."""
        return self._text[self._position :]

    def holds(self, marks: Sequence[str]) -> bool:
        """Whether one of ``marks`` occurs after this position."""
        return any(mark in self.rest() for mark in marks)

    def take_rest(self) -> str:
        """Read the rest of the text so far."""
        rest = self.rest()
        self._position = len(self._text)
        return rest

    def look(self, size: int) -> Steps[str]:
        """The next ``size`` characters, left in place; fewer at the end."""
        while self._position + size > len(self._text) and not self.closed:
            yield
        return self._text[self._position : self._position + size]

    def skip_space(self) -> Steps[str]:
        """Consume white space and return it."""
        taken: list[str] = []
        while (yield from self.peek()).isspace():
            taken.append(self.take())
        return "".join(taken)

    def after_space(self, marks: Sequence[str]) -> Steps[str | None]:
        """Which of ``marks`` comes next after white space, "" at the end of the text; nothing is read."""
        place = self.mark()
        yield from self.skip_space()
        found = yield from self.at(marks)
        if found is None and not (yield from self.peek()):
            found = ""
        self.rewind(place)
        self.release(place)
        return found

    def at(self, marks: Sequence[str]) -> Steps[str | None]:
        """Which of ``marks`` comes next (the longest), left in place. Reads no further than needed to know."""
        while True:
            rest = self._text[self._position : self._position + max(map(len, marks), default=0)]
            growing = any(len(m) > len(rest) and m.startswith(rest) for m in marks)
            if not growing or self.closed:
                self.at_end |= growing
                return max((m for m in marks if rest.startswith(m)), key=len, default=None)
            yield

    def accept(self, *marks: str) -> Steps[str | None]:
        """Consume the mark that comes next, if one does."""
        found = yield from self.at(marks)
        if found:
            self._position += len(found)
        return found

    def expect(self, *marks: str) -> Steps[str]:
        """Consume one of ``marks``, or raise MarkupError."""
        found = yield from self.accept(*marks)
        if found is None:
            raise MarkupError(marks)
        return found

    def until(self, markers: Markers, emit: Emit, emit_cut: Emit | None = None) -> Steps[str | None]:
        """Emit text up to the first marker, consume it and return it; None when the text ended.

        The beginning of a marker that the end cuts off goes to ``emit_cut``, if there is one.
        """
        while True:
            stop, found = markers.find(self._text, self._position, final=self.closed)
            if found is None and self.closed and emit_cut:
                stop = markers.partial(self._text, self._position)
            if stop > self._position:
                emit(self._text[self._position : stop])
                self._position = stop
            if found is not None:
                self._position += len(found)
                return found
            if self.closed:
                self.at_end = True
                if emit_cut:
                    emit_cut(self.take_rest())
                return None
            yield

    def word(self, ends: str, *, limit: int = 256) -> Steps[str]:
        """The text up to one of the characters in ``ends``, which is left. Raises MarkupError past ``limit``."""
        taken: list[str] = []
        while (char := (yield from self.peek())) not in ends:
            taken.append(self.take())
            if len(taken) > limit:
                raise MarkupError(ends)
        if not char:
            raise MarkupError(ends)
        return "".join(taken)
