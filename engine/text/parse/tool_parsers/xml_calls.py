"""Tool calls written as tags, one per parameter; values are text, typed by the tool's schema."""

import contextlib
import re
from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson, quoted
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Emit, Markers, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolSchemas, function_name
from engine.text.parse.tool_parsers.json_calls import JsonCalls
from engine.text.parse.tool_parsers.values import to_json

_STATED = {
    'string="true"': frozenset({"string"}),
    'string="false"': frozenset({"object", "array", "number", "boolean"}),
    **{
        f'type="{kind}"': frozenset({kind})
        for kind in ("string", "object", "array", "number", "integer", "boolean", "null")
    },
}
"""DeepSeek's tags state whether a value is text, Kimi K3's of which type it is."""
_NOT_TEXT = frozenset('{["-0123456789tfnTFN')
"""First characters of JSON values: an undeclared value that begins otherwise is certainly text."""


@dataclass(frozen=True)
class XmlCalls(FormatFacts):
    """The tags of one format.

    A section (``start`` … ``end``, optional) holds functions: ``open`` name ``name_end`` … ``close``.
    A parameter is ``key`` name ``key_end`` value ``value_end``. ``quoted``: names are in quotes, followed by
    other attributes. ``newlines``: a line break on either side of a value is not part of it.
    ``whole`` and ``whole_end`` enclose all arguments as one JSON object, instead of parameters.
    """

    start: str
    end: str
    open: str
    name_end: tuple[str, ...]
    close: str
    key: str
    key_end: tuple[str, ...]
    value_end: str
    quoted: bool = False
    newlines: bool = False
    cdata: bool = False
    whole: str = ""
    whole_end: str = ""

    @property
    def starts(self) -> tuple[str, ...]:
        """The section's mark, and a function's for models that leave the section out."""
        return tuple(filter(None, (self.start, self.open)))

    @property
    def ends(self) -> tuple[str, ...]:
        """Closing tags."""
        return tuple(filter(None, (self.end, self.close)))

    @property
    def strays(self) -> tuple[str, ...]:
        """The ends."""
        return self.ends

    @property
    def bare(self) -> str:
        """Empty: calls always begin with a tag."""
        return ""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """The functions of a section, or one function without a section (which must be a declared one).

        A section may also hold a call as JSON, as other models write it.
        """
        call = _XmlReader(self, scanner, sink, tools)
        in_section = bool(self.start) and start == self.start
        if in_section and (yield from scanner.after_space(["{"])):
            yield from JsonCalls((self.start,), (self.end,)).read(scanner, sink, tools, start)
            return
        if in_section and self.open:
            yield from scanner.skip_space()
            yield from scanner.expect(self.open)
        yield from call.function(alone=not in_section and bool(self.start))
        while in_section:
            yield from scanner.skip_space()
            if (yield from scanner.accept(self.end)) or not self.open or not (yield from scanner.at([self.open])):
                return
            yield from scanner.attempt(call.next_function())


_LONGEST_SLIP = 20
"""Characters that a closing tag may have too many: ``</parameter_function>``."""
_NAME_IN_TAG = re.compile(r"""\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s"'<>]+))((?:\s+[\w-]+="(?:[a-z]+|\d+)")*)\s*""")
"""A name, in quotes or without, and the attributes behind it."""


