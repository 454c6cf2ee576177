"""``python -m tests.benchmarks.grammars``: what a grammar costs per step, as a table.

Beside whole steps of a tiny model (so that little else is measured) its parts: compiling, computing the
mask on the host, applying it on the device. All samples of a case are taken in turn with those of its
counterpart; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from engine.llm import LLM
from engine.models.resolve import resolve
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints, StructuredOutput
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingRow
from tests import tiny_models
from tests.benchmarks.machine import describe

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 50},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = Constraints(StructuredOutput(json=SCHEMA))
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def milliseconds(action: Callable[[], object], repeats: int) -> float:
    """Median duration of ``action``."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def step_times(llm: LLM, rows: int, constraints: list[Constraints | None]) -> dict[int, float]:
    """ms per token and row group: requests run together; the time from the first token to the last of each."""
    streams = [
        llm.submit_prompt([5 + row] * 8, GREEDY, structured_outputs=_grammar(constraints[row % len(constraints)]))
        for row in range(rows)
    ]
    outputs = [stream.result() for stream in streams]
    found: dict[int, list[float]] = {}
    for row, output in enumerate(outputs):
        metrics, count = output.metrics, len(output.outputs[0].token_ids)
        assert metrics is not None
        assert metrics.first_token_time is not None
        assert metrics.last_token_time is not None
        span = 1000 * (metrics.last_token_time - metrics.first_token_time) / max(1, count - 1)
        found.setdefault(row % len(constraints), []).append(span)
    return {kind: statistics.median(spans) for kind, spans in found.items()}


def _grammar(constraints: Constraints | None) -> StructuredOutput | None:
    return None if constraints is None else constraints.structured


def whole_steps(llm: LLM, repeats: int) -> None:
    """Free, constrained and mixed batches in turn."""
    for rows in (1, 8):
        kinds: dict[str, list[Constraints | None]] = {"free": [None], "JSON schema": [JSON]}
        if rows > 1:
            kinds["half of each"] = [None, JSON]
        samples: dict[str, list[dict[int, float]]] = {name: [] for name in kinds}
        for _ in range(repeats):
            for name, constraints in kinds.items():
                samples[name].append(step_times(llm, rows, constraints))
        for name, taken in samples.items():
            parts = [statistics.median(sample[kind] for sample in taken) for kind in taken[0]]
            print(f"{rows} rows, {name}: " + " and ".join(f"{part:.2f}" for part in parts) + " ms per token")


def parts(llm: LLM, repeats: int) -> None:
    """Compiling, computing masks, applying them."""
    manager = llm._requests.structured_outputs
    first = milliseconds(lambda: manager.prepare(JSON, [1], GREEDY), 1)
    again = milliseconds(lambda: manager.prepare(JSON, [1], GREEDY), repeats)
    print(f"first grammar {first:.0f} ms (the vocabulary's trie included), each further one {again:.2f} ms")
    make = manager.prepare(JSON, [1], GREEDY)
    assert make is not None
    vocab_size = llm._requests.vocab_size
    for rows in (1, 8):
        guides = [make() for _ in range(rows)]
        for guide in guides:
            for token in llm.tokenize('{"name": "Some'):
                guide.advance(token)
        words = np.zeros((rows, -(-vocab_size // 32)), np.int32)
        mask = milliseconds(lambda: [g.fill_bitmask(w) for g, w in zip(guides, words, strict=True)], repeats)  # noqa: B023
        logits = mx.random.normal((rows, vocab_size))
        sampling = {
            "with": [SamplingRow(GREEDY, guide=guide) for guide in guides],
            "without": [SamplingRow(GREEDY) for _ in guides],
        }
        times = {
            name: milliseconds(lambda: _sample(logits, chosen), repeats)  # noqa: B023
            for name, chosen in sampling.items()
        }
        print(
            f"{rows} rows, {vocab_size} tokens: masks on the host {mask:.2f} ms; "
            f"sampling {times['without']:.2f} ms, with masks {times['with']:.2f} ms"
        )


def _sample(logits: mx.array, rows: list[SamplingRow]) -> None:
    mx.eval(Sampler().sample(logits, SamplingMetadata.build(rows, logits.shape[-1])).token_ids)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.grammars", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="samples of each number (9)")
    repeats = parser.parse_args().repeats
    machine = describe()
    print(f"{machine['processor']}, {machine['cores']} cores, commit {machine['commit'][:12]}")
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_model(Path(folder), "llama", resolve("smollm2").path)
        with LLM(folder, max_model_len=512, gpu_memory_utilization=0.2) as llm:
            parts(llm, repeats)
            whole_steps(llm, repeats)


if __name__ == "__main__":
    main()
