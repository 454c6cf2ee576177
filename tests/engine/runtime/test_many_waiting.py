"""What a request costs the others does not grow with how many wait, nor one completion's end with its siblings."""

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.outputs import CompletionDelta
from engine.params.sampling_params import MAX_COMPLETIONS, SamplingParams
from tests.benchmarks.step_host import VOCAB_SIZE, IdleBackend, make_engine, random_prompts, submit

PARAMS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SEATS = 4


def opcodes(work: Callable[[], Any]) -> int:
    """How many instructions of Python ``work`` takes: the same on every machine."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # what others have called at a collection is no part of the work
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def crowded(num_waiting: int):
    """An engine whose seats are taken, and streams: of those that run, then of ``num_waiting`` others."""
    engine = make_engine(IdleBackend(SEATS), SEATS, VOCAB_SIZE)
    streams = submit(engine, random_prompts(SEATS + num_waiting, VOCAB_SIZE, 20), PARAMS)
    for _ in range(3):
        engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (SEATS, num_waiting)
    return engine, streams


def fastest(work: Callable[[], Any], times: int = 15) -> float:
    taken = []
    for _ in range(times):
        begin = time.thread_time()
        work()
        taken.append(time.thread_time() - begin)
    return min(taken)


def test_a_step_takes_as_long_with_thousands_waiting_as_with_ten():
    few, many = crowded(10), crowded(3_000)
    assert opcodes(many[0].step) == pytest.approx(opcodes(few[0].step), rel=0.05)
    assert fastest(many[0].step) < 3 * fastest(few[0].step)  # what C does is no instruction of Python


@pytest.mark.parametrize("deed", ["submit", "abort", "preempt", "start"])
def test_a_request_comes_goes_gives_way_and_starts_as_cheaply_with_thousands_waiting_as_with_ten(deed):
    def cost(num_waiting: int) -> int:
        engine, streams = crowded(num_waiting)
        names = [stream.request_id for stream in streams]
        if deed == "start":
            engine.abort_request(names[0])
        return opcodes(
            {
                "submit": lambda: submit(engine, random_prompts(1, VOCAB_SIZE, 20), PARAMS),
                "abort": lambda: engine.abort_request(names[SEATS + num_waiting // 2]),
                "preempt": lambda: engine.scheduler.preempt(engine.scheduler.running[-1]),
                "start": engine.step,
            }[deed]
        )

    # Its place in a heap is found in as many comparisons as the number has binary digits.
    assert cost(3_000) < 1.2 * cost(10) + 30


def of_n(n: int):
    """An engine that runs a request with ``n`` completions, most of which wait, and its stream."""
    engine = make_engine(IdleBackend(SEATS), SEATS, VOCAB_SIZE)
    (stream,) = submit(engine, random_prompts(1, VOCAB_SIZE, 20), PARAMS.replace(n=n))
    engine.step()
    return engine, stream


@pytest.mark.parametrize("how", ["abort", "fail", "disconnect while the first computes the prompt"])
def test_each_of_many_completions_ends_as_cheaply_as_each_of_a_few(how):
    def cost(n: int) -> float:
        engine, stream = of_n(n)
        if how.startswith("disconnect"):
            engine = make_engine(IdleBackend(SEATS), SEATS, VOCAB_SIZE)
            (stream,) = submit(engine, random_prompts(1, VOCAB_SIZE, 20), PARAMS.replace(n=n))
        end = engine.fail_all if how == "fail" else lambda error: engine.abort_request(stream.request_id)
        spent = opcodes(lambda: end(ValueError("a test")))
        assert stream.finished
        assert not engine.scheduler.has_work
        return spent / n

    assert cost(512) == pytest.approx(cost(64), rel=0.2)


def test_completions_that_wait_have_no_copy_of_the_prompt():
    engine, _ = of_n(MAX_COMPLETIONS)
    waiting = list(engine.scheduler.waiting)
    assert len(waiting) == MAX_COMPLETIONS - SEATS
    assert len({id(request.all_token_ids) for request in waiting}) == 1


def test_the_list_of_a_prompt_that_its_sender_goes_on_to_change_is_not_the_engines():
    engine = make_engine(IdleBackend(SEATS), SEATS, VOCAB_SIZE)
    prompt = list(range(20))
    (stream,) = submit(engine, [prompt], PARAMS.replace(max_tokens=4))
    engine.step()
    prompt.clear()
    while engine.has_work:
        engine.step()
    assert stream.error is None
    deltas: list[CompletionDelta] = stream.take()
    assert sum(len(delta.token_ids) for delta in deltas) == 4
