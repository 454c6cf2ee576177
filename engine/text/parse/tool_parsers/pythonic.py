"""Tool calls as a list of Python calls: ``[f(a=1, b="x"), g()]``."""

from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson, quoted
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Emit, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolSchemas, function_name


@dataclass(frozen=True)
class PythonicCalls(FormatFacts):
    """A list of calls with keyword arguments, between ``starts`` and ``ends`` or bare (declared functions only).

    ``lines``: each call is on its own line, without brackets and commas.
    """

    starts: tuple[str, ...] = ("<|tool_call_start|>",)
    ends: tuple[str, ...] = ("<|tool_call_end|>",)
    bare: str = "["
    lines: bool = False

    @property
    def strays(self) -> tuple[str, ...]:
        """The ends."""
        return self.ends

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """The calls of one list; models sometimes omit the brackets around a single call."""
        names = None if start else tools.names
        yield from scanner.skip_space()
        listed = yield from scanner.accept("[")
        if not listed and not start:
            raise MarkupError("[")
        yield from self._call(scanner, sink, names)
        while True:
            yield from scanner.skip_space()
            if not (yield from scanner.accept(",")) and not (self.lines and (yield from self._name_follows(scanner))):
                break
            yield from scanner.skip_space()
            if (yield from scanner.at(["]"])):
                break
            yield from scanner.attempt(self._call(scanner, sink, names))
        if listed:
            yield from scanner.accept("]")
        if start and (yield from scanner.after_space(self.strays)):
            yield from scanner.skip_space()
            yield from scanner.accept(*self.strays)

    def _name_follows(self, scanner: Scanner) -> Steps[bool]:
        char = yield from scanner.peek()
        return char.isalpha() or char == "_"

    def _call(self, scanner: Scanner, sink: OutputSink, names: frozenset[str] | None) -> Steps[None]:
        yield from scanner.skip_space()
        name = function_name((yield from scanner.word("()[]{}\"',=\n", limit=200)), names)
        yield from scanner.expect("(")
        scanner.commit()
        emit = sink.call(name)
        emit("{")
        try:
            yield from self._arguments(scanner, emit)
        except MarkupError:
            emit("}")
            raise
        emit("}")

    def _arguments(self, scanner: Scanner, emit: Emit) -> Steps[None]:
        values = LenientJson(scanner, self.strays)
        separator = ""
        while True:
            yield from scanner.skip_space()
            char = yield from scanner.peek()
            if char == ",":
                scanner.take()
                continue
            if char == ")":
                scanner.take()
                return
            key = yield from scanner.attempt(self._key(scanner))
            yield from scanner.skip_space()
            quote = yield from scanner.accept('"', "'")
            if quote:
                emit(f'{separator}"{quoted(key)}": "')
                yield from values.string(quote, emit, lambda: self._string_ends(scanner))
                emit('"')
            else:
                yield from values.value(emit, f'{separator}"{quoted(key)}": ')
            separator = ", "

    def _key(self, scanner: Scanner) -> Steps[str]:
        key = (yield from scanner.word("=()[]{},\"'\n")).strip()
        yield from scanner.expect("=")
        if not key:
            raise MarkupError("key")
        return key

    def _string_ends(self, scanner: Scanner) -> Steps[bool]:
        """Whether what follows a quote is the next argument or the end of the call: templates do not escape quotes."""
        place = scanner.mark()
        yield from scanner.skip_space()
        char = yield from scanner.peek()
        if char == ",":
            scanner.take()
            yield from scanner.skip_space()
            while (yield from scanner.peek()).isidentifier() or (yield from scanner.peek()).isdigit():
                scanner.take()
            ends = (yield from scanner.after_space(["=", ")"])) is not None
        elif char == ")":
            scanner.take()
            over = ["\n"] if self.lines else []
            behind = (yield from scanner.at(over)) or (yield from scanner.after_space(["]", ",", *self.strays]))
            ends = behind is not None
        else:
            ends = not char
        scanner.rewind(place)
        scanner.release(place)
        return ends


PYTHONIC = PythonicCalls(
    bare_opening="[NAME(",
    templates=(("<|tool_list_start|>",), ("<|tool_call_start|>",)),
    vocab=frozenset({"<|tool_call_start|>", "<|tool_call_end|>"}),
)
OLMO3 = PythonicCalls(("<function_calls>",), ("</function_calls>",), bare="", lines=True)
