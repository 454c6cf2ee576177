"""The scheduler without a model: a fake runner 'samples' the next integer."""

import random
import time

import pytest

from engine.core.block_pool import _RESERVED as RESERVED
from engine.core.block_pool import BlockPool
from engine.core.cache_groups import FullAttentionGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request, RequestStatus
from engine.core.scheduler import Scheduler, must_end
from engine.core.step import SchedulerOutput
from engine.core.token_guide import REPETITION_STOP_REASON
from engine.params.sampling_params import SamplingParams
from tests.engine.core.stand_ins import LimitedMemory, WaitingGuide


def make_scheduler(num_blocks=64, *, max_num_seqs=8, budget=64, caching=True, block_size=4, memory=None, grid=1):
    pool = BlockPool(num_blocks, enable_caching=caching)
    kv = KVCacheManager([FullAttentionGroup(pool, block_size)])
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    return Scheduler(kv, **limits, memory=memory, chunk_grid=grid), pool


def make_request(name, prompt, max_tokens=4, **changes):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    tokens = list(prompt) if not isinstance(prompt, int) else list(range(prompt))
    return Request(name, tokens, params, max_tokens=max_tokens, **changes)


class Driver:
    """Runs steps with one in flight, as the engine does; the 'model' emits 1000, 1001, …"""

    def __init__(self, scheduler, pool):
        self.scheduler, self.pool = scheduler, pool
        self.in_flight: SchedulerOutput | None = None
        self.steps: list[SchedulerOutput] = []

    def step(self):
        output = self.scheduler.schedule() if self.scheduler.has_work else SchedulerOutput()
        self.steps.append(output)
        for scheduled in output.scheduled_requests:
            self.check_scheduled(scheduled)
        if self.in_flight is not None:
            for scheduled in self.in_flight.sampling:
                self.scheduler.update(scheduled, 1000 + len(scheduled.request.output_token_ids))
        self.in_flight = output
        self.pool.check()
        return output

    def check_scheduled(self, scheduled):
        assert scheduled.num_tokens > 0
        assert len(scheduled.block_tables[0]) * self.scheduler.kv.groups[0].block_size >= scheduled.end

    def run(self, most=500):
        for _ in range(most):
            self.step()
            if not self.scheduler.has_work and not self.in_flight.scheduled_requests:
                return self
        raise AssertionError("requests did not finish")


def test_a_request_runs_to_its_last_token_and_frees_its_blocks():
    scheduler, pool = make_scheduler()
    request = make_request("a", 10, max_tokens=5)
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert request.output_token_ids == [1000, 1001, 1002, 1003, 1004]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert pool.num_held_blocks == 0


def test_a_step_is_scheduled_before_the_last_ones_tokens_are_known():
    scheduler, pool = make_scheduler()
    scheduler.add(make_request("a", 3))
    driver = Driver(scheduler, pool)
    first, second = driver.step(), driver.step()
    assert first.scheduled_requests[0].samples
    assert not first.scheduled_requests[0].pending
    assert second.scheduled_requests[0].pending
    assert second.scheduled_requests[0].start == 3


def test_a_block_is_found_again_only_once_its_last_token_was_computed():
    scheduler, pool = make_scheduler(block_size=4)
    request = make_request("a", 6, max_tokens=9)
    scheduler.add(request)
    scheduled = scheduler.schedule().scheduled_requests[0]
    pending = scheduler.schedule().scheduled_requests[0]
    scheduler.update(scheduled, 1000)
    scheduled, pending = pending, scheduler.schedule().scheduled_requests[0]
    assert (pending.start, pending.end) == (7, 8)
    scheduler.update(scheduled, 1001)  # the eighth token is known; the step that computes it is not submitted yet
    scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
    assert pool.num_free_cached == 1


def test_no_step_is_spent_on_the_token_after_the_last():
    scheduler, pool = make_scheduler()
    scheduler.add(make_request("a", 3, max_tokens=2))
    driver = Driver(scheduler, pool).run()
    assert sum(bool(step.scheduled_requests) for step in driver.steps) == 2


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler, pool = make_scheduler(budget=16)
    scheduler.add(make_request("a", 40, max_tokens=1))
    driver = Driver(scheduler, pool).run()
    assert [s.scheduled_requests[0].num_tokens for s in driver.steps if s.scheduled_requests] == [16, 16, 8]


