"""``python -m tests.on_device``: parity, pools and prefix cache on this machine's GPU, which CI has not.

Needs mlx, mlx-lm and numpy alone. On a GPU rounding differs with the shape of a product, so a greedy token may
differ where the top logits tie; every difference is checked against mlx-lm's own logits there.
"""

import gc
import json
import sys
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from engine.core.state_group import StateGroup
from engine.errors import ConfigError
from engine.params.sampling_params import SamplingParams
from engine.runner.device.devices import describe_device
from engine.runner.kv.kv_spec import group_spec
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import CONFIGS, VOCAB, build, tiny_model

NUM_TOKENS = 8
TIE = 0.05
"""Of the logits' spread. Rounding alone stays well below it; where it turns a router of experts, 0.024 was the most
seen. A wrong mask or position gives more than 1."""
GREEDY = SamplingParams(temperature=0)
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


def parity(kv_cache_dtype: str = "auto") -> dict[str, str]:
    """Per architecture: prompts of equal tokens, of ties, and wrong ones, batched, from the cache and in chunks."""
    found = {}
    for name in CONFIGS:
        model = tiny_model(name)
        prompts = mixed_prompts(7, VOCAB, 90, seed=1)
        expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
        engine = BareEngine(model)
        kinds: Counter[str] = Counter()
        for chunk in (512, 512, 16):
            if chunk == 16:
                engine.start(chunk=16)
            for prompt, theirs, request in zip(prompts, expected, engine.generate(prompts, NUM_TOKENS), strict=True):
                kinds[_compare(model, prompt, theirs, request.output_token_ids)] += 1
        backend = engine.backend
        how = backend.calls if isinstance(backend, PagedBackend) else f"contiguous: {engine.note}"
        found[name] = f"{how} {dict(kinds)}"
        engine.backend.close()
    return found


def _compare(model: Any, prompt: list[int], theirs: list[int], ours: list[int]) -> str:
    if ours == theirs:
        return "equal"
    at = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    logits = np.array(model(mx.array([[*prompt, *theirs[:at]]]))[0, -1].astype(mx.float32))
    gap = float(logits[theirs[at]] - logits[ours[at]]) / float(logits.std())
    return "tie" if gap < TIE else f"WRONG ({gap:.3f} of the spread)"


def pools() -> dict[str, dict[str, float]]:
    """Largest relative difference of a pool from the plan, over all architectures, by page type.

    What its arrays say, and what the device's memory in use grew by; of some size, since a device rounds up.
    """
    num_blocks = 4096 if describe_device().kind == "cpu" else 1 << 16
    worst = {dtype: {"arrays": 0.0, "memory": 0.0} for dtype in ("auto", "bfloat16", "int8", "int4")}
    for name in CONFIGS:
        model = tiny_model(name)
        for dtype, found in worst.items():
            try:
                engine = BareEngine(model, kv_cache_dtype=dtype)
            except ConfigError as error:  # vectors that cannot be quantized
                print(name, dtype, error, file=sys.stderr)
                continue
            if not isinstance(engine.backend, PagedBackend):
                continue
            for leaves, pool in zip(engine.backend.groups, engine.backend.pools, strict=True):
                spec = group_spec(leaves, engine.backend.block_size, 512, dtype)
                planned = num_blocks * spec.bytes_per_block
                pool.release()
                before = _memory_in_use()
                pool.grow(num_blocks)
                sizes = {"arrays": pool.nbytes, "memory": _memory_in_use() - before}
                for kind, size in sizes.items():
                    found[kind] = max(found[kind], abs(size / planned - 1))
                pool.release()
            engine.backend.close()
    return worst


def _memory_in_use() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


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


def main() -> int:
    """Print one JSON object; fails where a token is wrong or a pool is off the plan by 1%."""
    only = set(sys.argv[1:]) or {"parity", "pools", "hybrid"}
    report: dict[str, Any] = {"device": describe_device().name, "mlx": version("mlx")}
    for check in (parity, pools, hybrid):
        if check.__name__ in only:
            report[check.__name__] = check()
            print(json.dumps({check.__name__: report[check.__name__]}, indent=1), flush=True)
    wrong = any("WRONG" in line for line in report.get("parity", {}).values())
    off = any(difference > 0.01 for found in report.get("pools", {}).values() for difference in found.values())
    return int(wrong or off)


if __name__ == "__main__":
    sys.exit(main())
