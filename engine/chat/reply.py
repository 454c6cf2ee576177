"""A reply read as it comes: the only place where deltas become content, reasoning, tool calls and counts.

The port's four formats, ``%%chat``, maps, ``explain`` and ``parse_output`` all read here, so a whole reply is the sum
of its stream, in the order in which the model wrote it.
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.outputs import CompletionDelta, FinishReason, LogprobsAtPosition, Reply, Usage
from engine.text.parse.scan.output_sink import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta

if TYPE_CHECKING:
    from engine.text.parse.output_parser import OutputParser


@dataclass(slots=True)
class ParsedCompletionDelta(CompletionDelta):
    """A delta that was parsed elsewhere (by a remote server). ``parsed`` is None for a raw completion."""

    parsed: ParsedDelta | None = None


class ReplyBuilder:
    """Takes the deltas of one completion in order. Without a ``parser`` all text is content.

    ``keeps_reasoning`` False leaves the reasoning out of everything but the count of its tokens.
    ``finish_reason`` is ``tool_calls`` where the model stopped to call tools. ``parts`` is what was written, in order:
    ``("reasoning", text)``, ``("content", text)`` and ``("tool_call", index)``.
    """

    def __init__(self, parser: "OutputParser | None" = None, *, keeps_reasoning: bool = True) -> None:
        self._parser = parser
        self._keeps_reasoning = keeps_reasoning
        self._parts: list[tuple[str, list[str]]] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._num_open_tokens = 0
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobsAtPosition] = []
        self.num_reasoning_tokens = 0
        self.num_tokens_before_answer: int | None = None
        """Tokens before the first that belongs to the answer or to a call; None while there is none."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.thinking_cut: str | None = None

    def add(self, delta: CompletionDelta) -> ParsedDelta:
        """What ``delta`` adds, already added to this reply."""
        self.token_ids += delta.token_ids
        if delta.logprobs:
            self.logprobs += delta.logprobs
        self.stop_reason = delta.stop_reason
        self.thinking_cut = delta.thinking_cut or self.thinking_cut
        parsed = self._parse(delta)
        self._num_open_tokens += len(delta.token_ids)
        if not parsed.events:
            return parsed
        self._count(parsed)
        return self._append(parsed)

    def finish(self, reason: FinishReason | None) -> ParsedDelta:
        """The output ended without a delta that says so: what the parser held back, already added."""
        if self._parser is None:
            self.finish_reason = reason
            return ParsedDelta()
        parsed = self._parser.finish(reason)
        self.finish_reason = self._parser.finish_reason
        return self._append(parsed)

    @property
    def parts(self) -> list[tuple[str, str | int]]:
        """Everything so far, in the order in which it was written."""
        numbers = itertools.count()
        return [(kind, next(numbers) if kind == "tool_call" else "".join(pieces)) for kind, pieces in self._parts]

    @property
    def content(self) -> str:
        """The answer so far."""
        return self._text("content")

    @property
    def reasoning(self) -> str:
        """The thought so far."""
        return self._text("reasoning")

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """A copy of the calls so far, in OpenAI's form; their arguments are JSON text."""
        return copy.deepcopy(self._tool_calls)

    def reply(self) -> Reply:
        """Everything so far, without what only the request knows (prompt tokens, times, messages)."""
        return Reply(
            self.content,
            reasoning=self.reasoning or None,
            tool_calls=self.tool_calls,
            finish_reason=self.finish_reason,
            usage=Usage(completion_tokens=len(self.token_ids), reasoning_tokens=self.num_reasoning_tokens),
            logprobs=self.logprobs or None,
        )

    def _parse(self, delta: CompletionDelta) -> ParsedDelta:
        over = delta.finish_reason
        if isinstance(delta, ParsedCompletionDelta) and delta.parsed is not None:
            # A call that the server was required to make ends with "stop" in vLLM.
            called = over == "stop" and (self._tool_calls or delta.parsed.tool_calls)
            self.finish_reason = "tool_calls" if called else over
            return delta.parsed
        if self._parser is None:
            self.finish_reason = over
            return ParsedDelta([ContentDelta(delta.text)] if delta.text else [])
        parsed = self._parser.feed(delta.text)
        if over is not None:
            parsed = parsed + self._parser.finish(over)
            self.finish_reason = self._parser.finish_reason
        return parsed

    def _count(self, parsed: ParsedDelta) -> None:
        """Tokens up to the last one that showed a thought are reasoning; marks of the answer are not."""
        for event in parsed.events:
            if type(event) is ReasoningDelta:
                self.num_reasoning_tokens += self._num_open_tokens
                break
        else:
            if self.num_tokens_before_answer is None:
                self.num_tokens_before_answer = len(self.token_ids) - self._num_open_tokens
        self._num_open_tokens = 0

    def _append(self, parsed: ParsedDelta) -> ParsedDelta:
        if not self._keeps_reasoning:
            parsed = parsed.without_reasoning()
        parts = self._parts
        for event in parsed.events:
            if isinstance(event, ToolCallDelta):
                self._call(event)
                continue
            kind = "content" if isinstance(event, ContentDelta) else "reasoning"
            if parts and parts[-1][0] == kind:
                parts[-1][1].append(event.text)
            else:
                parts.append((kind, [event.text]))
        return parsed

    def _call(self, piece: ToolCallDelta) -> None:
        while len(self._tool_calls) <= piece.index:
            self._parts.append(("tool_call", []))
            self._tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self._tool_calls[piece.index]
        call["id"] = piece.id or call["id"]
        call["function"]["name"] = piece.name or call["function"]["name"]
        call["function"]["arguments"] += piece.arguments

    def _text(self, kind: str) -> str:
        return "".join(piece for name, pieces in self._parts if name == kind for piece in pieces)


def read_whole(
    parser: "OutputParser | None", text: str | Iterable[str], finish_reason: FinishReason | None = None
) -> Reply:
    """The reply that ``parser`` makes of ``text``, or of the pieces of a text."""
    builder = ReplyBuilder(parser)
    for piece in [text] if isinstance(text, str) else text:
        builder.add(CompletionDelta(0, piece, []))
    builder.finish(finish_reason)
    return builder.reply()
