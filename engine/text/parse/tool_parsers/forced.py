"""Calls that a grammar forced: ``tool_choice`` required or a named function, in vLLM's two forms.

Required: ``[{"name": …, "parameters": {…}}, …]``. Named: the arguments object alone.
"""

from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson
from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolParser, ToolSchemas
from engine.text.parse.tool_parsers.json_calls import JsonCalls

_REQUIRED = JsonCalls((), bare="[{")


@dataclass(frozen=True)
class ForcedCalls(FormatFacts):
    """The model's own form (``native``, after its marks) or vLLM's. ``name`` is the named function, if one is."""

    native: ToolParser | None
    name: str | None

    @property
    def starts(self) -> tuple[str, ...]:
        """The native marks."""
        return self.native.starts if self.native else ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The native ends."""
        return self.native.ends if self.native else ()

    @property
    def strays(self) -> tuple[str, ...]:
        """The native strays."""
        return self.native.strays if self.native else ()

    @property
    def bare(self) -> str:
        """A list or an object; for a named function its arguments object."""
        return "{" if self.name else "[{"

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """The native form after its mark (or where that is a bare object too), else vLLM's."""
        if self.native and (start or (self.name and "{" in self.native.bare)):
            yield from self.native.read(scanner, sink, tools, start)
        elif self.name:
            scanner.commit()
            yield from LenientJson(scanner).value(sink.call(self.name))
        else:
            yield from _REQUIRED.read(scanner, sink, tools, start)
