"""One reply while it is being written: thought, answer and tool calls apart."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.batch.scored_token import ScoredToken, scored_token
from engine.outputs import THINKING_CUTS, CompletionDelta, LogprobsAtPosition
from engine.text.tokens.detokenizer import WholeCharacters
from vm_magic.show.tool_cards import ToolOutcome, call_line

if TYPE_CHECKING:
    from engine.text.parse.output_parser import OutputParser, ParsedDelta
    from engine.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReplyText:
    """What there is to show of a reply.

    ``num_reasoning_tokens`` counts the tokens of the thought, ``thinking_cut`` says why it was ended for the model, if
    it was. ``outcomes`` are those of the first
    ``tool_calls``. ``tokens`` are there where log-probabilities were asked for; the answer begins behind the
    first ``num_tokens_before_answer``. ``earlier`` are the model's turns before this one in the same cell.
    """

    text: str = ""
    reasoning: str = ""
    num_reasoning_tokens: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    outcomes: tuple[ToolOutcome, ...] = ()
    tokens: tuple[ScoredToken, ...] = ()
    num_tokens_before_answer: int = 0
    earlier: "tuple[ReplyText, ...]" = ()
    thinking_cut: str | None = None

    def thought_size(self) -> str:
        """The thought's length, and how it ended if the model did not end it: ``134 tokens, ended by hand``."""
        size = f"{self.num_reasoning_tokens} tokens"
        return f"{size}, {THINKING_CUTS[self.thinking_cut]}" if self.thinking_cut else size

    def calls(self) -> list[tuple[Mapping[str, Any], ToolOutcome | None]]:
        """Each tool call with its outcome, None while there is none."""
        missing = [None] * (len(self.tool_calls) - len(self.outcomes))
        return list(zip(self.tool_calls, [*self.outcomes, *missing], strict=True))

    def whole(self) -> str:
        """The answer, and tool calls as ``name(argument=1) → result`` below it; earlier turns first."""
        lines = [call_line(call, outcome) for call, outcome in self.calls()]
        parts = [turn.whole() for turn in self.earlier] + ([self.text] if self.text else []) + lines
        return "\n".join(part for part in parts if part)


class ReplyReader:
    """Feeds deltas of the first completion to ``parser``; without one all text is the answer.

    With a ``tokenizer``, tokens that share a character are read together.
    """

    def __init__(self, parser: "OutputParser | None" = None, tokenizer: "Tokenizer | None" = None) -> None:
        self._parser = parser
        self._characters = (
            None if tokenizer is None else WholeCharacters(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
        )
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._tokens: list[ScoredToken] = []
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._num_open_tokens = 0
        self._answer_begins: int | None = None
        self._thinking_cut: str | None = None
        self.finish_reason: str | None = None

    @property
    def shown(self) -> ReplyText:
        """Everything so far."""
        return ReplyText(
            "".join(self._text),
            "".join(self._reasoning),
            self._num_reasoning_tokens,
            tuple(self._tool_calls),
            tokens=tuple(self._tokens),
            num_tokens_before_answer=self._num_tokens if self._answer_begins is None else self._answer_begins,
            thinking_cut=self._thinking_cut,
        )

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls so far, in OpenAI's form; their arguments are JSON text."""
        return json.loads(json.dumps(self._tool_calls))  # type: ignore[no-any-return]

    def read(self, deltas: Iterable[CompletionDelta]) -> None:
        """Take news."""
        for delta in deltas:
            if delta.index or self.finish_reason is not None:
                continue
            self._thinking_cut = delta.thinking_cut or self._thinking_cut
            self._tokens += map(self._scored, delta.logprobs or ())
            if delta.finish_reason is not None and self._characters is not None and self._tokens:
                self._tokens[-1] = replace(self._tokens[-1], text=self._tokens[-1].text + self._characters.rest())
            self._num_tokens += len(delta.token_ids)
            if isinstance(delta, RemoteDelta) and delta.parsed is not None:
                self._add(delta.parsed, len(delta.token_ids))
                # A call that the server was told to make ends with "stop" in vLLM.
                called = delta.finish_reason == "stop" and self._tool_calls
                self.finish_reason = "tool_calls" if called else delta.finish_reason
                continue
            if self._parser is None:
                self._answer_begins = 0
                self._text.append(delta.text)
                self.finish_reason = delta.finish_reason
                continue
            self._add(self._parser.feed(delta.text), len(delta.token_ids))
            if delta.finish_reason is not None:
                self._add(self._parser.finish(delta.finish_reason), 0)
                self.finish_reason = self._parser.finish_reason

    def _scored(self, position: LogprobsAtPosition) -> ScoredToken:
        """A token from its place's log-probabilities, of which the chosen token's come first."""
        token_id, chosen = next(iter(position.items()))
        text = None if self._characters is None else self._characters.step(token_id)
        return scored_token(chosen, position.values(), text)

    def _add(self, parsed: "ParsedDelta", num_tokens: int) -> None:
        self._num_open_tokens += num_tokens
        if parsed.reasoning:
            self._num_reasoning_tokens += self._num_open_tokens
        elif self._answer_begins is None and (parsed.content or parsed.tool_calls):
            self._answer_begins = self._num_tokens - self._num_open_tokens
        if parsed.reasoning or parsed.content or parsed.tool_calls:
            self._num_open_tokens = 0
        self._text.append(parsed.content)
        self._reasoning.append(parsed.reasoning)
        for piece in parsed.tool_calls:
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                self._tool_calls.append({"id": piece.id, "type": "function", "function": function})
            self._tool_calls[piece.index]["function"]["arguments"] += piece.arguments


@dataclass(slots=True)
class RemoteDelta(CompletionDelta):
    """News that the server has parsed already. ``parsed`` is None for plain completions."""

    parsed: "ParsedDelta | None" = None