def test_chunks_end_on_the_grid_whatever_else_is_in_the_step_but_for_a_prompts_last():
    scheduler, pool = make_scheduler(budget=50, grid=16)
    driver = Driver(scheduler, pool)
    scheduler.add(make_request("running", 3, max_tokens=30))
    driver.step()
    long = make_request("long", 135)
    scheduler.add(long)
    driver.run()
    chunks = [one for step in driver.steps for one in step.scheduled_requests if one.request is long]
    assert [chunk.end for chunk in chunks][:4] == [48, 96, 135, 136]


def test_a_budget_below_the_grid_is_used_whole():
    scheduler, pool = make_scheduler(budget=10, grid=16)
    scheduler.add(make_request("a", 40))
    ends = [one.end for step in Driver(scheduler, pool).run().steps for one in step.scheduled_requests]
    assert ends[:5] == [10, 16, 26, 32, 40]


def test_decodes_go_first_and_prefills_take_the_rest_of_the_budget():
    scheduler, pool = make_scheduler(budget=16)
    scheduler.add(make_request("decode", 4, max_tokens=20))
    driver = Driver(scheduler, pool)
    driver.step()
    scheduler.add(make_request("prefill", range(100, 140), max_tokens=1))
    scheduled_requests = driver.step().scheduled_requests
    assert [(s.request.request_id, s.num_tokens) for s in scheduled_requests] == [("decode", 1), ("prefill", 15)]


def test_a_short_request_behind_a_long_one_has_its_token_within_two_steps():
    scheduler, pool = make_scheduler(num_blocks=2000, budget=64)
    long = make_request("long", 4000)
    scheduler.add(long)
    driver = Driver(scheduler, pool)
    driver.step()
    short = make_request("short", range(5000, 5020))
    scheduler.add(short)
    driver.step()
    driver.step()
    assert short.output_token_ids == [1000]
    assert long.num_computed_tokens < 4000


def test_equal_beginnings_share_blocks():
    scheduler, pool = make_scheduler()
    first = make_request("a", 12)
    scheduler.add(first)
    Driver(scheduler, pool).run()
    second = make_request("b", [*range(12), 99, 98])
    scheduler.add(second)
    Driver(scheduler, pool).run()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 12


def test_the_last_token_of_a_cached_prompt_is_computed_again():
    scheduler, pool = make_scheduler()
    for name in "ab":
        request = make_request(name, 12)
        scheduler.add(request)
        Driver(scheduler, pool).run()
    assert request.num_cached_tokens == 8


@pytest.mark.parametrize(("change", "cached"), [({}, 8), ({"cache_salt": "x"}, 0)])
def test_a_salt_keeps_caches_apart(change, cached):
    scheduler, pool = make_scheduler()
    scheduler.add(make_request("a", 12))
    Driver(scheduler, pool).run()
    request = make_request("b", 12, **change)
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert request.num_cached_tokens == cached


def test_prompt_logprobs_skip_the_prefix_cache():
    scheduler, pool = make_scheduler()
    scheduler.add(make_request("a", 12))
    Driver(scheduler, pool).run()
    request = make_request("b", 12)
    request.params = request.params.replace(prompt_logprobs=1)
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert request.num_cached_tokens == 0


def test_without_caching_nothing_is_found():
    scheduler, pool = make_scheduler(caching=False)
    for name in "ab":
        request = make_request(name, 12)
        scheduler.add(request)
        Driver(scheduler, pool).run()
    assert request.num_cached_tokens == 0
    assert pool.num_free_cached == 0


def test_siblings_share_the_blocks_of_their_prompt_even_without_a_cache():
    scheduler, pool = make_scheduler(caching=False)
    parent = make_request("a", 12)
    children = [make_request("a", 12, index=i) for i in (1, 2)]
    scheduler.add(parent)
    for child in children:
        scheduler.add(child, fork_of=parent)
    driver = Driver(scheduler, pool)
    step = driver.step()
    assert [(s.start, s.num_tokens) for s in step.scheduled_requests] == [(0, 12), (8, 4), (8, 4)]
    assert pool.num_held_blocks == 3 + 1 + 1
    driver.run()
    assert [r.output_token_ids for r in children] == [[1000, 1001, 1002, 1003]] * 2
    assert pool.num_held_blocks == 0


