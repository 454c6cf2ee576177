"""Quantized pages: greedy tokens are mlx-lm's over caches that hold the same rounded values, however work is cut."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.params.kv_dtype import QUANTIZED_BITS
from engine.params.sampling_params import SamplingParams
from engine.runner.kv.input_batch import InputBatch
from engine.runner.kv.kv_pages import rounded
from engine.runner.paged_backend import PagedBackend
from engine.runner.warm_up import paging_difference
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import CONFIGS, VOCAB
from tests.tiny_models import build_model, tiny_config

NUM_TOKENS = 5
MARGIN = 0.05
"""Of the logits' spread. An element at the edge of a rounding step may fall to either side where the arithmetic is cut
otherwise, which moves logits by up to a hundredth of their spread: only prompts whose tokens are clear are compared."""
CASES = {
    ("llama", "int8"): "flat",
    ("llama", "int4"): "flat",
    ("gemma3_text", "int8"): "flat",  # pages behind a window
    ("gpt_oss", "int4"): "flat",  # windows and sinks
    ("gemma4_text", "int8"): "flat",  # layers that read others' keys
    ("deepseek_v3", "int4"): "rectangles",  # latent attention: keys of 64 elements, values of 32
    ("qwen3_5", "int8"): "rectangles",  # states beside pages
    ("qwen3", "bfloat16"): "flat",
    ("gemma3_text", "float16"): "flat",
}
PACKABLE = {
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64},
    "deepseek_v3": {"kv_lora_rank": 64, "qk_rope_head_dim": 32},
    "qwen3_5": {},
}


def packable_model(name):
    """A tiny model whose heads have 32 elements or more, which its usual 16 are too few for."""
    config = {**tiny_config(name), **CONFIGS[name], "vocab_size": VOCAB, **PACKABLE.get(name, {"head_dim": 32})}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "head_dim": 32}
    return build_model(config)


def greedy(model, prompt, caches):
    """mlx-lm's tokens, and the least lead of one over the next best, in spreads of the logits."""
    steps = [(int(token), np.array(logits)) for token, logits in
             generate_step(mx.array(prompt), model, max_tokens=NUM_TOKENS, prompt_cache=caches)]  # fmt: skip
    leads = [np.diff(np.sort(logits)[-2:])[0] / logits.std() for _, logits in steps]
    return [token for token, _ in steps], float(min(leads))


def clear_prompts(model, make_caches, count):
    """``count`` prompts of mixed lengths whose greedy tokens have a clear lead, with those tokens."""
    found = []
    for prompt in mixed_prompts(40, VOCAB, 70, seed=1):
        tokens, lead = greedy(model, prompt, make_caches())
        if lead > MARGIN:
            found.append((prompt, tokens))
        if len(found) == count:
            return [prompt for prompt, _ in found], [tokens for _, tokens in found]
    raise AssertionError("too few prompts are clear: another seed of weights")


def tokens_of(requests):
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_greedy_tokens_are_those_over_rounded_contiguous_caches(name, dtype):
    """Batched past the window, from the prefix cache, in chunks, after preemption, twice from one prompt, and alone."""
    model = packable_model(name)
    prompts, expected = clear_prompts(model, lambda: rounded(make_prompt_cache(model), dtype), 5)
    engine = BareEngine(model, kv_cache_dtype=dtype)
    assert isinstance(engine.backend, PagedBackend), engine.note
    try:
        assert engine.backend.calls == CASES[name, dtype]
        assert paging_difference(engine.backend, model, VOCAB) < MARGIN / 2
        assert tokens_of(engine.start().generate(prompts, NUM_TOKENS)) == expected
        again = engine.generate(prompts, NUM_TOKENS)
        assert tokens_of(again) == expected
        assert sum(request.num_cached_tokens for request in again) > 0
        assert tokens_of(engine.start(chunk=16).generate(prompts, NUM_TOKENS)) == expected
        engine.start(num_blocks=sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts))  # none is left to grow into
        assert tokens_of(engine.generate(prompts, NUM_TOKENS)) == expected
        assert engine.scheduler.num_preemptions > 0
        assert tokens_of(engine.start().generate(prompts, NUM_TOKENS, n=2)) == [row for row in expected for _ in (1, 2)]
        assert tokens_of(engine.start().generate(prompts[:1], NUM_TOKENS)) == expected[:1]
    finally:
        engine.backend.close()


@pytest.mark.parametrize("dtype", QUANTIZED_BITS)
@pytest.mark.parametrize(("name", "head_dim"), [("llama", 32), ("qwen3", 64)])
def test_greedy_tokens_are_mlx_lms_over_its_own_quantized_cache(name, head_dim, dtype):
    """Given from the start: with ``kv_bits`` alone mlx-lm quantizes a prompt only after having attended to it."""
    model = build_model(tiny_config(name, vocab_size=VOCAB, head_dim=head_dim))
    bits = QUANTIZED_BITS[dtype]
    prompts, expected = clear_prompts(model, lambda: [QuantizedKVCache(head_dim, bits) for _ in model.layers], 6)
    engine = BareEngine(model, kv_cache_dtype=dtype).start(chunk=48)
    assert tokens_of(engine.generate(prompts, NUM_TOKENS)) == expected
    engine.backend.close()


def test_a_step_that_is_taken_back_leaves_quantized_pages_as_they_were():
    engine = BareEngine(packable_model("llama"), kv_cache_dtype="int4")
    backend = engine.backend
    assert isinstance(backend, PagedBackend)

    def compute(first_token):
        request = Request("a", list(range(first_token, first_token + 20)), SamplingParams(temperature=0))
        scheduled = ScheduledRequest(request, 0, 20, ([0, 1, 2],), samples=True, pending=False)
        batch = InputBatch.build([scheduled])
        backend.make_room(batch, [64])
        return backend.forward(batch, mx.array(batch.token_ids), [np.array([19], dtype=np.int32)])

    def contents():
        return [np.array(array) for pages in backend.pools[0].pages for array in pages.arrays]

    mx.eval(compute(10), backend.barrier())
    backend.settle()
    before = contents()
    compute(70)
    assert backend.undo()
    assert all(np.array_equal(one, other) for one, other in zip(before, contents(), strict=True))
    mx.eval(compute(70), backend.barrier())
    assert not any(np.array_equal(one, other) for one, other in zip(before, contents(), strict=True))
    backend.close()
