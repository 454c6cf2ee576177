"""Decoding over quantized KV pages, beside the model's own element type on the same weights."""

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from engine.llm import LLM
from engine.params.kv_dtype import QUANTIZED_BITS
from engine.params.sampling_params import SamplingParams
from tests.benchmarks.harness import Case

NUM_TOKENS = 32
CONTEXTS = (64, 1024)


def kv_dtype_cases(model: str) -> Iterator[Case]:
    """One stream at two context lengths, each quantized type against ``auto``; engines load when first measured."""
    engines: dict[str, LLM] = {}

    def decode(dtype: str, context: int) -> float:
        if dtype not in engines:
            engines[dtype] = LLM(model, kv_cache_dtype=dtype, gpu_memory_utilization=0.3)
        prompt = np.random.default_rng(0).integers(100, 40000, context).tolist()
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        times = [time.perf_counter() for _ in engines[dtype].stream(prompt, params)]
        return (len(times) - 1) / (times[-1] - times[0])

    for context in CONTEXTS:
        for dtype in QUANTIZED_BITS:
            yield Case(
                f"decode, one stream, context {context}, KV pages {dtype}",
                "tokens/s",
                "higher",
                {name: partial(decode, name, context) for name in (dtype, "auto")},
                {"model": model, "context": context, "num_tokens": NUM_TOKENS},
            )
    for llm in engines.values():
        llm.close()
