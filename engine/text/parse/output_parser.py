"""Model output as reasoning, content and tool calls, while it is being written.

``OutputParser.feed`` takes text as it comes (with special tokens shown where
``needs_special_tokens`` says so) and gives what is certain; the concatenated deltas are the same
however the text was cut. Nothing is lost: what turns out not to be a thought or a call is content.
Only half a call at the end of output that a limit cut off is dropped: it is not an answer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.format.names import closest
from engine.outputs import FinishReason
from engine.text.parse.harmony import HarmonyReader
from engine.text.parse.reasoning_parsers import HARMONY, REASONING_PARSERS, ReasoningParser
from engine.text.parse.scan.output_sink import (
    ContentDelta,
    MakeCallId,
    OutputSink,
    ParsedDelta,
    ParsedEvent,
    ReasoningDelta,
    ThinkingState,
    ToolCallDelta,
    random_call_id,
)
from engine.text.parse.scan.scanner import Markers, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers import HARMONY_CALLS, TOOL_PARSERS
from engine.text.parse.tool_parsers.base import ToolParser, ToolSchemas
from engine.text.parse.tool_parsers.forced import ForcedCalls

__all__ = [
    "ContentDelta",
    "OutputParser",
    "ParsedDelta",
    "ParsedEvent",
    "ReasoningDelta",
    "ThinkingState",
    "ToolCallDelta",
    "ToolChoice",
    "make_output_parser",
    "parser_named",
]

ToolChoice = str | Mapping[str, Any] | None
"""``"none"``, ``"auto"``, ``"required"``, a function that must be called (OpenAI's object), or None (as auto)."""


class OutputParser:
    """Parses one completion. Made by :func:`make_output_parser`; not for several threads at once.

    It alone knows where a thought ends: a thinking budget asks a parser of its own (``thinking_state``).

    ``needs_special_tokens``: the request must run with ``skip_special_tokens=False``, since marks are
    special tokens; all others are then removed here. After :meth:`finish`, ``finish_reason`` is the
    one for chats: ``"tool_calls"`` where calls were made and the model stopped by itself.
    """

    def __init__(
        self,
        scanner: Scanner,
        sink: OutputSink,
        steps: Steps[None],
        *,
        needs_special_tokens: bool,
        thinks_later: bool = False,
    ) -> None:
        self.needs_special_tokens = needs_special_tokens
        self._thinks_later = thinks_later
        self.finish_reason: FinishReason | None = None
        self._scanner = scanner
        self._sink = sink
        self._steps = steps
        next(steps)  # up to where it wants text: so the state is known before there is any

    @property
    def called_tools(self) -> bool:
        """Whether a tool call was found so far."""
        return self._sink.num_calls > 0

    @property
    def thinking_state(self) -> ThinkingState:
        """Where the text so far ends: what follows is part of a thought or of the answer."""
        return self._sink.thinking_state

    @property
    def in_thought(self) -> bool:
        """Whether what follows is certainly thought: a message's header may be a call's (harmony)."""
        return self.thinking_state is ThinkingState.THOUGHT and not self._sink.undecided

    @property
    def may_think_again(self) -> bool:
        """Whether another thought may still begin; False for good once it is."""
        return self._thinks_later or self._sink.fresh

    def feed(self, text: str) -> ParsedDelta:
        """Take the next piece of output; gives what became certain."""
        self._scanner.feed(text)
        next(self._steps, None)
        return self._sink.drain()

    def finish(self, finish_reason: FinishReason | None = None) -> ParsedDelta:
        """The output is over: gives what was held back; arguments that were cut off are closed.

        What else there is of half a call is dropped where a limit cut it off; where the model itself ended, it is text.
        """
        self._scanner.close(cut=finish_reason in ("length", "abort"))
        next(self._steps, None)
        self._sink.finish()
        called = self.called_tools and finish_reason == "stop"
        self.finish_reason = "tool_calls" if called else finish_reason
        return self._sink.drain()


def make_output_parser(
    *,
    reasoning_parser: str | ReasoningParser | None,
    tool_call_parser: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice = None,
    prompt_suffix: str = "",
    parallel_tool_calls: bool = True,
    calls_in_thoughts: bool = True,
    special_tokens: Collection[str] = (),
    make_call_id: MakeCallId | None = None,
) -> OutputParser:
    """The parser for one completion of a request.

    ``prompt_suffix`` is the rendered prompt or its end: it determines whether output begins
    inside a thought. Where it is not known (empty), output is held back up to the first mark, which decides.
    Without tools, or with ``tool_choice="none"``, calls are not looked for. A ``required`` or named
    ``tool_choice`` also takes vLLM's forms (a JSON list of name and parameters; the bare arguments).
    A call inside a thought ends it; without ``calls_in_thoughts`` (a grammar waits for the answer) it is thought.
    ``special_tokens`` are the texts of the tokenizer's special tokens. Raises ConfigError for unknown
    parser names.
    """
    reasoning = _reasoning_parser(reasoning_parser)
    tool: ToolParser | None = parser_named(TOOL_PARSERS, tool_call_parser, "tool_call_parser")
    wanted = bool(tools) and tool_choice != "none"
    demanded = wanted and tool_choice not in (None, "auto")
    calls: ToolParser | None = _forced(tool, tool_choice) if demanded else tool if wanted else None
    scanner, schemas = Scanner(), ToolSchemas(tools)
    make_call_id = make_call_id or (tool.make_call_id if tool else random_call_id)
    sink = OutputSink(max_calls=None if parallel_tool_calls else 1, make_call_id=make_call_id)
    if reasoning is HARMONY or tool is HARMONY_CALLS:
        with_calls = wanted and tool is HARMONY_CALLS
        harmony = HarmonyReader(scanner, sink, schemas, with_calls=with_calls, forced=calls if demanded else None)
        steps = harmony.read(prompt_suffix)
        return OutputParser(scanner, sink, steps, needs_special_tokens=True, thinks_later=True)
    if reasoning is None and calls is None:
        return OutputParser(scanner, sink, _read_plain(scanner, sink), needs_special_tokens=False)
    marks = _marks(reasoning, calls)
    known = set(special_tokens)
    needs = bool(known.intersection(marks)) or any(token in mark for mark in marks for token in known)
    dropped = tuple(known.difference(marks)) if needs else ()
    in_thoughts = calls if calls_in_thoughts else None
    reader = _MarkedReader(scanner, sink, reasoning, calls, in_thoughts, schemas, dropped)
    inside = reasoning.begins_inside(prompt_suffix) if reasoning is not None else False
    if reasoning is not None and reasoning.begins_behind(prompt_suffix):
        sink.end_thought()
    thinks_later = reasoning is not None and (reasoning.anywhere or calls is not None)
    return OutputParser(scanner, sink, reader.read(inside), needs_special_tokens=needs, thinks_later=thinks_later)


def _reasoning_parser(given: str | ReasoningParser | None) -> ReasoningParser | None:
    if isinstance(given, ReasoningParser):
        return given
    found: ReasoningParser | None = parser_named(REASONING_PARSERS, given, "reasoning_parser")
    return found


def parser_named(table: Mapping[str, Any], name: str | None, flag: str) -> Any:
    """The entry of a parser table; None for None and "none". Raises ConfigError for unknown names."""
    if name is None or name == "none":
        return None
    if name not in table:
        allowed = ", ".join(sorted(table))
        meant = f"; did you mean {found}?" if (found := closest(name, table)) else ""
        raise ConfigError(
            f"--{flag.replace('_', '-')} {name}: not known; use one of {allowed}, or none{meant}",
            flag=flag,
            value=name,
            allowed=allowed,
        )
    return table[name]


def _forced(tool: ToolParser | None, tool_choice: ToolChoice) -> ToolParser:
    """The parser of a reply that must consist of calls."""
    name = None
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = str((function if isinstance(function, Mapping) else tool_choice).get("name"))
    return ForcedCalls(tool, name)


def _marks(reasoning: ReasoningParser | None, calls: ToolParser | None) -> tuple[str, ...]:
    return (*(reasoning.marks if reasoning else ()), *((*calls.starts, *calls.strays) if calls else ()))


def _read_plain(scanner: Scanner, sink: OutputSink) -> Steps[None]:
    """All text is content, at once."""
    yield from scanner.until(Markers([]), sink.verbatim)


@dataclass(frozen=True)
class _MarkedReader:
    """Reads output whose thoughts and calls are between marks. ``dropped`` are special tokens without a meaning.

    ``in_thoughts`` reads the calls that a thought may end with.
    """

    scanner: Scanner
    sink: OutputSink
    reasoning: ReasoningParser | None
    calls: ToolParser | None
    in_thoughts: ToolParser | None
    schemas: ToolSchemas
    dropped: tuple[str, ...]

    def read(self, inside: bool | None) -> Steps[None]:
        """The whole output; ``inside`` says whether it begins in a thought, None that its first mark decides."""
        markers = Markers([*_marks(self.reasoning, self.calls), *self.dropped])
        if self.reasoning and (inside or (inside is None and (yield from self._ends_first(self.reasoning)))):
            self.sink.thinking_state = ThinkingState.THOUGHT
            yield from self.scanner.skip_space()
            yield from self.scanner.accept(self.reasoning.start)  # some models open the thought once more
            yield from self._thought(self.reasoning)
        while True:
            if self.sink.fresh and self.calls and self.calls.bare:
                yield from self._bare_calls(self.calls)
            mark = yield from self.scanner.until(markers, self.sink.content, self._cut_mark)
            if mark is None:
                return
            yield from self._marked(mark)

    def _cut_mark(self, text: str) -> None:
        """The beginning of a mark, cut off: text, except after a call or where calls are demanded."""
        around_calls = self.calls and any(m.startswith(text) for m in (*self.calls.starts, *self.calls.strays))
        if not (around_calls and (self.sink.num_seen or self._forced)):
            self.sink.content(text)

    @property
    def _forced(self) -> bool:
        return isinstance(self.calls, ForcedCalls)

    def _ends_first(self, reasoning: ReasoningParser) -> Steps[bool]:
        """Whether a thought ends before one begins: then it began in the prompt, which is not known."""
        starts = self.calls.starts if self.calls else ()
        place = self.scanner.mark()
        found = yield from self.scanner.until(Markers([reasoning.start, reasoning.end, *starts]), lambda _: None)
        self.scanner.rewind(place)
        self.scanner.release(place)
        return found == reasoning.end

    def _marked(self, mark: str) -> Steps[None]:
        reasoning, calls = self.reasoning, self.calls
        if mark in self.dropped:
            return
        if reasoning and mark in reasoning.wrappers:
            if self.sink.fresh:
                self.sink.boundary()
            return
        if reasoning and mark == reasoning.start and (reasoning.anywhere or self.sink.fresh):
            yield from self._thought(reasoning)
        elif calls and mark in calls.starts:
            if not (yield from self._calls(calls, mark)):
                self.sink.content(mark)
        elif not self._is_stray(mark):
            self.sink.knows_thoughts |= bool(reasoning and mark == reasoning.start)
            self.sink.content(mark)

    def _is_stray(self, mark: str) -> bool:
        if self.calls and mark in self.calls.strays and self.sink.num_seen:
            return True
        if not self.reasoning or mark != self.reasoning.end:
            return False
        unopened = not (self.sink.knows_thoughts or self.reasoning.prose)
        return self.reasoning.anywhere or self.sink.fresh or unopened

    def _thought(self, reasoning: ReasoningParser) -> Steps[None]:
        """Up to the thought's end, which a tool call that begins inside it is too."""
        starts = self.in_thoughts.starts if self.in_thoughts else ()
        markers = Markers([reasoning.end, *starts, *self.dropped])
        self.sink.begin_thought()
        while True:
            mark = yield from self.scanner.until(markers, self.sink.reasoning)
            if mark is None or mark == reasoning.end:
                break
            if self.in_thoughts and mark in starts:
                if (yield from self._calls(self.in_thoughts, mark)):
                    break
                self.sink.reasoning(mark)
        self.sink.end_thought()

    def _bare_calls(self, calls: ToolParser) -> Steps[None]:
        space = yield from self.scanner.skip_space()
        self.sink.content(space)
        first = yield from self.scanner.peek()
        bare = first and first in calls.bare and not (yield from self.scanner.at(calls.starts))
        if bare and not (yield from self._calls(calls, "")):
            self.sink.content(self.scanner.take())

    def _calls(self, calls: ToolParser, start: str) -> Steps[bool]:
        """Try to read calls. False, and nothing read, if the text is not a call. What a limit cut off is dropped."""
        mark = self.scanner.mark()
        seen, state = self.sink.num_seen, self.sink.thinking_state
        inside = state is ThinkingState.THOUGHT
        self.sink.thinking_state = ThinkingState.CALL if inside else ThinkingState.ANSWER
        self.scanner.at_end = False
        try:
            yield from calls.read(self.scanner, self.sink, self.schemas, start)
        except MarkupError:
            begun = self.sink.num_seen > seen
            if not begun:
                self.scanner.rewind(mark)
            dropped = self._forced or ((begun or start) and self.scanner.cut)
            if self.scanner.at_end and dropped and not self.scanner.holds(calls.ends):
                self.scanner.take_rest()
            elif not begun:
                self.sink.thinking_state = state
                return False
        finally:
            self.scanner.release(mark)
        self.sink.boundary()
        return True