def test_the_latest_request_gives_way_when_blocks_run_out_and_still_ends_right():
    scheduler, pool = make_scheduler(num_blocks=8, budget=64)
    requests = [make_request(str(i), range(i * 50, i * 50 + 10), max_tokens=12) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    Driver(scheduler, pool).run()
    assert scheduler.num_preemptions > 0
    assert requests[0].metrics.num_preemptions == 0
    assert all(r.output_token_ids == [1000 + i for i in range(12)] for r in requests)


def test_a_lower_priority_number_is_served_first():
    scheduler, pool = make_scheduler(max_num_seqs=1)
    for name, priority in (("late", 1), ("soon", 0)):
        scheduler.add(make_request(name, 3, priority=priority, arrival_time=float(priority == 0)))
    assert Driver(scheduler, pool).step().scheduled_requests[0].request.request_id == "soon"


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_at_any_point_frees_the_blocks(steps):
    scheduler, pool = make_scheduler(budget=8)
    request, other = make_request("a", 20, max_tokens=9), make_request("b", range(40, 60), max_tokens=3)
    scheduler.add(request)
    scheduler.add(other)
    driver = Driver(scheduler, pool)
    for _ in range(steps):
        driver.step()
    scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    driver.run()
    assert request.status is RequestStatus.FINISHED_ABORTED
    assert other.output_token_ids == [1000, 1001, 1002]
    assert pool.num_held_blocks == 0


def test_an_aborted_parent_lets_its_siblings_go_on():
    scheduler, pool = make_scheduler()
    parent, child = make_request("a", 12), make_request("a", 12, index=1)
    scheduler.add(parent)
    scheduler.add(child, fork_of=parent)
    scheduler.finish(parent, RequestStatus.FINISHED_ABORTED)
    Driver(scheduler, pool).run()
    assert child.output_token_ids == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize("stop", [1001])
def test_a_stop_token_ends_the_request_and_names_itself(stop):
    scheduler, pool = make_scheduler()
    request = make_request("a", 3, max_tokens=9)
    request.params = request.params.replace(stop_token_ids=[stop])
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert request.output_token_ids[-1] == stop
    assert request.stop_reason == stop


def test_ignore_eos_goes_on_and_min_tokens_waits():
    scheduler, pool = make_scheduler()
    requests = [
        make_request("stops", 3, max_tokens=6, eos_token_ids=frozenset({1001})),
        make_request("ignores", 3, max_tokens=6, eos_token_ids=frozenset({1001})),
        make_request("waits", 3, max_tokens=6, eos_token_ids=frozenset({1001, 1004})),
    ]
    requests[1].params = requests[1].params.replace(ignore_eos=True)
    requests[2].params = requests[2].params.replace(min_tokens=3)
    for request in requests:
        scheduler.add(request)
    Driver(scheduler, pool).run()
    assert [len(r.output_token_ids) for r in requests] == [2, 6, 5]


def test_a_lone_sequence_keeps_its_blocks_in_one_run():
    scheduler, pool = make_scheduler(num_blocks=256)
    requests = [make_request(str(i), range(i * 100, i * 100 + 20), max_tokens=60) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    driver = Driver(scheduler, pool)
    for _ in range(50):
        for scheduled in driver.step().scheduled_requests:
            table = scheduled.block_tables[0]
            assert list(table) == list(range(table[0], table[0] + len(table)))


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_requests_ends_right_and_leaks_nothing(seed):
    """Random lengths, shared prefixes, forks, aborts and a pool that is often too small."""
    rng = random.Random(seed)
    scheduler, pool = make_scheduler(
        num_blocks=rng.choice([14, 20, 60]), budget=rng.choice([5, 16, 64]), caching=rng.random() < 0.7
    )
    driver = Driver(scheduler, pool)
    kept, gone = [], []
    for number in range(25):
        prompt = [*range(rng.choice([0, 8, 16])), *(rng.randrange(500) for _ in range(rng.randrange(1, 14)))]
        request = make_request(str(number), prompt, max_tokens=rng.randrange(1, 20), priority=rng.randrange(2))
        scheduler.add(request)
        kept.append(request)
        if rng.random() < 0.3:
            child = make_request(str(number), prompt, max_tokens=5, priority=request.priority, index=1)
            scheduler.add(child, fork_of=request)
            kept.append(child)
        if rng.random() < 0.2:
            victim = kept.pop(rng.randrange(len(kept)))
            scheduler.finish(victim, RequestStatus.FINISHED_ABORTED)
            gone.append(victim)
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    assert all(r.output_token_ids == [1000 + i for i in range(r.max_tokens)] for r in kept)
    assert pool.num_held_blocks == 0
    assert pool.num_free_blocks == pool.num_blocks
    assert pool._state.count(RESERVED) == 0, "room that nobody grows into any more"


def requests_by_step(driver, request):
    return [
        [scheduled for scheduled in output.scheduled_requests if scheduled.request is request]
        for output in driver.steps
    ]


def test_a_request_that_needs_its_last_token_waits_for_it_while_others_overlap():
    scheduler, pool = make_scheduler()
    free, guided = make_request("free", 5, 12), make_request("guided", 5, 6, guide=WaitingGuide())
    scheduler.add(free)
    scheduler.add(guided)
    driver = Driver(scheduler, pool).run()
    assert not any(scheduled.pending for step in requests_by_step(driver, guided) for scheduled in step)
    assert [len(step) for step in requests_by_step(driver, guided)[:12]] == [1, 0] * 6
    assert [len(step) for step in requests_by_step(driver, free)[:12]] == [1] * 12
    assert all(scheduled.pending for step in requests_by_step(driver, free)[1:12] for scheduled in step)
    assert guided.guide.taken == guided.output_token_ids == [1000 + i for i in range(6)]
    assert pool.num_held_blocks == 0


def test_a_request_waits_only_while_its_guide_does():
    scheduler, pool = make_scheduler()
    request = make_request("guided", 5, 10, guide=WaitingGuide(first=4, last=6))
    scheduler.add(request)
    driver = Driver(scheduler, pool).run()
    pending = [scheduled.pending for step in requests_by_step(driver, request) for scheduled in step]
    assert pending.count(False) == 3  # the prompt, and the two tokens that were waited for
    assert len(request.output_token_ids) == 10


def test_a_guide_ends_its_request_with_its_last_token_as_text():
    scheduler, pool = make_scheduler()
    request = make_request("guided", 5, 10, guide=WaitingGuide(stop=3))
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert (request.status, request.status.finish_reason) == (RequestStatus.FINISHED_BY_GUIDE, "stop")
    assert (len(request.output_token_ids), request.stop_reason) == (3, None)
    assert pool.num_held_blocks == 0


def scheduled_now(driver):
    return [(s.request.request_id, s.start, s.num_tokens) for s in driver.step().scheduled_requests]


def test_a_prompt_is_shared_with_one_that_is_admitted_in_the_same_step():
    scheduler, pool = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, 12))
    assert scheduled_now(Driver(scheduler, pool)) == [("a", 0, 12), ("b", 8, 4)]


