"""Every cache kind pages, and greedy tokens equal mlx-lm's: tiny random models of the architectures named."""

import numpy as np
import pytest

from engine.runner.kv import paged_cache
from engine.runner.kv.attention_metadata import MAX_VIEWS
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import CONFIGS, VOCAB, tiny_model

NUM_TOKENS = 5


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_mlx_lms(name):
    """Batched past the window, from the prefix cache, in chunks, after preemption, and twice from one prompt."""
    model = tiny_model(name)
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine = BareEngine(model)
    assert isinstance(engine.backend, PagedBackend), engine.note
    try:
        assert tokens(engine.generate(prompts, NUM_TOKENS)) == expected
        again = engine.generate(prompts, NUM_TOKENS)
        assert tokens(again) == expected
        assert sum(request.num_cached_tokens for request in again) > 0
        assert tokens(engine.start(chunk=16).generate(prompts, NUM_TOKENS)) == expected
        engine.start(num_blocks=_too_few_blocks(prompts), num_seqs=5, chunk=64)
        assert tokens(engine.generate(prompts, NUM_TOKENS)) == expected
        assert engine.scheduler.num_preemptions > 0 or name == "mamba2"
        twice = [row for row in expected[:3] for _ in range(2)]
        assert tokens(engine.start().generate(prompts[:3], NUM_TOKENS, n=2)) == twice
    finally:
        engine.backend.close()


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5", "llama"])
def test_requests_alone_and_in_gathered_batches(name):
    model = tiny_model(name)
    prompts = mixed_prompts(4, VOCAB, 90, seed=2)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    for max_views in MAX_VIEWS.values():
        engine = BareEngine(model, max_views=max_views)
        assert [tokens(engine.start().generate([prompt], NUM_TOKENS))[0] for prompt in prompts] == expected
        assert tokens(engine.start().generate(prompts, NUM_TOKENS)) == expected
        engine.backend.close()


def test_kinds_of_memory_are_found_out_from_the_model():
    kinds = {name: {leaves[0].spec.kind for leaves in BareEngine(tiny_model(name)).backend.groups}
             for name in ("llama", "gemma3_text", "qwen3_5", "mamba2", "gemma4_text", "gemma3n", "llama4")}  # fmt: skip
    assert kinds == {
        "llama": {"full"},
        "gemma3_text": {"full", "sliding"},
        "qwen3_5": {"full", "state"},
        "mamba2": {"state"},
        "gemma4_text": {"full", "sliding"},
        "gemma3n": {"full", "sliding"},
        "llama4": {"full", "sliding"},  # attention in chunks needs no more than a window of a chunk's size
    }


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n"])
def test_layers_that_read_others_keys_take_one_call_a_step(name):
    engine = BareEngine(tiny_model(name))
    assert engine.backend.calls == "flat"
    engine.generate(mixed_prompts(2, VOCAB, 30), 2)
    assert not paged_cache._lent
    engine.backend.close()


def test_a_partial_prefix_behind_a_window_is_reused():
    """The second prompt leaves the first after 64 tokens: only the window before that must still be there."""
    model = tiny_model("gemma3_text")
    first = long_prompt()
    engine = BareEngine(model).start(num_blocks=200)
    engine.generate([first[:100]], 2)
    second = [*first[:64], *first[:30]]
    request = engine.generate([second], NUM_TOKENS)[0]
    assert request.num_cached_tokens == 64
    assert request.output_token_ids == greedy(model, second, NUM_TOKENS)
    engine.backend.close()


def test_a_long_prompt_holds_no_more_than_its_window():
    model = tiny_model("gemma3_text")
    engine = BareEngine(model).start(num_blocks=60, chunk=16)
    request_blocks = []
    schedule = engine.scheduler.schedule

    def watched():
        output = schedule()
        request_blocks.append(engine.scheduler.kv.groups[1].pool.num_held_blocks)
        return output

    engine.scheduler.schedule = watched
    prompt = long_prompt()
    assert tokens(engine.generate([prompt], 5)) == [greedy(model, prompt, 5)]
    assert max(request_blocks) <= (24 + 16) // 8 + 1
    engine.backend.close()


def _too_few_blocks(prompts: list[list[int]]) -> int:
    """Blocks that hold all prompts, and no more: the first to need another preempts."""
    return sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts)


def long_prompt() -> list[int]:
    return np.random.default_rng(3).integers(10, VOCAB, 300).tolist()


def tokens(requests) -> list[list[int]]:
    return [request.output_token_ids for request in requests]
