"""Tool calls written as tags, one per parameter; values are text, typed by the tool's schema."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson, quoted
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Emit, Markers, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolSchemas, function_name
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
        """The functions of a section, or one function without a section (which must be a declared one)."""
        call = _XmlReader(self, scanner, sink, tools)
        in_section = bool(self.start) and start == self.start
        if in_section and self.open:
            yield from scanner.skip_space()
            yield from scanner.expect(self.open)
        yield from call.function(check_name=not in_section and bool(self.start))
        while in_section:
            yield from scanner.skip_space()
            if (yield from scanner.accept(self.end)) or not self.open or not (yield from scanner.at([self.open])):
                return
            yield from scanner.attempt(call.next_function())


@dataclass(frozen=True)
class _XmlReader:
    format: XmlCalls
    scanner: Scanner
    sink: OutputSink
    tools: ToolSchemas

    def next_function(self) -> Steps[None]:
        """Another function of a section, with its opening tag."""
        yield from self.scanner.expect(self.format.open)
        yield from self.function(check_name=False)

    def function(self, *, check_name: bool) -> Steps[None]:
        """One function after its opening tag, up to and including its closing tag."""
        name = function_name((yield from self._function_name()), self.tools.names if check_name else None)
        self.scanner.commit()
        emit = self.sink.call(name)
        if self.format.whole and (yield from self.scanner.after_space([self.format.whole])):
            yield from self._whole(emit)
            return
        emit("{")
        try:
            yield from self._parameters(name, emit)
        finally:
            emit("}")

    def _whole(self, emit: Emit) -> Steps[None]:
        """The arguments as one JSON object after its opening tag, up to and including the function's closing tag."""
        layout = self.format
        yield from self.scanner.skip_space()
        yield from self.scanner.accept(layout.whole)
        if (yield from self.scanner.after_space(["{"])) != "{":
            emit("{}")
            raise MarkupError("{")
        yield from LenientJson(self.scanner, (layout.whole_end, *layout.ends)).value(emit)
        for mark in (layout.whole_end, layout.close):
            yield from self.scanner.skip_space()
            yield from self.scanner.accept(mark)

    def _function_name(self) -> Steps[str]:
        layout = self.format
        first = {mark[0] for mark in layout.name_end}
        word = yield from self.scanner.word("".join(first), limit=200)
        found = yield from self.scanner.at(layout.name_end)
        if found is None:
            raise MarkupError(layout.name_end)
        if found not in (layout.key, layout.end):
            yield from self.scanner.accept(found)
        return _attribute(word) if layout.quoted else word.strip()

    def _parameters(self, function: str, emit: Emit) -> Steps[None]:
        layout, separator = self.format, ""
        while True:
            yield from self.scanner.skip_space()
            if layout.close and (yield from self.scanner.accept(layout.close)):
                return
            if not layout.close and (yield from self.scanner.at([layout.end])):
                return
            if not (yield from self.scanner.peek()):
                return
            key, kinds = yield from self.scanner.attempt(self._key(function))
            yield from self._value(f'{separator}"{quoted(key)}": ', kinds, emit)
            separator = ", "

    def _key(self, function: str) -> Steps[tuple[str, frozenset[str]]]:
        """A parameter's name and types, read up to its value."""
        layout = self.format
        yield from self.scanner.expect(layout.key)
        tag = yield from self.scanner.word(layout.key_end[0][0])
        yield from self._value_opens()
        key = _attribute(tag) if layout.quoted else tag.strip()
        return key, _STATED.get(tag.rpartition(" ")[2]) or self.tools.kinds(function, key)

    def _value_opens(self) -> Steps[None]:
        for mark in self.format.key_end:
            yield from self.scanner.skip_space()
            yield from self.scanner.expect(mark)
        if self.format.newlines:
            yield from self.scanner.accept("\r\n", "\n")

    def _value(self, lead: str, kinds: frozenset[str], emit: Emit) -> Steps[None]:
        """A value up to its closing tag: text is passed on as it comes, the rest when it is whole."""
        cdata = self.format.cdata and (yield from self.scanner.accept("<![CDATA["))
        close = "]]>" + self.format.value_end if cdata else self.format.value_end
        first = yield from self.scanner.peek()
        if kinds == {"string"} or cdata or (not kinds and first and first not in _NOT_TEXT and not first.isspace()):
            emit(lead + '"')
            yield from self._text(close, lambda text: emit(quoted(text)))
            emit('"')
        else:
            parts: list[str] = []
            yield from self._text(close, parts.append)
            emit(lead + to_json("".join(parts), kinds))

    def _text(self, close: str, emit: Callable[[str], None]) -> Steps[None]:
        """Text up to the closing tag. A closing tag that no tag of the call follows belongs to the text."""
        layout = self.format
        ends = ["\n" + close, close] if layout.newlines else [close]
        follow = [mark for mark in (layout.key, layout.close, layout.end) if mark]
        unclosed = [] if not layout.close else ["\n" + layout.close, layout.close]
        markers = Markers([*ends, *unclosed])
        while (found := (yield from self.scanner.until(markers, emit))) is not None:
            if found in ends:
                if (yield from self.scanner.after_space(follow)) is not None:
                    return
            elif (yield from self._function_ends()):
                self.scanner.put_back(layout.close)
                return
            emit(found)

    def _function_ends(self) -> Steps[bool]:
        """Whether a function's closing tag inside a value ends the call, the value's own tag missing."""
        end = self.format.end
        return bool(end) and (yield from self.scanner.after_space([end])) == end