def test_what_a_reply_filled_last_is_found_by_the_next_turn():
    scheduler, pool = make_scheduler()
    first = make_request("first", 6, max_tokens=3)
    scheduler.add(first)
    Driver(scheduler, pool).run()
    second = make_request("second", [*first.all_token_ids, 7])
    scheduler.add(second)
    Driver(scheduler, pool).run()
    assert second.num_cached_tokens == 8 == pool.num_free_cached * 4 - 4


def test_a_decode_comes_before_a_prefill_that_ran_first_and_the_prefill_takes_all_the_rest():
    scheduler, pool = make_scheduler(budget=16)
    scheduler.add(make_request("long", range(100, 200)))
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("long", 0, 16)]
    scheduler.add(make_request("short", 3, max_tokens=20))
    assert scheduled_now(driver) == [("long", 16, 8), ("short", 0, 3)]
    assert scheduled_now(driver) == [("short", 3, 1), ("long", 24, 15)]


def test_two_prompts_that_start_and_run_together_have_half_of_the_budget_each():
    scheduler, pool = make_scheduler(budget=16)
    for name, start in (("a", 100), ("b", 200)):
        scheduler.add(make_request(name, range(start, start + 40)))
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("a", 0, 8), ("b", 0, 8)]
    assert scheduled_now(driver) == [("a", 8, 8), ("b", 8, 8)]


def test_a_prompt_has_the_whole_budget_while_those_that_wait_have_no_room():
    scheduler, pool = make_scheduler(budget=16, max_num_seqs=1)
    scheduler.add(make_request("a", range(100, 140)))
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("a", 0, 16)]
    scheduler.add(make_request("b", range(200, 240)))
    assert scheduled_now(driver) == [("a", 16, 16)]


def test_a_prompt_is_cut_to_what_memory_allows_and_decodes_are_not_asked_about():
    memory = LimitedMemory(10, 6)
    scheduler, pool = make_scheduler(budget=32, memory=memory)
    scheduler.add(make_request("a", 20, max_tokens=5))
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("a", 0, 10)]
    assert scheduled_now(driver) == [("a", 10, 6)]
    assert scheduled_now(driver) == [("a", 16, 4)]
    driver.run()
    assert memory.asked == [(20, 0), (10, 10), (4, 16)]


