"""The oracle: mlx-lm's own greedy generation, one request at a time, on its own caches."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from numpy.typing import NDArray

from engine.llm import LLM
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.runner.load.loader import load_model
from engine.runtime.llm_engine import LLMEngine


@cache
def oracle_model(name: str) -> Any:
    return load_model(resolve(name), EngineArgs(model=name)).model


def oracle_tokens(name: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """``num_tokens`` greedy tokens after ``prompt``, end tokens ignored. The same question is asked once."""
    return list(_oracle_tokens(name, tuple(prompt), num_tokens))


@cache
def _oracle_tokens(name: str, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    steps = generate_step(mx.array(prompt), oracle_model(name), max_tokens=num_tokens)
    return tuple(token if isinstance(token, int) else int(token.item()) for token, _ in steps)


def oracle_logprobs(name: str, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Log-probabilities [T, V] after each token of a sequence."""
    logits = oracle_model(name)(mx.array([list(tokens)]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def mixed_prompts(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of lengths 1 to ``longest``, the short ones more often."""
    rng = np.random.default_rng(seed)
    lengths = 1 + (longest * rng.random(count) ** 2).astype(int)
    return [rng.integers(10, vocab_size, length).tolist() for length in lengths]


def shrink_pool(llm: LLM, num_blocks: int) -> None:
    """Give an idle engine a block pool of ``num_blocks``, so that requests must give way to each other."""
    from engine.core.block_pool import BlockPool
    from engine.core.cache_groups import FullAttentionGroup
    from engine.core.kv_cache_manager import KVCacheManager

    def swap(engine: LLMEngine) -> None:
        old = engine.scheduler.kv.groups[0]
        pool = BlockPool(num_blocks, enable_caching=old.pool.enable_caching)
        engine.scheduler.kv = KVCacheManager([FullAttentionGroup(pool, old.block_size)])
        engine.runner.max_blocks = (num_blocks,)

    llm._thread.call(swap)


def assert_nothing_is_held(llm: LLM) -> None:
    """Blocks free and cached are all there are, and nobody runs or waits."""
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks

    def check(engine: LLMEngine) -> None:
        for group in engine.scheduler.kv.groups:
            group.pool.check()

    llm._thread.call(check)
