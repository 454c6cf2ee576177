"""Tool calls with the name outside of a JSON (or JSON-like) object of arguments."""

import re
import secrets
import string
from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Markers, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolSchemas, function_name
from engine.text.parse.tool_parsers.json_calls import JsonCalls

_LONGEST_NAME = 256
_NUMBERED = re.compile(r"(?:functions\.)?(.+?):\d+")


@dataclass(frozen=True)
class NamedCalls(FormatFacts):
    """``begin`` name ``arguments`` {…} ``end``, any number of times in a section (``start`` … ``section_end``).

    ``raw_quote`` delimits strings without escapes. ``lead`` are texts before the name and ``tail`` those
    after the object; each may be missing. The name ``functions.f:0`` calls f and is the call's id too; what
    follows ``id_mark`` in a name is also an id. ``more_strays`` are further marks without a meaning after a call.
    """

    start: str
    section_end: str = ""
    begin: str = ""
    lead: tuple[str, ...] = ()
    arguments: str = ""
    tail: tuple[str, ...] = ()
    end: str = ""
    raw_quote: str = ""
    id_mark: str = ""
    more_strays: tuple[str, ...] = ()

    @property
    def starts(self) -> tuple[str, ...]:
        """The section's mark, and a call's for models that leave the section out."""
        return tuple(filter(None, (self.start, self.begin)))

    @property
    def ends(self) -> tuple[str, ...]:
        """The ends of a call and of the section."""
        return tuple(filter(None, (self.end, self.section_end)))

    @property
    def strays(self) -> tuple[str, ...]:
        """Marks within a section, and those that follow one."""
        return (*self.ends, *self.more_strays)

    @property
    def bare(self) -> str:
        """Empty: calls always begin with a mark."""
        return ""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:  # noqa: ARG002
        """The calls of a section."""
        yield from self._call(scanner, sink, begun=start == self.begin)
        while self.begin and (yield from scanner.after_space([self.begin])):
            yield from scanner.attempt(self._call(scanner, sink))
        if self.section_end and (yield from scanner.after_space([self.section_end])):
            yield from self._skip(scanner, self.section_end)

    def _call(self, scanner: Scanner, sink: OutputSink, *, begun: bool = False) -> Steps[None]:
        yield from scanner.skip_space()
        if self.begin and not begun:
            yield from scanner.expect(self.begin)
        for text in self.lead:
            yield from self._skip(scanner, text)
        name, call_id = self._parts((yield from self._name(scanner)))
        prose: list[str] = []
        found = yield from scanner.until(Markers(["{", *self.ends, *self.starts]), prose.append)
        if found != "{":
            raise MarkupError("arguments")
        scanner.put_back("{")
        scanner.commit()
        sink.boundary()
        for text in prose:
            sink.content(text)
        yield from LenientJson(scanner, self.ends, self.raw_quote).value(sink.call(name, call_id))
        for text in (*self.tail, self.end):
            yield from self._skip(scanner, text)

    def _skip(self, scanner: Scanner, text: str) -> Steps[None]:
        found = (yield from scanner.after_space([text])) if text else ""
        if found:
            yield from scanner.skip_space()
            yield from scanner.accept(text)
        elif found is None and scanner.at_end:
            raise MarkupError(text)  # its beginning is there

    def _name(self, scanner: Scanner) -> Steps[str]:
        """The text before the arguments; their mark is consumed, the brace is not."""
        marks = [mark for mark in (self.arguments, self.end, self.section_end, "{") if mark]
        name = ""
        while not (found := (yield from scanner.at(marks))):
            if not (yield from scanner.peek()) or len(name) > _LONGEST_NAME:
                raise MarkupError("name")
            name += scanner.take()
        if found not in (self.arguments, "{") or not name.strip():
            raise MarkupError("name")
        if found == self.arguments:
            yield from scanner.accept(found)
        return name.strip()

    def _parts(self, name: str) -> tuple[str, str | None]:
        """The function's name and the id, if the text contains one."""
        if self.id_mark and self.id_mark in name:
            name, _, call_id = name.partition(self.id_mark)
            return function_name(name), call_id.strip()
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            return function_name(numbered.group(1)), name
        return function_name(name.removeprefix("functions.")), None


def mistral_call_id(index: int, name: str) -> str:  # noqa: ARG001 - the signature of MakeCallId
    """Nine letters and digits: Mistral's templates refuse any other ids in later messages."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class MistralCalls(FormatFacts):
    """``[TOOL_CALLS]`` before a JSON list of calls, or before each ``name[ARGS]{…}``."""

    starts: tuple[str, ...] = ("[TOOL_CALLS]",)
    ends: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    bare: str = ""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """Either form."""
        listed = yield from scanner.after_space(["[", "{"])
        form = _MISTRAL_LIST if listed else _MISTRAL_NAMED
        yield from form.read(scanner, sink, tools, start)


_MISTRAL_LIST = JsonCalls(("[TOOL_CALLS]",))
_MISTRAL_NAMED = NamedCalls("[TOOL_CALLS]", arguments="[ARGS]", id_mark="[CALL_ID]")
MISTRAL = MistralCalls(templates=(("[TOOL_CALLS]",),), make_call_id=mistral_call_id)
GEMMA4 = NamedCalls(
    "<|tool_call>",
    lead=("call:",),
    end="<tool_call|>",
    raw_quote='<|"|>',
    more_strays=("<|tool_response>",),
    templates=(("<|tool_call>", "<tool_call|>"),),
)
FUNCTION_GEMMA = NamedCalls(
    "<start_function_call>",
    lead=("call:",),
    end="<end_function_call>",
    raw_quote="<escape>",
    more_strays=("<start_function_response>",),
    templates=(("<start_function_call>",),),
)
KIMI_K2 = NamedCalls(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    begin="<|tool_call_begin|>",
    arguments="<|tool_call_argument_begin|>",
    end="<|tool_call_end|>",
    templates=(("<|tool_calls_section_begin|>",),),
)
DEEPSEEK_V3 = NamedCalls(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    begin="<｜tool▁call▁begin｜>",
    lead=("function", "<｜tool▁sep｜>"),
    arguments="\n```json\n",
    tail=("```",),
    end="<｜tool▁call▁end｜>",
    templates=(("<｜tool▁calls▁begin｜>", "```json"),),
)
DEEPSEEK_V31 = NamedCalls(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    begin="<｜tool▁call▁begin｜>",
    arguments="<｜tool▁sep｜>",
    end="<｜tool▁call▁end｜>",
    templates=(("<｜tool▁calls▁begin｜>",),),
)