def test_without_memory_for_a_running_prompt_decodes_go_on_and_nobody_starts():
    scheduler, pool = make_scheduler(budget=16, memory=LimitedMemory(16, 16, 0, 16))
    decode, long = make_request("decode", 4, max_tokens=9), make_request("long", range(100, 140), max_tokens=1)
    scheduler.add(decode)
    scheduler.add(long)
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("decode", 0, 4), ("long", 0, 12)]
    assert scheduled_now(driver) == [("decode", 4, 1), ("long", 12, 15)]
    scheduler.add(make_request("late", 1))
    assert scheduled_now(driver) == [("decode", 5, 1)]
    assert scheduler.short_of_memory == [long]
    assert [name for name, *_ in scheduled_now(driver)] == ["decode", "long", "late"]
    assert scheduler.short_of_memory == []
    driver.run()
    assert pool.num_held_blocks == 0


@pytest.mark.parametrize("length", [2, 12])
def test_a_prompt_that_memory_refuses_waits_with_nothing_held(length):
    scheduler, pool = make_scheduler(memory=LimitedMemory(0, 0))
    assert scheduler.short_of_memory == []
    request, behind = make_request("a", length), make_request("behind", 1)
    scheduler.add(request)
    scheduler.add(behind)
    driver = Driver(scheduler, pool)
    for _ in range(2):
        assert scheduled_now(driver) == []
        assert (list(scheduler.waiting), scheduler.running) == ([request, behind], [])
        assert scheduler.short_of_memory == [request]
        assert (request.num_computed_tokens, request.num_cached_tokens, pool.num_held_blocks) == (0, -1, 0)
    assert [name for name, *_ in scheduled_now(driver)] == ["a", "behind"]


def test_preemption_takes_everything_back_and_is_counted_by_request_and_in_all():
    scheduler, pool = make_scheduler()
    one, two = make_request("one", 10, arrival_time=1.0), make_request("two", range(50, 60), arrival_time=2.0)
    scheduler.add(one)
    scheduler.add(two)
    for _ in range(2):
        scheduler.schedule()
        for request in (two, one):
            scheduler.preempt(request)
            assert (request.status, request.num_computed_tokens) == (RequestStatus.PREEMPTED, 0)
    assert (scheduler.running, list(scheduler.waiting), pool.num_held_blocks) == ([], [one, two], 0)
    assert [request.metrics.num_preemptions for request in (one, two)] == [2, 2]
    assert scheduler.num_preemptions == 4


def test_a_preempted_request_keeps_what_it_found_at_first_and_when_that_was():
    scheduler, _ = make_scheduler()
    request = make_request("one", 10)
    scheduler.add(request)
    scheduler.schedule()
    found = (request.num_cached_tokens, request.metrics.scheduled_time)
    scheduler.preempt(request)
    assert scheduler.schedule().scheduled_requests[0].start == 8, "its own blocks are found again"
    assert (request.num_cached_tokens, request.metrics.scheduled_time) == found
    assert found[0] == 0
    assert found[1] is not None


def test_the_least_urgent_gives_way_then_the_latest_then_the_last_of_its_siblings():
    scheduler, pool = make_scheduler(num_blocks=12)
    kinds = [("urgent", -1, 5.0, 0), ("early", 0, 1.0, 0), ("late", 0, 2.0, 0), ("sibling", 0, 2.0, 1)]
    for i, (name, priority, arrival, index) in enumerate(reversed(kinds)):
        prompt = range(100 * i, 100 * i + 10)
        scheduler.add(make_request(name, prompt, 9, priority=priority, arrival_time=arrival, index=index))
    assert [request.request_id for request in scheduler.waiting] == ["urgent", "early", "late", "sibling"]
    driver = Driver(scheduler, pool)
    assert len(scheduled_now(driver)) == 4
    driver.run()
    assert [request.request_id for step in driver.steps for request in step.preempted] == ["sibling", "late"]


