"""Replies read as they come: the model's text split into reasoning, content and tool calls.

Chat completions, Responses and Messages all take their deltas from here; a plain reply is the sum of the deltas
that its stream would have sent.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.openai.schema.backend import ServedParser
from engine.openai.serving.generation import Choice, Job
from engine.outputs import CompletionDelta
from engine.text.parse.scan.output_sink import ParsedDelta


@dataclass
class ToolCall:
    """A call under way; ``arguments`` is JSON text that grows."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def as_chat(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Reply:
    """One choice, read by its parser. ``finish_reason`` is ``tool_calls`` where the model stopped to call tools."""

    choice: Choice
    parser: ServedParser
    include_reasoning: bool = True
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    num_reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._num_open_tokens = 0

    @property
    def reasoning(self) -> str:
        """The thought so far."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """The answer so far."""
        return "".join(self._content)

    def read(self, delta: CompletionDelta) -> ParsedDelta:
        """What ``delta`` adds, already added to this reply."""
        parsed = self.parser.feed(delta.text)
        if delta.finish_reason is not None:
            parsed += self.parser.finish(delta.finish_reason)
            self.finish_reason = self.parser.finish_reason
        self._count(len(delta.token_ids), parsed)
        if not self.include_reasoning:
            parsed = parsed.without_reasoning()
        self._add(parsed)
        return parsed

    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI's form, with the reasoning under both of its names."""
        calls = [call.as_chat() for call in self.tool_calls]
        message = {"role": "assistant", "content": self.content or (None if calls else ""), "refusal": None}
        return message | named_reasoning(self.reasoning) | ({"tool_calls": calls} if calls else {})

    def _count(self, num_tokens: int, parsed: ParsedDelta) -> None:
        """Tokens up to the last one that showed a thought are reasoning; markers of the answer are not."""
        self._num_open_tokens += num_tokens
        if parsed.reasoning:
            self.num_reasoning_tokens += self._num_open_tokens
        if parsed.reasoning or parsed.content or parsed.tool_calls:
            self._num_open_tokens = 0

    def _add(self, parsed: ParsedDelta) -> None:
        self._reasoning.append(parsed.reasoning)
        self._content.append(parsed.content)
        for piece in parsed.tool_calls:
            while len(self.tool_calls) <= piece.index:
                self.tool_calls.append(ToolCall())
            call = self.tool_calls[piece.index]
            call.id, call.name = piece.id or call.id, piece.name or call.name
            call.arguments += piece.arguments


@dataclass
class ChatJob:
    """A job whose choices are replies of an assistant."""

    job: Job
    replies: Sequence[Reply]

    async def deltas(self) -> AsyncIterator[tuple[Reply, CompletionDelta, ParsedDelta]]:
        """Deltas as they come, each with what its parser made of it."""
        async for choice, delta in self.job.deltas():
            reply = self.replies[choice.index]
            yield reply, delta, reply.read(delta)

    def usage(self) -> dict[str, Any]:
        """Token counts so far, in the chat API's form."""
        num_reasoning = sum(reply.num_reasoning_tokens for reply in self.replies)
        return self.job.usage() | {"completion_tokens_details": {"reasoning_tokens": num_reasoning}}


def named_reasoning(text: str) -> dict[str, str]:
    """A thought as ``reasoning`` (vLLM's name) and ``reasoning_content`` (its old one, which others kept)."""
    return {"reasoning": text, "reasoning_content": text} if text else {}
