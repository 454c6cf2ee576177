"""``python -m tests.benchmarks.sampling_speed``: milliseconds that sampling adds to a step on this device.

Checks first that bounds found in blocks of the vocabulary are those of a sort; exits with 1 where they are not.
"""

import argparse
import statistics
import sys
import time

import mlx.core as mx
import numpy as np

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingPlan, SamplingRow
from engine.runner.sampling.top_weights import largest_of_blocks

WISHES = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.7),
    "top_k, top_p, presence": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
    "top_p": SamplingParams(temperature=0.7, top_p=0.8),
}


def wrong_bounds(vocab_size: int, num_rows: int) -> list[str]:
    """Cases in which the largest values are not those of a sort on the host."""
    rng, wrong = np.random.default_rng(0), []
    for ties in (False, True):
        values = rng.standard_normal((num_rows, vocab_size)).astype(np.float32)
        values = np.round(values) if ties else values
        for k in (1, 20, 64):
            found = np.array(largest_of_blocks(mx.array(values), k))
            if not np.array_equal(found, -np.sort(-values, axis=-1)[:, :k]):
                wrong.append(f"k={k}, {ties=}")
    return wrong


def step_time(params: SamplingParams, num_rows: int, vocab_size: int, num_steps: int) -> float:
    """Milliseconds per step, each submitted before the tokens of the one before are read."""
    rows = [SamplingRow(params, seed=i, output_token_ids=[1, 2, 3] * 50) for i in range(num_rows)]
    plan, sampler = SamplingPlan(rows, vocab_size), Sampler()
    logits = mx.random.normal((num_rows, vocab_size)).astype(mx.bfloat16)
    places = np.arange(num_rows, dtype=np.int32)
    newest = mx.zeros(num_rows, mx.int32)
    times = []
    for step in range(num_steps):
        begin = time.perf_counter()
        last = newest
        metadata = plan.metadata(np.full(num_rows, 200 + step), places, follows=step > 0)
        newest = sampler.sample(logits, metadata, last).token_ids
        mx.async_eval(newest)  # type: ignore[no-untyped-call]
        last.tolist()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[5:])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sampling_speed", description=__doc__)
    parser.add_argument("--vocab", type=int, default=151936, metavar="N", help="vocabulary (151936)")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64], metavar="N", help="requests (8 32 64)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of each (60)")
    args = parser.parse_args()
    wrong = wrong_bounds(args.vocab, max(args.rows))
    print(f"bounds in blocks: {'wrong: ' + '; '.join(wrong) if wrong else 'as by a sort'}", flush=True)
    for num_rows in args.rows:
        for name, params in WISHES.items():
            took = step_time(params, num_rows, args.vocab, args.steps)
            print(f"{num_rows} rows, {name}: {took:.3f} ms per step", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