def test_what_must_end_for_smaller_pools_is_the_least_urgent_and_latest_and_no_more_of_it():
    scheduler, pool = make_scheduler()
    first = make_request("first", 12, arrival_time=1.0)
    second = make_request("second", [*range(8), 90, 91, 92, 93], arrival_time=2.0)
    urgent = make_request("urgent", range(200, 212), arrival_time=3.0, priority=-1)
    for request in (first, second, urgent):
        scheduler.add(request)
    scheduler.schedule()
    assert pool.num_held_blocks == 3 + 3 + 1, "two of the blocks are shared"

    def ending(num_blocks, max_num_seqs=8):
        return must_end(scheduler.running, scheduler.kv.groups, [num_blocks], max_num_seqs)

    assert ending(7) == []
    assert ending(6) == [second]
    assert ending(5) == [second, first]
    assert ending(2) == [second, first, urgent]
    assert ending(7, max_num_seqs=3) == []
    assert ending(7, max_num_seqs=2) == [second]
    assert len(scheduler.running) == 3, "it only says which"


def test_a_sequence_takes_no_blocks_that_another_keeps_room_in_until_that_one_ends():
    """Room for growth is given back by its end, and when the sequence has grown past it."""
    scheduler, pool = make_scheduler(num_blocks=64)
    first = make_request("first", 4, max_tokens=40)
    scheduler.add(first)
    driver = Driver(scheduler, pool)
    assert driver.step().scheduled_requests[0].block_tables[0].tolist() == [0]
    assert pool._state.count(RESERVED) == 10
    second = make_request("second", range(100, 104), max_tokens=8)
    scheduler.add(second)
    assert driver.step().scheduled_requests[-1].block_tables[0].tolist() == [11]
    scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    assert pool._state.count(RESERVED) == 2
    driver.run()
    assert pool._state.count(RESERVED) == 0
    third = make_request("third", range(200, 204), max_tokens=200)
    scheduler.add(third)
    while third.num_output_tokens < 150:
        driver.step()
        assert pool._state.count(RESERVED) <= 128
    driver.run()
    assert pool._state.count(RESERVED) == 0


def test_hashes_that_collide_give_nobody_anothers_blocks(monkeypatch):
    monkeypatch.setattr("engine.core.cache_groups.hash_block", lambda parent, token_ids, salt=None: b"the same")
    scheduler, pool = make_scheduler()
    requests = [make_request("a", 12), make_request("other", range(50, 62)), make_request("again", 12)]
    for request in requests:
        scheduler.add(request)
        Driver(scheduler, pool).run()
    assert [request.num_cached_tokens for request in requests] == [0, 0, 4]


def test_a_stop_token_may_be_the_first_that_min_tokens_allows():
    scheduler, pool = make_scheduler()
    request = make_request("a", 3, max_tokens=9, eos_token_ids=frozenset({1002}))
    request.params = request.params.replace(min_tokens=3)
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert (len(request.output_token_ids), request.status) == (3, RequestStatus.FINISHED_STOPPED)


def test_a_guide_that_finds_repetition_ends_its_request_and_names_the_reason():
    scheduler, pool = make_scheduler()
    guide = WaitingGuide(ends=lambda token_id: REPETITION_STOP_REASON if token_id == 1002 else None)
    request = make_request("guided", 5, 10, guide=guide)
    scheduler.add(request)
    Driver(scheduler, pool).run()
    assert (request.status, request.status.finish_reason) == (RequestStatus.FINISHED_REPETITION, "repetition")
    assert (len(request.output_token_ids), request.stop_reason) == (3, REPETITION_STOP_REASON)


def test_a_request_that_waits_for_its_guide_leaves_the_whole_budget_to_others():
    scheduler, pool = make_scheduler(budget=8)
    scheduler.add(make_request("guided", 4, 6, guide=WaitingGuide()))
    driver = Driver(scheduler, pool)
    assert scheduled_now(driver) == [("guided", 0, 4)]
    scheduler.add(make_request("long", range(100, 140)))
    assert scheduled_now(driver) == [("long", 0, 8)]


def test_the_end_of_one_request_leaves_the_siblings_of_others_waiting_for_theirs():
    scheduler, pool = make_scheduler(caching=False)
    gone, parent = make_request("gone", range(50, 62)), make_request("a", 12)
    child, orphan = make_request("a", 12, index=1), make_request("gone", range(50, 62), index=1)
    scheduler.add(gone)
    scheduler.add(parent)
    scheduler.add(child, fork_of=parent)
    scheduler.add(orphan, fork_of=gone)
    before = time.monotonic()
    scheduler.finish(gone, RequestStatus.FINISHED_ABORTED)
    assert before <= gone.metrics.finished_time <= time.monotonic()
    assert scheduled_now(Driver(scheduler, pool)) == [("a", 0, 12), ("a", 8, 4), ("gone", 0, 12)]
    assert pool.num_held_blocks == 3 + 1 + 3
    late = make_request("a", 12, index=2)
    scheduler.add(late, fork_of=parent)
    scheduler.finish(late, RequestStatus.FINISHED_ABORTED)
    assert scheduler._forks == {}, "nothing is kept of what is over"


