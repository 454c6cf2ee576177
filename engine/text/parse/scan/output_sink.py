"""Where parsers put what they find: reasoning, content and tool calls, in the order in which the model wrote them."""

import enum
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.text.parse.scan.scanner import Emit

MakeCallId = Callable[[int, str], str]
"""Index and function name of a call to its id."""


class ThinkingState(enum.Enum):
    """How far a completion is."""

    BEFORE = enum.auto()
    """Nothing written yet: a thought may begin."""
    THOUGHT = enum.auto()
    ANSWER = enum.auto()
    """In the answer, or in a tool call that is written there."""
    CALL = enum.auto()
    """In a call that began inside a thought, or is a message of its own (harmony): not where an answer stands."""


@dataclass(slots=True)
class ReasoningDelta:
    """A piece of reasoning text."""

    text: str


@dataclass(slots=True)
class ContentDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of a tool call. The first of an ``index`` has ``id`` and ``name``; ``arguments`` is a piece of JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


ParsedEvent = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclass(slots=True)
class ParsedDelta:
    """What a piece of output added: ``events`` in the order in which the model wrote them, none of them empty.

    Neighbours of one kind (of one call) are one event. The pieces of a call are never interrupted by another event,
    neither within a delta nor from one delta to the next.
    """

    events: list[ParsedEvent] = field(default_factory=list)

    @staticmethod
    def of(reasoning: str = "", content: str = "", tool_calls: Iterable[ToolCallDelta] = ()) -> "ParsedDelta":
        """A delta from texts whose order is not known: reasoning, then content, then calls."""
        return _joined([ReasoningDelta(reasoning), ContentDelta(content), *tool_calls])

    @property
    def reasoning(self) -> str:
        """The reasoning text of all events."""
        return "".join([event.text for event in self.events if isinstance(event, ReasoningDelta)])

    @property
    def content(self) -> str:
        """The content text of all events."""
        return "".join([event.text for event in self.events if isinstance(event, ContentDelta)])

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        """The pieces of tool calls."""
        return [event for event in self.events if isinstance(event, ToolCallDelta)]

    def without_reasoning(self) -> "ParsedDelta":
        """A delta of the other events."""
        return _joined(event for event in self.events if not isinstance(event, ReasoningDelta))

    def add(self, event: ParsedEvent) -> None:
        """Append ``event``, or join it with the last one. The delta must be the only owner of its events."""
        last = self.events[-1] if self.events else None
        if isinstance(event, ToolCallDelta):
            if isinstance(last, ToolCallDelta) and last.index == event.index and event.name is None:
                last.arguments += event.arguments
            elif event.name is not None or event.arguments:
                self.events.append(event)
        elif isinstance(last, ReasoningDelta | ContentDelta) and type(last) is type(event):
            last.text += event.text
        elif event.text:
            self.events.append(event)

    def __add__(self, later: "ParsedDelta") -> "ParsedDelta":
        return _joined([*self.events, *later.events])

    def __bool__(self) -> bool:
        return bool(self.events)


def _joined(events: Iterable[ParsedEvent]) -> ParsedDelta:
    delta = ParsedDelta()
    for event in events:
        delta.add(_copy(event))
    return delta


def _copy(event: ParsedEvent) -> ParsedEvent:
    if isinstance(event, ToolCallDelta):
        return ToolCallDelta(event.index, event.id, event.name, event.arguments)
    return type(event)(event.text)


def random_call_id(index: int, name: str) -> str:  # noqa: ARG001 - the signature of MakeCallId
    """An id as vLLM makes them."""
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


class OutputSink:
    """Collects events. White space that templates put around thoughts and calls is left out.

    ``num_calls`` counts the calls passed on, ``num_seen`` also those past ``max_calls``, which are dropped.
    """

    def __init__(self, *, max_calls: int | None, make_call_id: MakeCallId) -> None:
        self.num_calls = 0
        self.num_seen = 0
        self.thinking_state = ThinkingState.BEFORE
        self.undecided = False
        """Whether this is between messages (harmony): only the next one's header says what follows."""
        self.fresh = True
        """Whether the answer has had only white space since the beginning, the last thought or the last call."""
        self.knows_thoughts = False
        """Whether a thought began, or its start mark was quoted: then its end mark may be a quotation too."""
        self._max_calls = max_calls
        self._make_call_id = make_call_id
        self._ids: set[str] = set()
        self._delta = ParsedDelta()
        self._content_begun = False
        self._content_space = ""
        self._bounded = False
        self._reasoning_begun = False
        self._reasoning_space = ""
        self._thought_opens = True

    def drain(self) -> ParsedDelta:
        """What was found since the last call."""
        delta, self._delta = self._delta, ParsedDelta()
        return delta

    def verbatim(self, text: str) -> None:
        """Add to the answer at once, as it is: where no thoughts or calls are looked for."""
        self._delta.add(ContentDelta(text))

    def content(self, text: str) -> None:
        """Add to the answer. White space at its end waits for what follows."""
        text = self._content_space + text
        body = text.rstrip()
        self._content_space = text[len(body) :]
        if body:
            self._delta.add(ContentDelta(body if self._content_begun or not self._bounded else body.lstrip()))
            self._content_begun, self.fresh, self._bounded = True, False, False
            self.thinking_state = ThinkingState.ANSWER

    def reasoning(self, text: str) -> None:
        """Add to the thought. White space at its beginning and end is left out."""
        if self._thought_opens:
            text = text.lstrip()
            self._thought_opens = not text
        body = text.rstrip()
        if not body:
            self._reasoning_space += text
            return
        self._delta.add(ReasoningDelta(self._reasoning_space + body))
        self._reasoning_space = text[len(body) :]
        self._reasoning_begun = True

    def begin_thought(self) -> None:
        """A thought begins; a second one starts on a new line."""
        self._reasoning_space = "\n" if self._reasoning_begun else ""
        self._thought_opens = self.knows_thoughts = True
        self.thinking_state, self.undecided = ThinkingState.THOUGHT, False
        self.boundary()

    def end_thought(self) -> None:
        """The thought is over."""
        self.thinking_state = ThinkingState.ANSWER
        self.boundary()

    def boundary(self) -> None:
        """There is a thought or a call here: white space around it is not part of any text."""
        self.fresh = self._bounded = True

    def call(self, name: str, call_id: str | None = None) -> Emit:
        """Begin a tool call; returns where its arguments go, as pieces of one JSON object."""
        self.boundary()
        self.num_seen += 1
        if self._max_calls is not None and self.num_calls >= self._max_calls:
            return _drop
        index = self.num_calls
        self.num_calls += 1
        if not call_id or call_id in self._ids:  # a result must find its call
            call_id = self._make_call_id(index, name)
        self._ids.add(call_id)
        self._delta.add(ToolCallDelta(index, call_id, name))
        return lambda text: self._delta.add(ToolCallDelta(index, arguments=text))

    def finish(self) -> None:
        """Nothing more comes: white space at the answer's end is shown, unless a thought or call follows it."""
        if not self._bounded:
            self._delta.add(ContentDelta(self._content_space))
        self._content_space = ""


def _drop(text: str) -> None:
    """Arguments of a call past ``max_calls``."""
