"""``python3 -m tests.draw_rows_on_device``: sampling in one launch on this machine's GPU, right and how fast.

Under 30 seconds. Needs mlx and numpy alone. Tokens are compared with those of MLX's own operations; where they differ
numpy says which of the two is wrong. Exits 1 where the kernel is.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from engine.params.sampling_params import SamplingParams
from engine.runner.kernels.bench import seconds_of
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.draw_check import Row, Wish, draw_problem, penalized, token_problem
from engine.runner.kernels.draw_rows import FEWEST_ROWS, DrawRows, draw_rows
from engine.runner.sampling.row_wishes import RowWishes
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingPlan, SamplingRow

VOCAB = 151_936
USUAL = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
MIXED = (
    USUAL, SamplingParams(temperature=0, frequency_penalty=0.4), SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9), SamplingParams(temperature=1.2, min_p=0.02, top_k=200),
    SamplingParams(temperature=0.6, top_p=0.95, top_k=20, frequency_penalty=0.3),
)  # fmt: skip
SIZES = ((mx.bfloat16, VOCAB, 32), (mx.float32, 32_000, 7), (mx.float16, 50_257, 1), (mx.bfloat16, 262_144, 6))
"""Element type, width and rows of what is compared."""
ROWS = (1, 32, 64, 256)
STEPS, LAUNCHES = 20, 10

_started = time.perf_counter()


def say(text: str) -> None:
    """Print at once."""
    print(f"[{time.perf_counter() - _started:5.1f}] {text}", flush=True)


def logits_of(rows: int, width: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """With a few likely tokens, as a model gives them."""
    logits = (mx.random.normal((rows, width), key=mx.random.key(seed)) * 2.5).astype(dtype)
    mx.eval(logits)
    return logits


class Batch:
    """Rows that sample step after step, each of its own seed."""

    def __init__(self, rows: int, width: int, params: Sequence[SamplingParams], sampler: Sampler) -> None:
        self.rows = [
            SamplingRow(params[i % len(params)], seed=i, position=0, output_token_ids=[i % width, 3])
            for i in range(rows)
        ]
        self.plan = SamplingPlan(self.rows, width)
        self.sampler = sampler
        self.steps = 0
        self.newest: mx.array | None = None

    def metadata(self) -> SamplingMetadata:
        """Of the next step."""
        every = np.arange(len(self.rows), dtype=np.int32)
        pending = every if self.steps else np.full_like(every, -1)
        self.steps += 1
        return self.plan.metadata(every + self.steps, pending, follows=self.steps > 1)

    def step(self, logits: mx.array) -> mx.array:
        """Token ids, lazy."""
        self.newest = self.sampler.sample(logits, self.metadata(), self.newest).token_ids
        return self.newest


def compared(dtype: mx.Dtype, width: int, rows: int, kernel: DrawRows = draw_rows) -> list[str]:
    """Three steps of both ways over the same logits; what the kernel has wrong."""
    ways = [Batch(rows, width, MIXED, Sampler()), Batch(rows, width, MIXED, Sampler(kernel))]
    wrong, differ = [], 0
    counts = np.zeros((rows, width), np.float32)
    for row, one in enumerate(ways[0].rows):
        counts[row, list(one.output_token_ids)] += 1
    for step in range(3):
        logits = logits_of(rows, width, dtype, step)
        mlx, own = (np.array(way.step(logits)) for way in ways)
        differ += int((mlx != own).sum())
        exact = np.array(logits.astype(mx.float32))
        uniforms = uniforms_of(ways[1], step)
        for row in range(rows):
            wish = wish_of(ways[1].rows[row].params)
            problem = token_problem(
                penalized(exact[row], wish, counts[row]), Row(exact[row], wish, uniforms[row]), int(own[row])
            )
            wrong += [f"step {step}, row {row}, {wish}: {problem}"] if problem else []
        counts[np.arange(rows), own] += 1
        ways[0].newest = ways[1].newest  # so that one difference is not the reason of the next
    name = f"{rows} rows of {width} {str(dtype).rpartition('.')[2]}"
    said = f"{differ} of {3 * rows} tokens are not MLX's; by numpy {len(wrong)} wrong"
    say(f"{'WRONG' if wrong else 'ok   '} {name}: {said}")
    for line in wrong[:5]:
        say(f"      {line}")
    return [name] if wrong else []


def uniforms_of(batch: Batch, step: int) -> list[tuple[float, float]]:
    """Those of a step that was taken; rows that draw nothing have zeros."""
    every = np.arange(len(batch.rows), dtype=np.int32)
    metadata = batch.plan.metadata(every + step + 1, np.full_like(every, -1))
    pairs = np.array(metadata.wishes.uniforms(metadata.uniforms))
    return [(float(first), float(second)) for first, second in pairs[: len(batch.rows)]]


def wish_of(params: SamplingParams) -> Wish:
    """The same in the words of the check."""
    return Wish(
        params.temperature, params.min_p, params.top_p, max(params.top_k, 0), params.frequency_penalty,
        params.presence_penalty,
    )  # fmt: skip


def least_of(measure: Callable[[], float], times: int = 3) -> float:
    """In microseconds."""
    return 1e6 * min(measure() for _ in range(times))


def step_seconds(batch: Batch, logits: mx.array) -> float:
    """Of a step, submitted one ahead as in decode, with its metadata."""
    mx.eval(batch.step(logits))
    before = batch.step(logits)
    mx.async_eval(before)  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    for _ in range(STEPS):
        tokens = batch.step(logits)
        mx.async_eval(tokens)  # type: ignore[no-untyped-call]
        mx.eval(before)
        before = tokens
    mx.eval(before)
    return (time.perf_counter() - started) / STEPS


def python_seconds(batch: Batch, logits: mx.array) -> float:
    """Of a step's metadata and graph; nothing is submitted meanwhile."""
    mx.eval(batch.step(logits))
    seconds = 0.0
    for _ in range(STEPS):
        started = time.perf_counter()
        tokens = batch.step(logits)
        seconds += time.perf_counter() - started
        mx.eval(tokens)
    return seconds / STEPS


