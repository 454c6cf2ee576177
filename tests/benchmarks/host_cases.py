"""What Python costs in a step on the engine's thread, beside what it may cost."""

import gc
from collections.abc import Iterator
from functools import partial

from tests.benchmarks.harness import Case
from tests.benchmarks.step_host import host_times

MOST = {64: 0.6, 256: 2.5}
"""Milliseconds per step, by the number of requests that decode."""
_STEPS = 100


def host_cases() -> Iterator[Case]:
    """Steps of the whole engine over a backend that computes nothing, greedy."""
    for number, most in MOST.items():
        yield Case(
            f"host work per step, {number} requests", "ms", "lower",
            {"engine": partial(host_milliseconds, number), "at most": partial(float, most)},
            {"num_steps": _STEPS}, target=1.0,
        )  # fmt: skip


def host_milliseconds(number: int, num_steps: int = _STEPS) -> float:
    """A step's median, without what it waits for the device and submits to it."""
    gc.collect()
    gc.freeze()  # what other cases hold would be walked through again and again
    times = host_times(number, num_steps=num_steps)
    gc.unfreeze()
    return times.median("step") - times.median("read") - times.median("submit")
