"""What a step needs besides weights and pages, predicted from a few small steps."""

import pytest

from engine.params.kv_dtype import KV_CACHE_DTYPES
from engine.runner import warm_up
from engine.runner.kv.kv_spec import probe_caches
from engine.runner.paged_backend import PagedBackend
from tests.tiny_models import build_model, tiny_config

VOCAB = 1000
SHAPE = {"head_dim": 64, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
def test_a_larger_step_needs_about_what_small_ones_predict(dtype):
    """Also where pages are unpacked to be read, which costs by the position, however few the rows."""
    model = build_model(tiny_config("llama", vocab_size=VOCAB, intermediate_size=512, **SHAPE))
    backend = PagedBackend(model, probe_caches(model), 16, calls="flat", kv_cache_dtype=dtype, max_views=16)
    try:
        cost = warm_up.measure_step_cost(backend, VOCAB)
        for rows, context in ((128, 1024), (32, 2048)):
            needed = warm_up._peak(backend, rows, context, VOCAB)
            assert 0.75 * needed < cost.bytes(rows, context) < 1.5 * needed
    finally:
        backend.close()
