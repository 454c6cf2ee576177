"""Tool calls written as JSON: one object or a list, after a mark or without one."""

from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson, dumps, loads, quoted
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Emit, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import DemandedForm, FormatFacts, ToolSchemas, function_name

_NAME_KEYS = ("name", "tool_name", "function_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "tool_input")
_ID_KEYS = ("id", "tool_call_id")
_EXTRA_KEYS = ("type", "index")


class CallObject:
    """Reads ``{"name": …, "arguments": {…}}``: the call begins as soon as name and first brace are known."""

    def __init__(
        self, scanner: Scanner, sink: OutputSink, stops: tuple[str, ...], names: frozenset[str] | None
    ) -> None:
        self._scanner = scanner
        self._sink = sink
        self._json = LenientJson(scanner, stops)
        self._names = names
        self._name = ""
        self._id: str | None = None
        self._arguments: str | None = None
        self._begun = False
        self._unknown: list[str] = []

    def read(self) -> Steps[None]:
        """Read one object. Raises MarkupError where it is not a call, and after malformed arguments."""
        yield from self._scanner.expect("{")
        try:
            yield from self._members()
        finally:
            if self._begun:
                self._show_unknown()
        if not self._begun:
            is_call = self._arguments is not None or (self._names is None and not self._unknown)
            if not self._name or not is_call:
                raise MarkupError("a call needs a name and arguments")
            self._begin()(self._arguments or "{}")

    def _members(self) -> Steps[None]:
        separated = True
        while True:
            yield from self._scanner.skip_space()
            if (yield from self._scanner.accept("}")):
                return
            if (yield from self._scanner.accept(",")):
                separated = True
                continue
            if not separated:
                raise MarkupError(",")
            yield from self._scanner.attempt(self._member())
            separated = False

    def _member(self) -> Steps[None]:
        key = yield from self._json.key()
        yield from self._scanner.skip_space()
        first = yield from self._scanner.peek()
        if key == "function" and first == "{":
            self._scanner.take()
            yield from self._members()
        elif key in _NAME_KEYS or (key == "function" and not self._name):
            self._name = function_name(loads((yield from self._json.collect())), self._names)
        elif key in _ARGUMENT_KEYS and not self._begun and self._arguments is None:
            yield from self._read_arguments(first)
        else:
            value = loads((yield from self._json.collect()))
            if self._json.cut:
                raise MarkupError(key)
            if key in _ID_KEYS and isinstance(value, str | int):
                self._id = str(value)
            elif key not in _EXTRA_KEYS:
                self._unknown.append(f'"{quoted(key)}": {dumps(value)}')

    def _read_arguments(self, first: str) -> Steps[None]:
        if first == "{" and self._name:
            yield from self._json.value(self._begin())
            return
        value = loads((yield from self._json.collect()))
        if isinstance(value, str):  # some templates write the object as a string
            value = _object_in(value)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise MarkupError("arguments")
        self._arguments = dumps(value)
        if self._name:
            self._begin()(self._arguments)

    def _begin(self) -> Emit:
        self._begun = True
        self._scanner.commit()
        self._show_unknown()
        return self._sink.call(self._name, self._id)

    def _show_unknown(self) -> None:
        """Members that no call has are text: before the call or after it."""
        for member in self._unknown:
            self._sink.content(f"{member}\n")
        self._unknown.clear()


def _object_in(text: str) -> object:
    try:
        return loads(text) if text.strip() else {}
    except ValueError:
        return text


@dataclass(frozen=True)
class JsonCalls(FormatFacts):
    """Objects with a name and arguments between ``starts`` and ``ends``: one or several, in a list or not.

    ``bare`` characters begin a call without a mark; then the function must be one of the request's.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    bare: str = ""
    more_strays: tuple[str, ...] = ()

    @property
    def strays(self) -> tuple[str, ...]:
        """Marks without a meaning after a call."""
        return (*self.ends, *self.more_strays)

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """Objects and lists of them, up to the end mark or to any other text."""
        names = None if start else tools.names
        seen = sink.num_seen
        while True:
            yield from scanner.skip_space()
            if sink.num_seen > seen and (yield from scanner.accept(*self.ends)):
                return
            char = yield from scanner.peek()
            if char == "{":
                yield from scanner.attempt(CallObject(scanner, sink, self.ends, names).read())
            elif (char == "[" and sink.num_seen == seen) or (char and char in ",;]}" and sink.num_seen > seen):
                scanner.take()
            elif sink.num_seen == seen:
                raise MarkupError("call")
            else:
                return


HERMES = JsonCalls(
    ("<tool_call>",),
    ("</tool_call>",),
    templates=(("<tool_call>",),),
    demanded=DemandedForm("arguments", ("<tool_call>", "\n"), ("\n", "</tool_call>")),
)
LLAMA3_JSON = JsonCalls(
    ("<|python_tag|>",),
    bare="{",
    templates=(("<|python_tag|>",), ("<|eot_id|>", '"parameters": ')),
    demanded=DemandedForm("parameters", separator="; "),
)
_LISTED = '[{"name": "NAME"'
GRANITE = JsonCalls(
    ("<|tool_call|>", "<tool_call>"),
    ("</tool_call>",),
    bare="[",
    bare_opening=_LISTED,
    templates=(("<|tool_call|>",),),
)
PHI4_MINI = JsonCalls(("functools",), templates=(("functools",),))
JAMBA = JsonCalls(("<tool_calls>",), ("</tool_calls>",), templates=(("<tool_calls>",),))
INTERNLM = JsonCalls(
    ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"),
    ("<|action_end|>",),
    templates=(("<|action_start|>",),),
)
COHERE = JsonCalls(("<|START_ACTION|>",), ("<|END_ACTION|>",), templates=(("<|START_ACTION|>",),))
XLAM = JsonCalls(("[TOOL_CALLS]", "<tool_call>"), ("</tool_call>",), bare="[", bare_opening=_LISTED)
GRANITE_20B_FC = JsonCalls(("<function_call>",))
_GIGACHAT3 = "function call<|role_sep|>\n"
GIGACHAT3 = JsonCalls((_GIGACHAT3, f"<|message_sep|>\n\n{_GIGACHAT3}", "<|function_call|>"))
HARMONY_CALLS = JsonCalls(
    ("<|channel|>commentary to=",), templates=(("<|channel|>commentary",), ("to=functions", "<|channel|>"))
)
"""Only its facts: :mod:`engine.text.parse.harmony` reads gpt-oss's calls together with its channels."""
