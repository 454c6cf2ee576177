"""From a tokenized prompt to a request that the engine takes: checked, seeded, with its limits known."""

import itertools
import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Self, Unpack

from engine.core.request import NewRequest, Standing, check_length
from engine.errors import RequestError
from engine.models.model_config import ModelConfig
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import MODEL_SOURCES
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints
from engine.runner.sampling.sampling_metadata import check_token_ids
from engine.text.guide.structured_output_manager import StructuredOutputManager
from engine.text.parse.parser_choice import MakeParser, ParserChoice
from engine.text.tokens.tokenizer import Tokenizer


class RequestMaker:
    """Makes requests for one model. Runs in the caller's thread; thread-safe.

    ``seed`` (``--seed``): requests without one of their own then take numbers that follow from it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        structured_outputs: StructuredOutputManager,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        seed: int | None,
    ) -> None:
        self.structured_outputs = structured_outputs
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._base_seed = seed
        self._numbers = itertools.count()

    @classmethod
    def of_model(
        cls, args: EngineArgs, config: ModelConfig, tokenizer: Tokenizer, parsers: ParserChoice, vocab_size: int
    ) -> Self:
        """For a loaded model whose logits are ``vocab_size`` wide."""
        eos_token_ids = config.eos_token_ids | tokenizer.eos_token_ids
        structured_outputs = StructuredOutputManager(
            tokenizer,
            vocab_size,
            eos_token_ids,
            reasoning_parser=parsers.reasoning_parser,
            tool_call_parser=parsers.tool_call_parser,
            reasoning_config=args.reasoning_config,
        )
        return cls(tokenizer, structured_outputs, vocab_size=vocab_size, eos_token_ids=eos_token_ids, seed=args.seed)

    def make(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        constraints: Constraints | None = None,
        make_parser: MakeParser | None = None,
        scored_from: int = 1,
        **standing: Unpack[Standing],
    ) -> NewRequest:
        """The request; raises ContextLengthError or another RequestError for what can never be served."""
        if not isinstance(request_id, str):
            raise RequestError(f"request_id must be a text, got {request_id!r:.60}", param="request_id")
        if not token_ids:
            raise RequestError("The prompt is empty: give at least one token.", param="prompt")
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"Token id {wrong} is out of vocabulary ({self.vocab_size}).", param="prompt")
        check_token_ids(params, self.vocab_size)
        params = _within(params, max_model_len - len(token_ids))
        check_length(len(token_ids), params.max_tokens, max_model_len)
        bad_words = self._bad_words(params)
        self._check_allowed(params, bad_words)
        return NewRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=params.max_tokens or max_model_len - len(token_ids),
            eos_token_ids=self.eos_token_ids,
            seed=self._seed(params),
            bad_words_token_ids=bad_words,
            make_guide=self.structured_outputs.prepare(constraints, token_ids, params, make_parser),
            scored_from=scored_from,
            **standing,
        )

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self._base_seed is not None:
            return self._base_seed * 1_000_003 + next(self._numbers)
        return secrets.randbits(63)

    def _check_allowed(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> None:
        """Refuse ``allowed_token_ids`` of which the first token can be none (RequestError)."""
        if params.allowed_token_ids is None:
            return
        forbidding = {
            "bad_words": {word[0] for word in bad_words if len(word) == 1},
            "logit_bias": {token for token, bias in params.logit_bias.items() if bias == -math.inf},
            "min_tokens": {*self.eos_token_ids, *params.stop_token_ids} if params.min_tokens else set(),
        }
        allowed = set(params.allowed_token_ids)
        if allowed <= set().union(*forbidding.values()):
            why = " and ".join(name for name, tokens in forbidding.items() if allowed & tokens)
            raise RequestError(
                f"allowed_token_ids: no token is left, {why} forbid all of {sorted(allowed)[:8]}.",
                param="allowed_token_ids",
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the start of a text and behind a space, as in vLLM."""
        found: list[tuple[int, ...]] = []
        for word in params.bad_words:
            plain = tuple(self._tokenizer.encode(word.lstrip(), False))
            spaced = tuple(self._tokenizer.encode(" " + word.lstrip(), False))
            found.append(plain)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return tuple(found)


def _within(params: SamplingParams, room: int) -> SamplingParams:
    """``params`` whose ``max_tokens``, where the model recommends it and nobody asked for it, is at most ``room``."""
    if params.max_tokens is None or params.sources.get("max_tokens") not in MODEL_SOURCES:
        return params
    return replace(params, max_tokens=max(min(params.max_tokens, room), 1))
