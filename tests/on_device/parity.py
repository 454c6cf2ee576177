"""Every architecture against mlx-lm's own generation, with tiny random models in float32."""

from collections import Counter

import numpy as np

from engine.runner.device.devices import describe_device
from engine.runner.kernels import expert_rows
from engine.runner.kv.attention_path import describe
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import CONFIGS, VOCAB, tiny_model
from tests.on_device.ties import compare
from tests.on_device.wanted_kernels import wanted_kernels

NUM_TOKENS = 8
LONGEST = 90
LONGER = {"llama": 700, "gemma3_text": 700, "gemma4_text": 400, "qwen3_5": 400, "gpt_oss": 700, "deepseek_v3": 400}
"""Architectures of which prompts up to so many tokens are tried too: attention has other ways past 256 and 512."""


def parity(backend: str = "auto", only: str = "") -> dict[str, str]:
    """Per architecture: prompts of equal tokens, of ties, and wrong ones, batched, from the cache and in chunks.

    Each is printed when it is done. ``only``: those whose names have one of these words, which commas part.
    """
    found = {}
    for name in [name for name in CONFIGS if any(word in name for word in only.split(","))]:
        model = tiny_model(name)
        expert_rows.install(model, describe_device().kind)
        prompts = mixed_prompts(7, VOCAB, LONGEST, seed=1)
        rng = np.random.default_rng(2)
        lengths = (LONGER[name], 300) if name in LONGER else ()
        prompts += [rng.integers(10, VOCAB, length).tolist() for length in lengths]
        expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
        engine = BareEngine(model, kernels=wanted_kernels(backend))
        kinds: Counter[str] = Counter()
        for chunk in (512, 512, 16):
            if chunk == 16:
                engine.start(chunk=16)
            for prompt, theirs, request in zip(prompts, expected, engine.generate(prompts, NUM_TOKENS), strict=True):
                kinds[compare(model, prompt, theirs, request.output_token_ids)] += 1
        used = engine.backend
        how = used.calls if isinstance(used, PagedBackend) else f"contiguous: {engine.note}"
        found[name] = f"{how}, {describe(used.attention_paths)} {dict(kinds)}"
        print(f"parity {name}: {found[name]}", flush=True)
        engine.backend.close()
    return found