def _attribute(text: str) -> str:
    """The first quoted value in a tag: ``"f" type="x"`` gives ``f``; without quotes the whole text."""
    text = text.strip()
    if text[:1] in ('"', "'"):
        return text[1:].partition(text[0])[0]
    return text


QWEN3_CODER = XmlCalls(
    "<tool_call>",
    "</tool_call>",
    "<function=",
    (">", "\n"),
    "</function>",
    "<parameter=",
    (">",),
    "</parameter>",
    newlines=True,
    templates=(("<tool_call>", "<function="),),
)
SEED_OSS = XmlCalls(
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<function=",
    (">",),
    "</function>",
    "<parameter=",
    (">",),
    "</parameter>",
    templates=(("<seed:tool_call>",),),
)
MINIMAX_M2 = XmlCalls(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=",
    (">",),
    "</invoke>",
    "<parameter name=",
    (">",),
    "</parameter>",
    quoted=True,
    templates=(("<minimax:tool_call>",),),
)
DEEPSEEK_V32 = XmlCalls(
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    "<｜DSML｜invoke name=",
    (">",),
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    (">",),
    "</｜DSML｜parameter>",
    quoted=True,
    templates=(("｜DSML｜",),),
)
DEEPSEEK_V4 = XmlCalls(
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
    "<｜DSML｜invoke name=",
    (">",),
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    (">",),
    "</｜DSML｜parameter>",
    quoted=True,
    templates=(("｜DSML｜", "'tool_calls>"),),
)
MINICPM5 = XmlCalls(
    "",
    "",
    "<function name=",
    (">",),
    "</function>",
    "<param name=",
    (">",),
    "</param>",
    quoted=True,
    cdata=True,
    templates=(('<function name="', '<param name="'),),
)
GLM45 = XmlCalls(
    "<tool_call>",
    "</tool_call>",
    "",
    ("\n", "<arg_key>", "</tool_call>"),
    "",
    "<arg_key>",
    ("</arg_key>", "<arg_value>"),
    "</arg_value>",
    templates=(("<arg_key>",),),
)
LONGCAT = XmlCalls(
    "<longcat_tool_call>",
    "</longcat_tool_call>",
    "",
    ("\n", "<longcat_arg_key>", "</longcat_tool_call>"),
    "",
    "<longcat_arg_key>",
    ("</longcat_arg_key>", "<longcat_arg_value>"),
    "</longcat_arg_value>",
    templates=(("<longcat_tool_call>",),),
)
KIMI_K3 = XmlCalls(
    "<|open|>tools<|sep|>",
    "<|close|>tools<|sep|>",
    "<|open|>call tool=",
    ("<|sep|>",),
    "<|close|>call<|sep|>",
    "<|open|>argument key=",
    ("<|sep|>",),
    "<|close|>argument<|sep|>",
    quoted=True,
    whole='<|open|>json type="object"<|sep|>',
    whole_end="<|close|>json<|sep|>",
    vocab=frozenset({"<|open|>", "<|close|>", "<|sep|>"}),
)
_ATEM = XmlCalls(
    "<atem:function_calls>",
    "</atem:function_calls>",
    "<atem:invoke name=",
    (">",),
    "</atem:invoke>",
    "<atem:parameter name=",
    (">",),
    "</atem:parameter>",
    quoted=True,
)


@dataclass(frozen=True)
class MuseCalls(FormatFacts):
    """Muse Spark's tags, in messages whose header names the tool: ``to=f<|message|><atem:function_calls>…``."""

    header: str = "to="
    starts: tuple[str, ...] = (_ATEM.start, "to=")
    ends: tuple[str, ...] = _ATEM.ends
    strays: tuple[str, ...] = _ATEM.strays
    bare: str = ""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """The functions of a section, after the message's header if one is there."""
        if start == self.header:
            yield from scanner.word("<")
            yield from scanner.expect("<|message|>")
            yield from scanner.skip_space()
            start = yield from scanner.expect(_ATEM.start)
        yield from _ATEM.read(scanner, sink, tools, start)


MUSE_SPARK = MuseCalls(templates=((_ATEM.start,),))
