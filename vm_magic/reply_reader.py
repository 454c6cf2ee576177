"""One reply while it is being written: thought, answer and tool calls apart."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.outputs import CompletionDelta

if TYPE_CHECKING:
    from engine.text.output_parser import OutputParser, ParsedDelta


@dataclass(frozen=True)
class ReplyText:
    """What there is to show of a reply. ``num_reasoning_tokens`` counts the tokens of the thought."""

    text: str = ""
    reasoning: str = ""
    num_reasoning_tokens: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def whole(self) -> str:
        """The answer, and tool calls as ``name({"argument": 1})`` below it."""
        calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in self.tool_calls]
        return "\n".join([*([self.text] if self.text else []), *calls])


class ReplyReader:
    """Feeds deltas of the first completion to ``parser``; without one all text is the answer."""

    def __init__(self, parser: "OutputParser | None") -> None:
        self._parser = parser
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._num_reasoning_tokens = 0
        self._num_open_tokens = 0
        self.finish_reason: str | None = None

    @property
    def shown(self) -> ReplyText:
        """Everything so far."""
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        return ReplyText(text, reasoning, self._num_reasoning_tokens, tuple(self._tool_calls))

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls so far, in OpenAI's form; their arguments are JSON text."""
        return json.loads(json.dumps(self._tool_calls))  # type: ignore[no-any-return]

    def read(self, deltas: Iterable[CompletionDelta]) -> None:
        """Take news."""
        for delta in deltas:
            if delta.index or self.finish_reason is not None:
                continue
            if self._parser is None:
                self._text.append(delta.text)
                self.finish_reason = delta.finish_reason
                continue
            self._add(self._parser.feed(delta.text), len(delta.token_ids))
            if delta.finish_reason is not None:
                self._add(self._parser.finish(delta.finish_reason), 0)
                self.finish_reason = self._parser.finish_reason

    def _add(self, parsed: "ParsedDelta", num_tokens: int) -> None:
        self._num_open_tokens += num_tokens
        if parsed.reasoning:
            self._num_reasoning_tokens += self._num_open_tokens
        if parsed.reasoning or parsed.content or parsed.tool_calls:
            self._num_open_tokens = 0
        self._text.append(parsed.content)
        self._reasoning.append(parsed.reasoning)
        for piece in parsed.tool_calls:
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                self._tool_calls.append({"id": piece.id, "type": "function", "function": function})
            self._tool_calls[piece.index]["function"]["arguments"] += piece.arguments
