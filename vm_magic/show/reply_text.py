"""One reply while it is being written: thought, answer and tool calls apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.batch.scored_token import ScoredToken, scored_token
from engine.chat.reply import ReplyBuilder
from engine.outputs import THINKING_CUTS, CompletionDelta, LogprobsAtPosition, Reply
from engine.text.tokens.token_texts import TokenTexts
from vm_magic.show.tool_cards import ToolOutcome, call_line

if TYPE_CHECKING:
    from engine.text.parse.output_parser import OutputParser
    from engine.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReplyText:
    """What there is to show of a reply.

    ``num_reasoning_tokens`` counts the tokens of the thought, ``thinking_cut`` says why the engine ended it,
    if it did. ``layout`` is the order of the answer: pieces of text, and numbers of ``tool_calls``; empty for the text
    and then the calls. ``outcomes`` are those of the first ``tool_calls``. ``tokens`` are there where
    log-probabilities were asked for; the answer begins behind the first ``num_tokens_before_answer``. ``earlier`` are
    the model's turns before this one in the same cell.
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
    layout: tuple[str | int, ...] = ()

    def thought_size(self) -> str:
        """The thought's length, and how it ended if the model did not end it: ``134 tokens, ended by hand``."""
        size = f"{self.num_reasoning_tokens} tokens"
        return f"{size}, {THINKING_CUTS[self.thinking_cut]}" if self.thinking_cut else size

    def calls(self) -> list[tuple[Mapping[str, Any], ToolOutcome | None]]:
        """Each tool call with its outcome, None while there is none."""
        missing = [None] * (len(self.tool_calls) - len(self.outcomes))
        return list(zip(self.tool_calls, [*self.outcomes, *missing], strict=True))

    def pieces(self) -> list[str | tuple[Mapping[str, Any], ToolOutcome | None]]:
        """Text and calls (with their outcomes) in the order in which the model wrote them."""
        calls = self.calls()
        layout = self.layout or (*([self.text] if self.text else []), *range(len(calls)))
        return [calls[piece] if isinstance(piece, int) else piece for piece in layout]

    def whole(self) -> str:
        """The answer, with tool calls as ``name(argument=1) → result``, each on a line; earlier turns first."""
        own = [piece if isinstance(piece, str) else call_line(*piece) for piece in self.pieces()]
        return "\n".join(part for part in [*(turn.whole() for turn in self.earlier), *own] if part)


class ReplyReader:
    """Feeds deltas of the first completion to a :class:`ReplyBuilder`, and their tokens' probabilities to a picture.

    With a ``tokenizer``, tokens that share a character are read together.
    """

    def __init__(self, parser: "OutputParser | None" = None, tokenizer: "Tokenizer | None" = None) -> None:
        self._builder = ReplyBuilder(parser)
        self._token_texts = (
            None if tokenizer is None else TokenTexts(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
        )
        self._tokens: list[ScoredToken] = []

    @property
    def finish_reason(self) -> str | None:
        """Why the reply ended; None while it has not."""
        return self._builder.finish_reason

    @property
    def reply(self) -> Reply:
        """Everything so far, without what only the request knows."""
        return self._builder.reply()

    @property
    def shown(self) -> ReplyText:
        """Everything so far, to be shown."""
        builder, before = self._builder, self._builder.num_tokens_before_answer
        return ReplyText(
            builder.content,
            builder.reasoning,
            builder.num_reasoning_tokens,
            tuple(builder.tool_calls),
            tokens=tuple(self._tokens),
            num_tokens_before_answer=len(builder.token_ids) if before is None else before,
            thinking_cut=builder.thinking_cut,
            layout=tuple(what for kind, what in builder.parts if kind != "reasoning"),
        )

    def read(self, deltas: Iterable[CompletionDelta]) -> None:
        """Take news."""
        for delta in deltas:
            if delta.index or self.finish_reason is not None:
                continue
            self._tokens += map(self._scored, delta.logprobs or ())
            if delta.finish_reason is not None and self._token_texts is not None and self._tokens:
                self._tokens[-1] = replace(self._tokens[-1], text=self._tokens[-1].text + self._token_texts.rest())
            self._builder.add(delta)

    def _scored(self, position: LogprobsAtPosition) -> ScoredToken:
        """A token from its place's log-probabilities, of which the chosen token's come first."""
        token_id, chosen = next(iter(position.items()))
        text = None if self._token_texts is None else self._token_texts.step(token_id)
        return scored_token(chosen, position.values(), text)
