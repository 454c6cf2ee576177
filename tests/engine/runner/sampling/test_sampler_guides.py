"""Bitmasks and forced tokens in the sampler, on the device."""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingRow
from tests.engine.core.stand_ins import FreeGuide

GREEDY = SamplingParams(temperature=0)


class FixedGuide(FreeGuide):
    """Allows some tokens, or forces one."""

    def __init__(self, allowed: Iterable[int] | None = None, forced: int | None = None) -> None:
        super().__init__(waits=True, forced=forced)
        self.allowed = None if allowed is None else list(allowed)

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        if self.allowed is None:
            return False
        assert not words.any(), "every row begins with nothing allowed"
        for token in self.allowed:
            words[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
        return True


def token_ids(logits: NDArray[np.float32], rows: list[SamplingRow]) -> list[int]:
    metadata = SamplingMetadata.build(rows, logits.shape[-1])
    return [int(token) for token in np.array(Sampler().sample(mx.array(logits), metadata).token_ids)]


@pytest.mark.parametrize("vocab_size", [5, 32, 33, 100, 1025])
def test_only_allowed_tokens_are_taken_and_other_rows_are_untouched(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=(7, vocab_size)).astype(np.float32)
    free = [SamplingRow(GREEDY if i % 2 else SamplingParams(seed=i), seed=i, position=3) for i in range(7)]
    expected = token_ids(logits, free)
    allowed = {i: rng.choice(vocab_size, size=3, replace=False).tolist() for i in (1, 2, 6)}
    rows = [SamplingRow(row.params, seed=i, position=3, guide=FixedGuide(allowed.get(i))) for i, row in enumerate(free)]
    found = token_ids(logits, rows)
    for i in range(7):
        if i not in allowed:
            assert found[i] == expected[i]
        elif rows[i].params.greedy:
            assert found[i] == max(allowed[i], key=lambda token: logits[i, token])
        else:
            assert found[i] in allowed[i]


def test_the_last_bit_of_a_word_is_a_token_like_others() -> None:
    logits = np.zeros((1, 64), np.float32)
    for token in (0, 31, 32, 63):
        assert token_ids(logits, [SamplingRow(GREEDY, guide=FixedGuide([token]))]) == [token]


def test_a_forced_token_comes_whatever_else_is_asked_for() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    logits[1] = np.nan
    barred = SamplingParams(temperature=0, logit_bias={7: -100.0}, allowed_token_ids=[3, 4], logprobs=2)
    rows = [
        SamplingRow(barred, guide=FixedGuide(forced=7), bad_words_ids=[[7]]),
        SamplingRow(GREEDY, guide=FixedGuide(forced=49)),
        SamplingRow(GREEDY),
    ]
    assert token_ids(logits, rows) == [7, 49, int(logits[2].argmax())]


def test_the_first_token_of_the_vocabulary_can_be_forced_too() -> None:
    logits = np.zeros((2, 50), np.float32)
    logits[:, 9] = 1.0
    rows = [SamplingRow(GREEDY, guide=FixedGuide(forced=0)), SamplingRow(GREEDY)]
    assert token_ids(logits, rows) == [0, 9]


def test_a_mask_that_allows_nothing_gives_no_token() -> None:
    logits = np.zeros((2, 40), np.float32)
    rows = [SamplingRow(params, guide=FixedGuide([])) for params in (GREEDY, SamplingParams(seed=1))]
    assert token_ids(logits, rows) == [-1, -1]
