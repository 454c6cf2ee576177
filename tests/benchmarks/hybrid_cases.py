"""Prefix cache of a model with recurrent layers: random weights in Qwen3.5's form, the cache on beside off."""

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.llm import LLM
from engine.models.resolve import resolve
from engine.params.sampling_params import SamplingParams
from tests.benchmarks.harness import Case, Measure
from tests.tiny_models import VOCAB_SIZE, write_model

SHARED = 800
QUESTION = 40
NUM_OUTPUTS = 200
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_text", "hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1024,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "full_attention_interval": 4,
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "rope_parameters": {
        "rope_type": "default", "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [4, 2, 2]},
}  # fmt: skip
TINY = {
    **TEXT_CONFIG,
    "hidden_size": 64,
    "intermediate_size": 128,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""For what is counted, not timed."""
_SALTS = itertools.count()


class _Setup:
    """The same weights in an engine with the prefix cache and in one without."""

    def __init__(self, folder: Path, text_config: dict[str, Any]) -> None:
        path = resolve("smollm2").path
        model = str(write_model(folder, "qwen3_5", path, text_config=text_config))
        options = {"max_model_len": 1024, "gpu_memory_utilization": 0.3, "max_num_seqs": 64}
        self.on = LLM(model, **options)
        self.off = LLM(model, enable_prefix_caching=False, **options)
        self.rng = np.random.default_rng(0)

    def tokens(self, count: int) -> list[int]:
        """``count`` random tokens, never the same twice."""
        tokens: list[int] = self.rng.integers(100, VOCAB_SIZE - 100, count).tolist()
        return tokens

    def close(self) -> None:
        """Give both engines' memory back."""
        self.on.close()
        self.off.close()


def hybrid_cases() -> Iterator[Case]:
    """The cases; the model is made when the first is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        setup = _Setup(Path(folder), TEXT_CONFIG)
        settings = {"model": "random weights, qwen3_5", **TEXT_CONFIG, "shared": SHARED, "question": QUESTION}
        yield Case(
            f"hybrid model, first token behind a shared prefix of {SHARED} tokens", "s", "lower",
            {"prefix hit": _hit(setup), "cold": _cold(setup, setup.on)}, settings, target=5.0,
        )  # fmt: skip
        yield Case(
            f"hybrid model, first token of {SHARED + QUESTION} tokens, cold", "s", "lower",
            {"prefix cache on": _cold(setup, setup.on), "off": _cold(setup, setup.off)}, settings, target=0.98,
        )  # fmt: skip
        setup.close()
        setup = _Setup(Path(folder), TINY)
        yield Case(
            "hybrid model, outputs that are equal with the prefix cache on and off", "outputs", "higher",
            {"equal": lambda: _num_equal(setup), "compared": lambda: NUM_OUTPUTS}, {**settings, **TINY}, target=1.0,
        )  # fmt: skip
        setup.close()


def _first_token(llm: LLM, prompt: list[int], salt: str) -> float:
    begin = time.perf_counter()
    stream = llm.submit_prompt(prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), cache_salt=salt)
    next(stream)
    seconds = time.perf_counter() - begin
    stream.result()
    return seconds


def _cold(setup: _Setup, llm: LLM) -> Measure:
    return lambda: _first_token(llm, setup.tokens(SHARED + QUESTION), f"cold {next(_SALTS)}")


def _hit(setup: _Setup) -> Measure:
    """The third question behind one system prompt: the second found its end, the third starts there."""

    def measure() -> float:
        salt, shared = f"hit {next(_SALTS)}", setup.tokens(SHARED)
        return [_first_token(setup.on, [*shared, *setup.tokens(QUESTION)], salt) for _ in range(3)][-1]

    return measure


@functools.cache
def _num_equal(setup: _Setup) -> float:
    """How many of 200 prompts of ten conversations give the same 8 tokens with the cache on and off."""
    histories = [setup.tokens(int(length)) for length in setup.rng.integers(80, 120, 10)]
    prompts = [[*histories[i % 10], *setup.tokens(int(setup.rng.integers(1, 16)))] for i in range(NUM_OUTPUTS)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    setup.on.generate(histories, params, use_tqdm=False)
    some = [prompts[i : i + 20] for i in range(0, NUM_OUTPUTS, 20)]  # so that slots are left for the checkpoints
    found = [
        [output for batch in some for output in llm.generate(batch, params, use_tqdm=False)]
        for llm in (setup.on, setup.off)
    ]
    assert all(output.num_cached_tokens for output in found[0]), "a prompt found no checkpoint"
    return sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(*found, strict=True))
