"""How likely a model finds a text: ``LLM.score`` and ``%%vllm_metal score``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.batch.scored_token import ScoredToken, scored_token, unlikely_text
from engine.errors import RequestError
from engine.outputs import RequestOutput
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from engine.text.tokens.token_texts import token_texts

_LARGE = 1e7
"""A perplexity from here on is a power of ten: nobody counts its digits."""


@dataclass(frozen=True)
class Score:
    """A text's tokens and their natural log-probabilities, each given what stands before it.

    ``logprobs[i]`` belongs to ``tokens[i]``; the first is None, since nothing stands before it. A character that
    several tokens make up is the last one's.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    logprobs: tuple[float | None, ...]
    scored: tuple[ScoredToken, ...] = field(repr=False)

    @classmethod
    def of(cls, text: str, output: RequestOutput, decode: Callable[[Sequence[int]], str]) -> "Score":
        """From a request that asked for ``prompt_logprobs``; ``decode`` keeps special tokens."""
        assert output.prompt_logprobs is not None, "scored without prompt_logprobs"
        token_ids = output.prompt_token_ids
        scored = tuple(
            ScoredToken(text, None) if position is None else scored_token(position[token_id], position.values(), text)
            for token_id, text, position in zip(
                token_ids, token_texts(token_ids, decode), output.prompt_logprobs, strict=True
            )
        )
        logprobs = tuple(token.logprob for token in scored)
        return cls(text, tuple(token_ids), tuple(token.text for token in scored), logprobs, scored)

    @property
    def total(self) -> float:
        """The sum of the log-probabilities."""
        return math.fsum(one for one in self.logprobs if one is not None)

    @property
    def num_scored(self) -> int:
        """Tokens that have something before them."""
        return sum(one is not None for one in self.logprobs)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability: 1 for a text that the model was sure of."""
        return math.exp(-self.total / self.num_scored)

    @property
    def headline(self) -> str:
        """The figures in one line."""
        bits = -self.total / self.num_scored / math.log(2)
        value = f"{self.perplexity:,.3f}" if self.perplexity < _LARGE else f"{self.perplexity:.2e}"
        tokens = f"{self.num_scored:,} token{'s' * (self.num_scored != 1)}"
        return f"perplexity {value} · {tokens} scored · {bits:.3f} bits a token"

    def __repr__(self) -> str:
        return "\n".join(filter(None, [self.headline, unlikely_text(self.scored)]))


class ScoringTokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids."""
        ...

    def check_text(self, text: str, max_tokens: int | None, limit: int) -> None:
        """Refuse a text that is far too long."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


def score_text(
    submit: Callable[[Sequence[int], SamplingParams], RequestStream],
    tokenizer: ScoringTokenizer,
    text: str,
    num_alternatives: int,
    max_model_len: int,
) -> Score:
    """Run ``text`` through the model once and score it. Interruptible. Raises RequestError."""
    if not isinstance(text, str):
        raise RequestError(f"score takes a text, not {text!r:.60}", param="text")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=num_alternatives)
    if params.prompt_logprobs is None:
        raise RequestError("num_alternatives must be a whole number, got None.", param="num_alternatives")
    tokenizer.check_text(text, 1, max_model_len)
    token_ids = tokenizer.encode(text)
    if len(token_ids) < 2:
        raise RequestError("score needs a text of at least two tokens: the first has nothing before it", param="text")
    stream = submit(token_ids, params)
    try:
        output = stream.result()
    finally:
        stream.abort()
    return Score.of(text, output, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
