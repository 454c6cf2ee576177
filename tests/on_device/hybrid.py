"""What a checkpoint of a hybrid model's states costs, and what a hit saves."""

import time
from typing import Any

import mlx.core as mx
import numpy as np

from engine.core.state_group import StateGroup
from tests.engine.parity.bare_engine import BareEngine
from tests.engine.parity.tiny_architectures import build

HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5", "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 3072,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 32000,
        "max_position_embeddings": 16384, "tie_word_embeddings": True, "full_attention_interval": 4,
        "linear_num_value_heads": 16, "linear_num_key_heads": 8, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rope_parameters": {
            "rope_type": "default", "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10]}},
}  # fmt: skip


def hybrid() -> dict[str, Any]:
    """Seconds to the first token of 512 + 32 tokens: cold with the prefix cache off and on, and behind a hit."""
    model = build(HYBRID, limit=1 << 30)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    engine = BareEngine(model)
    times: dict[str, list[float]] = {"cold, cache off": [], "cold, cache on": [], "hit": []}
    rng = np.random.default_rng(0)
    for turn in range(13):
        shared, question = (rng.integers(10, 32000, size).tolist() for size in (512, 32))
        _start(engine, caching=False)
        cold = _timed(engine, [*shared, *question])
        _start(engine, caching=True)
        on = _timed(engine, [*shared, *question])
        _start(engine, caching=True)
        engine.generate([shared], 1)
        hit = _timed(engine, [*shared, *question])
        if turn:
            for name, seconds in zip(times, (cold, on, hit), strict=True):
                times[name].append(round(seconds, 4))
    engine.backend.close()
    middle, best = ({name: float(of(values)) for name, values in times.items()} for of in (np.median, np.min))
    ratios = {
        "on/off": middle["cold, cache on"] / middle["cold, cache off"],
        "on/off, best": best["cold, cache on"] / best["cold, cache off"],
        "sooner": middle["cold, cache on"] / middle["hit"],
    }
    return {"samples": times, **{name: round(value, 3) for name, value in ratios.items()}}


def _start(engine: BareEngine, *, caching: bool) -> None:
    engine.start(num_blocks=700, chunk=2048, caching=caching, num_seqs=4)
    for group in engine.scheduler.kv.groups:
        if isinstance(group, StateGroup):
            group.min_tokens = 64


def _timed(engine: BareEngine, prompt: list[int]) -> float:
    begin = time.perf_counter()
    engine.generate([prompt], 1)
    return time.perf_counter() - begin
