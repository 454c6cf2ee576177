"""What a request costs the others does not grow with how many wait, nor one completion's end with its siblings."""

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.core.waiting import WaitingQueue
from engine.outputs import CompletionDelta
from engine.params.sampling_params import MAX_COMPLETIONS, SamplingParams
from tests.benchmarks.step_host import VOCAB_SIZE, IdleBackend, make_engine, random_prompts, submit
from tests.engine.core.test_scheduler import Driver, make_request, make_scheduler

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


def test_requests_that_ended_while_they_waited_are_not_kept_until_their_turn():
    waiting = WaitingQueue()
    requests = [make_request(str(i), 4) for i in range(1000)]
    for request in requests:
        waiting.add(request)
    for request in requests[1:]:
        waiting.remove(request)
        waiting.remove(request)  # twice is once
    assert waiting.own.num_entries <= 70
    assert (list(waiting), waiting.first(), len(waiting)) == ([requests[0]], requests[0], 1)
    waiting.remove(requests[0])
    waiting.add(requests[0])  # as one that ran and was preempted: it waits once
    assert list(waiting) == [requests[0]]


def test_a_prompt_with_siblings_alone_has_the_whole_budget():
    scheduler, pool = make_scheduler(budget=16)
    parent = make_request("a", 16)
    scheduler.add(parent)
    for index in (1, 2):
        scheduler.add(make_request("a", 16, index=index), fork_of=parent)
    assert [scheduled.num_tokens for scheduled in Driver(scheduler, pool).step().scheduled_requests] == [16]


def test_siblings_of_one_that_is_preempted_before_they_start_wait_for_it_again():
    scheduler, pool = make_scheduler(max_num_seqs=4, caching=False, budget=6)
    parent = make_request("a", 9, max_tokens=8)
    siblings = [make_request("a", 9, max_tokens=8, index=index) for index in (1, 2)]
    for request in (parent, *siblings):
        scheduler.add(request, fork_of=None if request is parent else parent)
    scheduler.max_num_seqs = 1
    driver = Driver(scheduler, pool)
    driver.step()
    driver.step()
    assert (scheduler.waiting.num_ready, scheduler.waiting.num_aside) == (2, 0), "the prompt is computed"
    scheduler.max_num_seqs = 4
    scheduler.preempt(parent)
    parent.num_pending, driver.in_flight = 0, None
    driver.step()
    assert (scheduler.running, scheduler.waiting.num_aside) == ([parent], 2)
    driver.run()
    assert all(len(request.output_token_ids) == 8 for request in (parent, *siblings))
    assert not scheduler.waiting.num_aside
