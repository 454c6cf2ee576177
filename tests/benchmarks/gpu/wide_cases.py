"""Models with experts, states and windows in 4 bits, beside mlx-lm: each shape has engines of its own."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import dequantize_model

from engine.llm import LLM
from engine.runner.kv.attention_path import describe
from tests.benchmarks.gpu import ours, theirs
from tests.benchmarks.gpu.engines import Engines
from tests.benchmarks.gpu.shapes import context_bytes, first_layers, temporary_folder, text_config, write_model
from tests.benchmarks.gpu.sizes import Sizes
from tests.benchmarks.harness import Case, Result, take_turns
from tests.on_device.ties import WRONG, Oracle

OURS, BATCH, SINGLE = "LLM", "mlx-lm BatchGenerator", "mlx-lm generate_step"
_SHALLOW_BYTES = 6 << 30
"""Of the first layers alone, for the comparison of tokens."""
_TOKENS = 12
"""Compared with mlx-lm's, of each of a few prompts."""


@dataclass(frozen=True)
class Wanted:
    """How many times faster than mlx-lm a shape shall be: a step by its rows, and a prompt."""

    steps: Mapping[int, float]
    prompt: float


WANTED = {
    "qwen3.5-35b-a3b": Wanted({1: 3.0, 8: 3.0, 32: 3.0}, 3.0),
    "gemma-4-26b-a4b": Wanted({1: 3.0, 8: 2.5, 32: 4.0}, 2.0),
}


def equal_results(shape: str, parent: Engines) -> Iterator[Result]:
    """Equal tokens, of the first layers of one shape in 4 bits."""
    yield _equal(shape, parent.of_shape(shape))


def wide_results(shape: str, parent: Engines) -> Iterator[Result]:
    """Steps of several numbers of rows, and a prompt, of one shape in 4 bits."""
    engines = parent.of_shape(shape)
    wanted = WANTED.get(shape, Wanted({}, 0.0))
    for rows in engines.sizes.packed_batches:
        yield _steps(shape, rows, wanted.steps.get(rows), engines)
    yield _prompt(shape, wanted.prompt or None, engines)


def _steps(shape: str, rows: int, target: float | None, engines: Engines) -> Result:
    """In turns; a single row also beside ``generate_step``, where mlx-lm is at its best alone."""
    sizes: Sizes = engines.sizes
    length = sizes.wide_context
    variants: dict[str, Callable[[], Sequence[float]]] = {
        OURS: lambda: ours.decode_steps(engines.ours(True), engines.prompts(rows, length), sizes.steps),
        BATCH: lambda: theirs.batch_steps(engines.theirs(True), engines.prompts(rows, length), sizes.wide_steps),
    }
    if rows == 1:
        variants[SINGLE] = lambda: theirs.single_steps(
            engines.theirs(True), engines.prompts(1, length)[0], sizes.wide_steps
        )
    samples = take_turns(variants, sizes.long_repeats)
    weights = _active_bytes(engines.folder(True), shape, rows)
    floor = engines.machine.step_floor(weights, rows * context_bytes(shape, length + sizes.steps // 2))
    facts = {"kind": "wide decode", "shape": shape, "rows": rows, "context": length, "bits": 4}
    return Result(Case(f"{shape} 4bit decode, batch {rows}", "ms", "lower", {}, facts, target, floor), samples)


def _prompt(shape: str, target: float | None, engines: Engines) -> Result:
    length = engines.sizes.wide_prompt
    variants: dict[str, Callable[[], Sequence[float]]] = {
        OURS: lambda: [ours.first_token(engines.ours(True), engines.prompts(1, length)[0])],
        SINGLE: lambda: [theirs.first_token(engines.theirs(True), engines.prompts(1, length)[0])],
    }
    for measure in variants.values():  # a first prompt of this length compiles
        measure()
    samples = take_turns(variants, engines.sizes.long_repeats)
    facts = {"kind": "wide prefill", "shape": shape, "tokens": length, "bits": 4}
    return Result(Case(f"{shape} 4bit prefill of {length} tokens", "ms", "lower", {}, facts, target), samples)


def _equal(shape: str, engines: Engines) -> Result:
    """Greedy tokens of prompts side by side through ``LLM``, judged by mlx-lm in float32 with the same weights.

    Of the first layers alone: where nobody trained the weights, each router that rounding turns turns others, and after
    forty layers no two ways to compute them agree. The ratio is 1 where no token is wrong.
    """
    engines.release()
    layers = first_layers(shape)
    prompts = [engines.prompts(1, length)[0] for length in (40, 130, 300, 21)]
    with temporary_folder(_SHALLOW_BYTES) as name:
        write_model(Path(name), shape, packed=True, layers=layers)
        with LLM(name, **engines.options()) as llm:
            streams = [llm.submit_prompt(prompt, ours.greedy(0, _TOKENS)) for prompt in prompts]
            said = [list(stream.result().outputs[0].token_ids) for stream in streams]
            attention, notes = describe(llm.attention_paths), llm.notes
        model, copy = theirs.load(Path(name)), dequantize_model(theirs.load(Path(name)))
        oracle = Oracle.of(model, copy, prompts[0])
        judged = [oracle.judge(prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]
    del model, copy
    found = sum((kinds for kinds, _ in judged), Counter[str]())
    facts: dict[str, Any] = {
        "kind": "wide equal", "shape": shape, "layers": layers, "verdicts": dict(found), "tie": oracle.tie,
        "largest_gap": max(gap for _, gap in judged), "attention": attention, "notes": notes,
    }  # fmt: skip
    print(f"  {shape}, {layers} layers: {dict(found)}, gap {facts['largest_gap']:.3f}, a tie up to {oracle.tie:.3f}")
    right = {"tokens that are right": [float(found.total() - found[WRONG])], "tokens": [float(found.total())]}
    return Result(Case(f"{shape} 4bit, {layers} layers, tokens as mlx-lm's", "tokens", "higher", {}, facts, 1.0), right)


def _active_bytes(folder: Path, shape: str, rows: int) -> int:
    """Bytes of weights that a step of ``rows`` rows reads: of the experts those that evenly drawn routes touch."""
    config = text_config(shape)
    experts, chosen = config["num_experts"], config.get("num_experts_per_tok", config.get("top_k_experts"))
    touched = 1 - (1 - chosen / experts) ** rows
    total = 0.0
    for path in sorted(folder.glob("model-*.safetensors")):
        shard = mx.load(str(path))
        assert isinstance(shard, dict), "a file of several arrays"
        for name, array in shard.items():
            if "embed_tokens" in name and not config["tie_word_embeddings"]:
                continue  # a row of it for each token
            total += array.nbytes * (touched if ".switch_" in name else 1)
    return int(total)