def test_scheduling_decodes_asks_each_request_a_fixed_number_of_times(monkeypatch):
    def questions(num_requests):
        scheduler, pool = make_scheduler(num_blocks=1000, max_num_seqs=num_requests, budget=256)
        for number in range(num_requests):
            scheduler.add(make_request(str(number), range(number * 10, number * 10 + 2), max_tokens=40))
        driver = Driver(scheduler, pool)
        while sum(request.num_output_tokens > 1 for request in scheduler.running) < num_requests:
            driver.step()
        asked, num_missing = [], Scheduler._num_missing
        monkeypatch.setattr(Scheduler, "_num_missing", lambda self, r: asked.append(r) or num_missing(self, r))
        assert len(driver.step().scheduled_requests) == num_requests
        monkeypatch.undo()
        return len(asked)

    assert questions(64) == 8 * questions(8)


def test_who_comes_after_one_that_let_through_is_still_in_the_step():
    scheduler, pool = make_scheduler(num_blocks=4)
    scheduler.add(make_request("first", 3, arrival_time=1.0))
    scheduler.add(make_request("last", range(50, 55), arrival_time=3.0))
    driver = Driver(scheduler, pool)
    driver.step()
    scheduler.add(make_request("between", range(70, 71), arrival_time=2.0))
    assert [name for name, *_ in scheduled_now(driver)] == ["first", "last", "between"]
    step = driver.step()
    assert [request.request_id for request in step.preempted] == ["last"]
    assert [s.request.request_id for s in step.scheduled_requests] == ["first", "between"]
    driver.run()


def test_a_request_starts_with_the_last_token_of_the_budget():
    scheduler, pool = make_scheduler(budget=2)
    scheduler.add(make_request("a", 1))
    driver = Driver(scheduler, pool)
    driver.step()
    scheduler.add(make_request("b", range(50, 60)))
    assert scheduled_now(driver) == [("a", 1, 1), ("b", 0, 1)]


def test_a_sibling_that_waits_for_its_prompt_lets_others_pass():
    scheduler, pool = make_scheduler(budget=16)
    parent = make_request("a", 40)
    scheduler.add(parent)
    scheduler.add(make_request("a", 40, index=1), fork_of=parent)
    scheduler.add(make_request("other", range(100, 108)))
    assert scheduled_now(Driver(scheduler, pool)) == [("a", 0, 8), ("other", 0, 8)]


def test_a_request_ends_with_a_final_status_only():
    scheduler, _ = make_scheduler()
    request = make_request("a", 3)
    scheduler.add(request)
    with pytest.raises(AssertionError, match="is not final"):
        scheduler.finish(request, RequestStatus.PREEMPTED)


def test_a_request_that_finds_a_prefix_but_no_room_has_computed_nothing_yet():
    scheduler, pool = make_scheduler(num_blocks=8)
    scheduler.add(make_request("first", 12, max_tokens=1))
    driver = Driver(scheduler, pool).run()
    scheduler.add(make_request("holder", range(100, 117), max_tokens=4))
    driver.step()
    again = make_request("again", [*range(12), *range(50, 58)])
    scheduler.add(again)
    driver.step()
    assert (again.status, again.num_computed_tokens, again.num_cached_tokens) == (RequestStatus.WAITING, 0, -1)
    driver.run()
    assert again.num_cached_tokens > 0


def test_a_sequence_that_must_grow_elsewhere_gives_back_the_room_that_it_leaves():
    pool = BlockPool(12, enable_caching=False)
    group = FullAttentionGroup(pool, 4)
    mine, long, other = (make_request(name, 4, max_tokens=12) for name in ("mine", "long", "other"))
    long.max_tokens = 28
    group.allocate(mine, 4, 0)
    group.allocate(long, 32, 0)
    group.allocate(other, 4, 0)
    assert [list(group.block_table(request)) for request in (mine, long, other)] == [[0], list(range(4, 12)), [1]]
    group.free(long)
    group.allocate(mine, 8, 0)
    assert list(group.block_table(mine)) == [0, 4]
    assert [i for i in range(12) if pool._state[i] == RESERVED] == [5, 6]
    for request in (mine, other):
        group.free(request)
    assert pool._state.count(RESERVED) == 0
    assert [block.block_id for block in pool.allocate(12)] == list(range(12))


