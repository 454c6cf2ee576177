"""Where parsers put what they find: thought, answer and tool calls, as deltas."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.text.parse.scan.scanner import Emit

MakeCallId = Callable[[int, str], str]
"""Index and function name of a call to its id."""


@dataclass(slots=True)
class ToolCallDelta:
    """News of a tool call. The first of an ``index`` carries ``id`` and ``name``; ``arguments`` is a piece of JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ParsedDelta:
    """What a piece of output added: text of the thought, text of the answer, pieces of tool calls."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


def random_call_id(index: int, name: str) -> str:  # noqa: ARG001 - the signature of MakeCallId
    """An id as vLLM makes them."""
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


def mistral_call_id(index: int, name: str) -> str:  # noqa: ARG001 - the signature of MakeCallId
    """Nine letters and digits: Mistral's templates refuse other ids when they come back."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class OutputSink:
    """Collects deltas. White space that templates put around thoughts and calls is left out.

    ``num_calls`` counts calls handed on, ``num_seen`` also those past ``max_calls``, which are dropped.
    """

    def __init__(self, *, max_calls: int | None, make_call_id: MakeCallId) -> None:
        self.num_calls = 0
        self.num_seen = 0
        self.fresh = True
        """Whether the answer has only white space since the beginning, the last thought or the last call."""
        self.knows_thoughts = False
        """Whether a thought began, or the mark that begins one was quoted: then its end may be a quotation too."""
        self._max_calls = max_calls
        self._make_call_id = make_call_id
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
        self._delta.content += text

    def content(self, text: str) -> None:
        """Add to the answer. White space at its end waits for what follows."""
        text = self._content_space + text
        body = text.rstrip()
        self._content_space = text[len(body) :]
        if body:
            self._delta.content += body if self._content_begun or not self._bounded else body.lstrip()
            self._content_begun, self.fresh, self._bounded = True, False, False

    def reasoning(self, text: str) -> None:
        """Add to the thought. White space at its beginning and end is left out."""
        if self._thought_opens:
            text = text.lstrip()
            self._thought_opens = not text
        body = text.rstrip()
        if not body:
            self._reasoning_space += text
            return
        self._delta.reasoning += self._reasoning_space + body
        self._reasoning_space = text[len(body) :]
        self._reasoning_begun = True

    def begin_thought(self) -> None:
        """A thought begins; a second one goes on a line of its own."""
        self._reasoning_space = "\n" if self._reasoning_begun else ""
        self._thought_opens = self.knows_thoughts = True
        self.boundary()

    def boundary(self) -> None:
        """A thought or a call stands here: white space around it belongs to no text."""
        self.fresh = self._bounded = True

    def call(self, name: str, call_id: str | None = None) -> Emit:
        """Begin a tool call; returns where its arguments go, as pieces of one JSON object."""
        self.boundary()
        self.num_seen += 1
        if self._max_calls is not None and self.num_calls >= self._max_calls:
            return _drop
        index = self.num_calls
        self.num_calls += 1
        self._delta.tool_calls.append(ToolCallDelta(index, call_id or self._make_call_id(index, name), name))
        return lambda text: self._arguments(index, text)

    def finish(self) -> None:
        """Nothing more comes: white space at the answer's end is shown, unless a thought or call follows it."""
        if not self._bounded:
            self._delta.content += self._content_space
        self._content_space = ""

    def _arguments(self, index: int, text: str) -> None:
        calls = self._delta.tool_calls
        if calls and calls[-1].index == index:
            calls[-1].arguments += text
        elif text:
            calls.append(ToolCallDelta(index, arguments=text))


def _drop(text: str) -> None:
    """Arguments of a call past ``max_calls``."""