@dataclass(frozen=True)
class _XmlReader:
    """Reads functions. Text between the tags of a function is content: before the call where no parameter was written
    yet, else after it.
    """

    format: XmlCalls
    scanner: Scanner
    sink: OutputSink
    tools: ToolSchemas

    def next_function(self) -> Steps[None]:
        """Another function of a section, with its opening tag."""
        yield from self.scanner.expect(self.format.open)
        yield from self.function()

    def function(self, *, alone: bool = False) -> Steps[None]:
        """One function after its opening tag, up to and including its closing tag.

        ``alone``: it has no section, so that the tag may also be a quotation. Then a declared function must be called,
        and nothing but its arguments may follow.
        """
        layout = self.format
        word, rest = yield from self._function_name()
        name = function_name(word, self.tools.names if alone else None)
        if alone and (yield from self.scanner.after_space([*self._tags, "{"])) is None:
            raise MarkupError("arguments")
        self.scanner.commit()
        self.scanner.insert(rest)
        self.sink.boundary()
        yield from self._prose(self.sink.content)
        if self.scanner.cut and not (yield from self.scanner.peek()):
            return  # cut off before its arguments: not a call
        emit, asides = self.sink.call(name), list[str]()
        if layout.whole and (yield from self.scanner.after_space([layout.whole])):
            yield from self._whole(emit, asides)
        elif (yield from self.scanner.after_space(["{"])):
            yield from self._object(emit, asides)
        else:
            emit("{")
            yield from self._parameters(name, emit, asides)
            emit("}")
        for aside in asides:
            self.sink.content(aside)

    @property
    def _tags(self) -> list[str]:
        """What may follow in a function: a parameter, or its end in one form or another."""
        layout = self.format
        return list(filter(None, (layout.whole, layout.key, *self._ends)))

    @property
    def _ends(self) -> list[str]:
        """What ends a function: its own tag, its section's, or the beginning of the next."""
        layout = self.format
        return list(filter(None, (layout.close, layout.end, layout.open, layout.start)))

    def _prose(self, emit: Emit) -> Steps[None]:
        """Text up to the next tag, or to an object that may be all arguments."""
        markers = Markers([*self._tags, "{"])
        while (found := (yield from self._until(markers, emit))) is not None:
            if found != "{" or (yield from self.scanner.after_space(['"', "'", "}"])):
                self.scanner.put_back(found)
                return
            emit(found)

    def _until(self, markers: Markers, emit: Emit) -> Steps[str | None]:
        """Text up to the first marker; where a limit cut the reply off, without the beginning of one at its end."""
        return (yield from self.scanner.until(markers, emit, lambda text: None if self.scanner.cut else emit(text)))

    def _aside(self, begun: str, asides: list[str]) -> Steps[None]:
        """Text up to the next tag, to be shown behind the call; half a text that a limit cut off is not."""
        parts = [begun]
        found = yield from self.scanner.until(Markers(self._tags), parts.append)
        if found is not None:
            self.scanner.put_back(found)
        elif self.scanner.cut:
            return
        asides.append("".join(parts))

    def _whole(self, emit: Emit, asides: list[str]) -> Steps[None]:
        """The arguments as one JSON object after its opening tag, up to and including the function's closing tag."""
        layout = self.format
        yield from self.scanner.skip_space()
        yield from self.scanner.accept(layout.whole)
        if (yield from self.scanner.after_space(["{"])):
            yield from self._object(emit, asides)
        else:
            emit("{}")
            yield from self._end(asides)

    def _object(self, emit: Emit, asides: list[str]) -> Steps[None]:
        """All arguments as one JSON object, up to and including the function's closing tag."""
        layout = self.format
        stops = list(filter(None, (layout.whole_end, *self._ends)))
        with contextlib.suppress(MarkupError):  # closed; what follows is not an argument
            yield from LenientJson(self.scanner, stops).value(emit)
        yield from self.scanner.skip_space()
        if layout.whole_end:
            yield from self.scanner.accept(layout.whole_end)
        yield from self._end(asides)

    def _end(self, asides: list[str]) -> Steps[None]:
        """Up to and including the closing tag, or up to what else ends the function."""
        parts: list[str] = []
        found = yield from self.scanner.until(Markers(self._ends), parts.append)
        if found and found != self.format.close:
            self.scanner.put_back(found)
        if found or not self.scanner.cut:
            asides += parts

    def _function_name(self) -> Steps[tuple[str, str]]:
        """The name in the opening tag, and what else was written there."""
        layout = self.format
        if layout.quoted:
            name, _, rest = yield from self._name_and_attributes(layout.name_end)
            return name, rest
        word = yield from self.scanner.word("".join({mark[0] for mark in layout.name_end}), limit=200)
        found = yield from self.scanner.at(layout.name_end)
        if found is None:
            raise MarkupError(layout.name_end)
        if found not in (layout.key, layout.end, "{"):
            yield from self.scanner.accept(found)
        return word.strip(), ""

    def _name_and_attributes(self, tag_end: tuple[str, ...]) -> Steps[tuple[str, str, str]]:
        """The quoted name in a tag, its attributes, and text behind them; the tag's end is read.

        Where it has no end, what follows the attributes is left.
        """
        text = yield from self.scanner.word(f"<\n{tag_end[0][0]}")
        match = _NAME_IN_TAG.match(text)
        if match is None:
            raise MarkupError("name")
        rest = text[match.end() :]
        if not (yield from self.scanner.accept(*tag_end)):
            if self.scanner.cut and any(mark.startswith(self.scanner.rest()) for mark in tag_end):
                raise MarkupError(tag_end)  # its beginning is there
            self.scanner.put_back(rest)
            rest = ""
        return next(filter(None, match.group(1, 2, 3)), ""), match.group(4), rest

    def _parameters(self, function: str, emit: Emit, asides: list[str]) -> Steps[None]:
        layout, separator = self.format, ""
        while True:
            yield from self.scanner.skip_space()
            if layout.close and (yield from self.scanner.accept(layout.close)):
                return
            if not (yield from self.scanner.peek()) or (yield from self.scanner.at(self._ends)):
                return
            try:
                key, kinds = yield from self.scanner.attempt(self._key(function, asides))
            except MarkupError:
                begun = (yield from self.scanner.accept(layout.key)) or ""
                yield from self._aside(begun, asides)
            else:
                yield from self._value(function, f'{separator}"{quoted(key)}": ', kinds, emit)
                separator = ", "

    def _key(self, function: str, asides: list[str]) -> Steps[tuple[str, frozenset[str]]]:
        """A parameter's name and types, read up to its value."""
        layout = self.format
        yield from self.scanner.expect(layout.key)
        if layout.quoted:
            key, attributes, rest = yield from self._name_and_attributes(layout.key_end)
            asides += [rest] if rest else []
            stated = _STATED.get(attributes.rpartition(" ")[2].strip())
        else:
            key, stated = (yield from self.scanner.word(layout.key_end[0][0])).strip(), None
            for mark in layout.key_end:
                yield from self.scanner.skip_space()
                yield from self.scanner.expect(mark)
        if layout.newlines:
            yield from self.scanner.accept("\r\n", "\n")
        return key, stated or self.tools.kinds(function, key)

    def _value(self, function: str, lead: str, kinds: frozenset[str], emit: Emit) -> Steps[None]:
        """A value up to its closing tag: text is passed on as it comes, the rest when it is whole."""
        cdata = self.format.cdata and (yield from self.scanner.accept("<![CDATA["))
        close = "]]>" + self.format.value_end if cdata else self.format.value_end
        first = yield from self.scanner.peek()
        if kinds == {"string"} or cdata or (not kinds and first and first not in _NOT_TEXT and not first.isspace()):
            emit(lead + '"')
            yield from self._text(function, close, lambda text: emit(quoted(text)))
            emit('"')
        else:
            parts: list[str] = []
            yield from self._text(function, close, parts.append)
            emit(lead + to_json("".join(parts), kinds))

    def _text(self, function: str, close: str, emit: Emit) -> Steps[None]:
        """Text up to the closing tag. One that another closing tag follows before any other tag belongs to the text.

        Where the closing tag is missing or malformed, the function's end ends the text too, and so does a declared
        parameter.
        """
        layout = self.format
        before = ("\n", "") if layout.newlines else ("",)
        stub = close[:-1] if close.startswith("</") else ""
        ends, malformed, unclosed = ([lead + mark for lead in before if mark] for mark in (close, stub, layout.close))
        next_key = before[0] + layout.key
        markers = Markers([*ends, *malformed, *unclosed, next_key])
        while (found := (yield from self._until(markers, emit))) is not None:
            if found in ends:
                if (yield from self._text_ends(close)):
                    return
            elif found in malformed:
                if (yield from self._end_is_malformed()):
                    return
            elif found == next_key:
                if (yield from self._declared_key(function)):
                    return
            elif (yield from self._function_ends()):
                self.scanner.put_back(layout.close)
                return
            emit(found)

    def _end_is_malformed(self) -> Steps[bool]:
        """Whether what goes on after the beginning of a closing tag (``</parameter``) is a slip in that tag."""
        place = self.scanner.mark()
        for _ in range(_LONGEST_SLIP):
            char = yield from self.scanner.peek()
            if not char or char.isspace() or char in "<>":
                break
            self.scanner.take()
        yield from self.scanner.accept(">")
        ends = (yield from self.scanner.after_space(self._tags)) is not None
        if not ends:
            self.scanner.rewind(place)
        self.scanner.release(place)
        return ends

    def _declared_key(self, function: str) -> Steps[bool]:
        """Whether a parameter's opening tag, just read, names one that is declared; then the tag is put back."""
        self.scanner.put_back(self.format.key)
        place = self.scanner.mark()
        try:
            key, _ = yield from self._key(function, [])
        except MarkupError:
            key = ""
        self.scanner.rewind(place)
        self.scanner.release(place)
        declared = self.tools.declares(function, key)
        if not declared:
            yield from self.scanner.accept(self.format.key)
        return declared

    def _text_ends(self, close: str) -> Steps[bool]:
        """Whether a tag of the call follows, or prose before one: not another closing tag of the value."""
        layout = self.format
        if (yield from self.scanner.after_space(self._tags)) is not None:
            return True
        place = self.scanner.mark()
        tags = filter(None, (close, layout.key, layout.close or layout.end, layout.open))
        found = yield from self.scanner.until(Markers(list(tags)), lambda _: None)
        self.scanner.rewind(place)
        self.scanner.release(place)
        return found != close

    def _function_ends(self) -> Steps[bool]:
        """Whether a function's closing tag inside a value ends the call, the value's own tag missing."""
        end = self.format.end
        return bool(end) and (yield from self.scanner.after_space([end])) == end