def launch_seconds(rows: int, logits: mx.array, params: SamplingParams) -> float:
    """Of the kernel alone on the GPU, one launch after another."""
    batch = Batch(rows, logits.shape[1], [params], Sampler(draw_rows))
    mx.eval(batch.step(logits))
    penalties = batch.metadata().penalties
    wishes: RowWishes = batch.metadata().wishes
    uniforms = mx.random.uniform(shape=(max(rows, FEWEST_ROWS), 2))
    mx.eval(uniforms, wishes.array)

    def build() -> list[mx.array]:
        drawn = [batch.newest]
        for _ in range(LAUNCHES):
            counts = () if penalties is None else (penalties.kept.counts, drawn[-1])
            drawn.append(draw_rows(logits, wishes.array, uniforms, *counts))
        return [tokens for tokens in drawn if tokens is not None]

    return seconds_of(build) / LAUNCHES


def times(rows: int, width: int = VOCAB) -> None:
    """Both ways, greedy and sampled."""
    logits = logits_of(rows, width, mx.bfloat16)
    for name, params in (
        ("greedy", SamplingParams(temperature=0)), ("sampled", USUAL), ("top_p alone", SamplingParams(top_p=0.9)),
    ):  # fmt: skip
        cells = []
        for way, sampler in (("MLX", Sampler()), ("kernel", Sampler(draw_rows))):
            batch = Batch(rows, width, [params], sampler)
            step = least_of(lambda batch=batch: step_seconds(batch, logits))  # type: ignore[misc]
            python = least_of(lambda batch=batch: python_seconds(batch, logits))  # type: ignore[misc]
            cells.append(f"{way} {step:7.1f} (Python {python:6.1f})")
        cells.append(f"the launch {1e6 * launch_seconds(rows, logits, params):6.1f}")
        say(f"  us a step, {rows:3} rows, {name:11}: {', '.join(cells)}")
    mx.clear_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.draw_rows_on_device", description=__doc__)
    parser.add_argument("--only-right", action="store_true", help="correctness, without timings")
    options = parser.parse_args(arguments)
    if not kernels_available():
        print("no GPU: MLX computes on the CPU here")
        return 1
    say(f"{mx.device_info().get('device_name')}, MLX {version('mlx')}")
    started = time.perf_counter()
    problem = draw_problem([mx.bfloat16, mx.float32], draw_rows)
    say(f"{'WRONG' if problem else 'ok   '} the check at load, {time.perf_counter() - started:.2f} s: {problem}")
    problem_of_others = draw_problem([mx.bfloat16], draw_rows, (VOCAB, 50_257))
    say(f"{'WRONG' if problem_of_others else 'ok   '} the same over wide rows: {problem_of_others}")
    wrong = [said for said in (problem, problem_of_others) if said]
    for dtype, width, rows in SIZES:
        wrong += compared(dtype, width, rows)
    for rows in () if options.only_right else ROWS:
        times(rows)
    say(f"{len(wrong)} wrong" + "".join(f"\n  {line}" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
