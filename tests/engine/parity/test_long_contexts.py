"""Greedy tokens equal mlx-lm's past the 256 positions from where CUDA's attention has a path of its own."""

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kv.attention_metadata import MAX_VIEWS
from engine.runner.kv.kv_pool import KVPool
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.cuda_attention import cuda_attention
from tests.engine.parity.tiny_architectures import VOCAB, build, config_of

NUM_TOKENS = 4
WINDOW = 270
MODELS = {  # name -> how its steps are computed, and what of its configuration is changed
    "llama": ("flat", {}),
    "llama of one key head": ("flat", {"num_key_value_heads": 1}),
    "gemma3_text": ("flat", {"sliding_window": WINDOW}),
    "gemma4_text": ("flat", {"sliding_window": WINDOW}),
    "gpt_oss": ("flat", {"sliding_window": WINDOW}),
    "qwen3_5": ("rectangles", {}),
    "llama4": ("sequences", {}),
}


def model_of(name):
    calls, changes = MODELS[name]
    config = config_of(name.split()[0])
    if name == "llama4":
        config["text_config"] = {**config["text_config"], "attention_chunk_size": WINDOW}
    return calls, build({**config, **changes})


def pages_of(engine):
    pools = [pool for pool in engine.backend.pools if isinstance(pool, KVPool)]
    return lambda: [array for pool in pools for pages in pool.pages for array in pages.arrays]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_never_reads_a_slice_where_cuda_would_misread_it(name):
    """Behind others' blocks, in blocks handed back out of order, behind a hit, in chunks that leave one token."""
    calls, model = model_of(name)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(10, VOCAB, length).tolist() for length in (290, 385, 321)]
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine = BareEngine(model, max_views=MAX_VIEWS["cuda"])
    assert engine.backend.calls == calls
    try:
        with cuda_attention(pages_of(engine)) as attention:
            for chunk, num_blocks in ((512, 200), (16, 100)):
                engine.start(chunk=chunk, num_blocks=num_blocks)
                alone = [engine.generate([prompt], NUM_TOKENS)[0].output_token_ids for prompt in prompts]
                assert alone == expected
                assert engine.generate(prompts[1:], NUM_TOKENS)[0].output_token_ids == expected[1]
                assert engine.generate(prompts[:1], NUM_TOKENS)[0].output_token_ids == expected[0]
        assert attention.num_calls > 0
        assert attention.num_slices == 0
    finally:
        engine.backend.close()


def test_the_stand_in_reads_a_slice_from_the_beginning():
    """So that the test above can fail: with views, a sequence behind another's blocks gets other tokens."""
    _, model = model_of("llama")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(10, VOCAB, length).tolist() for length in (290, 385)]
    engine = BareEngine(model, max_views=MAX_VIEWS["cpu"])
    with cuda_attention(pages_of(engine)) as attention:
        found = [engine.generate([prompt], NUM_TOKENS)[0].output_token_ids for prompt in prompts]
    assert attention.num_slices > 0
    assert found[0] == greedy(model, prompts[0], NUM_TOKENS), "which begins at the first slot"
    assert found[1] != greedy(model, prompts[1], NUM_TOKENS)
    engine.backend.close()


def test_views_of_pages_and_of_gathered_blocks_are_seen_as_slices():
    whole = mx.random.normal((1, 2, 1024, 16))
    with cuda_attention(lambda: [whole]) as attention:
        attention(mx.ones((1, 4, 1, 16)), whole[:, :, 512:812], whole[:, :, 512:812], scale=1.0)
        assert attention.num_slices == 2
        gathered = mx.array(np.array(whole))[:, :, 3:303]
        with pytest.raises(AssertionError, match="not pages"):
            attention(mx.ones((1, 4, 1, 16)), gathered, gathered, scale=1.0)
