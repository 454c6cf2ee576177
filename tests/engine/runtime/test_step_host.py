"""What the engine's thread does per step, in calls: times depend on the machine, counts do not."""

import sys
from types import FrameType

import pytest

from tests.benchmarks.step_host import GREEDY, SAMPLED, VOCAB_SIZE, IdleBackend, make_engine, random_prompts, submit

MOST_CALLS = 60
"""Of Python and C functions for each request and step; a call is about a tenth of a microsecond."""
NUM_STEPS = 32
"""Two blocks: what happens at their ends counts as well."""


class Calls:
    """Counts calls of functions, Python's and C's."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, _frame: FrameType, event: str, _argument: object) -> None:
        self.number += event in ("call", "c_call")


def calls_per_step(num_requests: int, params) -> float:
    engine = make_engine(IdleBackend(num_requests), num_requests, VOCAB_SIZE)
    streams = submit(engine, random_prompts(num_requests, VOCAB_SIZE), params)
    while min(stream.num_tokens for stream in streams) < 2:
        engine.step()
    calls, before = Calls(), sum(stream.num_tokens for stream in streams)
    sys.setprofile(calls)
    try:
        for _ in range(NUM_STEPS):
            engine.step()
    finally:
        sys.setprofile(None)
    assert sum(stream.num_tokens for stream in streams) - before == NUM_STEPS * num_requests
    engine.close()
    return calls.number / NUM_STEPS


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_decoding_request_costs_as_many_calls_in_a_large_batch_as_in_a_small_one(params):
    at = {number: calls_per_step(number, params) for number in (16, 64, 256)}
    smaller, larger = (at[64] - at[16]) / 48, (at[256] - at[64]) / 192
    assert larger == pytest.approx(smaller, rel=0.03)
    assert larger <= MOST_CALLS