def started(driver, *requests, steps=50):
    """The names of ``requests`` in the order in which they began to run."""
    names = []
    for _ in range(steps):
        output = driver.step()
        names += [s.request.request_id for s in output.scheduled_requests if s.begins and s.request in requests]
    return names


@pytest.mark.parametrize("served_first", [True, False])
def test_the_ports_requests_and_the_notebooks_start_by_turns_and_neither_waits_behind_all_of_the_others(served_first):
    scheduler, pool = make_scheduler(max_num_seqs=1)
    served = [make_request(f"s{i}", range(10 * i, 10 * i + 3), 2, served=True, priority=-9) for i in range(8)]
    own = [make_request(f"o{i}", range(500 + 10 * i, 503 + 10 * i), 2) for i in range(4)]
    for request in (*served, *own) if served_first else (*own, *served):
        scheduler.add(request)
    assert [request.request_id for request in scheduler.waiting.in_turn()][:4] == ["o0", "s0", "o1", "s1"]
    order = started(Driver(scheduler, pool), *served, *own)
    assert order == ["o0", "s0", "o1", "s1", "o2", "s2", "o3", "s3", "s4", "s5", "s6", "s7"]


def test_where_only_one_kind_waits_it_starts_in_the_order_of_arrival_whatever_had_the_last_turn():
    scheduler, pool = make_scheduler(max_num_seqs=2)
    served = [make_request(f"s{i}", 3, 2, served=True) for i in range(6)]
    for request in served:
        scheduler.add(request)
    assert started(Driver(scheduler, pool), *served) == [f"s{i}" for i in range(6)]


@pytest.mark.parametrize("short_of", ["slots", "blocks"])
def test_the_latest_of_the_ports_gives_way_once_to_a_request_of_the_notebook_and_all_end(short_of):
    scheduler, pool = make_scheduler(
        num_blocks=64 if short_of == "slots" else 6 + RESERVED, max_num_seqs=2 if short_of == "slots" else 8
    )
    served = [
        make_request(f"s{i}", range(10 * i, 10 * i + 8), 12, served=True, arrival_time=float(i)) for i in range(2)
    ]
    for request in served:
        scheduler.add(request)
    driver = Driver(scheduler, pool)
    driver.step()
    driver.step()
    own = make_request("own", range(500, 508), 3, arrival_time=9.0)
    scheduler.add(own)
    while served[1].status is not RequestStatus.PREEMPTED:
        assert driver.step().scheduled_requests
    assert driver.steps[-1].preempted == [served[1]]
    output = driver.step()
    assert "own" in [scheduled.request.request_id for scheduled in output.scheduled_requests]
    assert served[1].let_through
    assert not served[0].let_through
    driver.run()
    assert [len(request.output_token_ids) for request in (*served, own)] == [12, 12, 3]
    assert pool.num_held_blocks == 0


def test_requests_of_the_notebook_one_after_the_other_never_keep_one_of_the_ports_from_its_end():
    scheduler, pool = make_scheduler(max_num_seqs=1)
    served = make_request("served", 6, 12, served=True)
    scheduler.add(served)
    driver = Driver(scheduler, pool)
    driver.step()
    done = 0
    for number in range(100):
        own = make_request(f"own {number}", range(100, 104), 3)
        scheduler.add(own)
        while not own.finished:
            driver.step()
        done += 1
        if served.finished:
            break
    assert done <= 2
    assert served.metrics.num_preemptions == 1


def test_the_notebooks_requests_preempt_none_of_their_own():
    scheduler, pool = make_scheduler(max_num_seqs=2)
    for name, served in (("own", False), ("served", True), ("waits", False)):
        scheduler.add(make_request(name, 6, 9, served=served))
    driver = Driver(scheduler, pool).run()
    assert not any(step.preempted for step in driver.steps)


def test_a_request_of_the_notebook_that_waits_for_the_devices_memory_takes_nobodys_blocks():
    scheduler, pool = make_scheduler(memory=LimitedMemory(64, 0, 0, 0, 0))
    served = make_request("served", 6, 12, served=True)
    scheduler.add(served)
    driver = Driver(scheduler, pool)
    driver.step()
    own = make_request("own", range(500, 508), 3)
    scheduler.add(own)
    for _ in range(4):
        driver.step()
        assert scheduler.short_of_memory == [own]
    driver.run()
    assert (served.metrics.num_preemptions, len(own.output_token_ids)) == (0, 3)
