"""Pages of a sliding window, as bookkeeping: what a long prompt leaves behind, and who gives way to it."""

import random

import pytest

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import FullAttentionGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.step import ScheduledRequest
from tests.engine.core.test_scheduler import Driver, make_request

BLOCK, WINDOW, CHUNK = 4, 10, 16


def make_scheduler(num_window_blocks: int) -> Scheduler:
    groups = [
        FullAttentionGroup(BlockPool(500), BLOCK),
        SlidingWindowGroup(BlockPool(num_window_blocks), BLOCK, window=WINDOW),
    ]
    return Scheduler(KVCacheManager(groups), max_num_seqs=2, max_num_batched_tokens=CHUNK)


class WindowDriver(Driver):
    """A block for every few tokens in each table, and those that the window shows are the sequence's own."""

    def check_scheduled(self, scheduled: ScheduledRequest) -> None:
        group = self.scheduler.kv.groups[1]
        for table in scheduled.block_tables:
            assert len(table) == -(-scheduled.end // BLOCK)
        first = max(0, scheduled.start - WINDOW + 1) // BLOCK
        shown = scheduled.block_tables[1][first:]
        assert set(shown) <= set(group.held_blocks(scheduled.request))
        assert len(set(shown)) == len(shown)


def run(scheduler: Scheduler, request: Request) -> Request:
    scheduler.add(request)
    WindowDriver(scheduler, scheduler.kv.groups[0].pool).run()
    for group in scheduler.kv.groups:
        group.pool.check()
        assert group.pool.num_held_blocks == 0
    return request


def test_a_long_prompt_takes_the_pages_that_it_left_behind_before_those_of_other_conversations():
    scheduler = make_scheduler(num_window_blocks=20)
    run(scheduler, make_request("first", 50))
    run(scheduler, make_request("long", range(1000, 1400)))
    assert run(scheduler, make_request("next turn", [*range(50), *range(700, 710)])).num_cached_tokens == 48


def test_a_long_reply_leaves_the_window_before_it_to_the_next_turn():
    scheduler = make_scheduler(num_window_blocks=20)
    run(scheduler, make_request("first", 50, max_tokens=200))
    run(scheduler, make_request("long", range(1000, 1400)))
    stripped = make_request("next turn", [*range(44), *range(700, 710)])
    assert run(scheduler, stripped).num_cached_tokens == 44


def test_of_a_long_prompt_its_beginning_stays_longest():
    """Which another prompt may share."""
    scheduler = make_scheduler(num_window_blocks=30)
    run(scheduler, make_request("long", range(1000, 1400)))
    assert run(scheduler, make_request("other", [*range(1000, 1032), *range(40)])).num_cached_tokens == 32


def cached_at(cached: set[int], tokens: int) -> bool:
    """Whether the pages of all positions that the token at position ``tokens`` sees, itself left out, are cached."""
    return all(position // BLOCK in cached for position in range(max(0, tokens - WINDOW + 1), tokens))


@pytest.mark.parametrize("seed", range(40))
def test_a_prefix_is_found_wherever_the_window_before_its_end_is_cached(seed: int):
    rng = random.Random(seed)
    group = SlidingWindowGroup(BlockPool(20), BLOCK, window=WINDOW)
    request = make_request("a", 40)
    group.allocate(request, 40, 0)
    group.cache_blocks(request, 40)
    cached = set(range(10))
    for index, block in enumerate(group._sequences[request].blocks):
        if rng.random() < 0.35 and block is not None:
            group.pool.uncache(block)
            cached.discard(index)
    for limit in range(41):
        ends = [end for end in range(0, limit + 1, BLOCK) if cached_at(cached, end)]
        assert group.num_cached_tokens(request, limit) == max(ends), (limit, cached)


def test_what_is_out_of_the_window_is_freed_at_the_token_that_no_longer_sees_it():
    group = SlidingWindowGroup(BlockPool(20), BLOCK, window=WINDOW)
    request = make_request("a", 40)
    group.allocate(request, 40, 0)
    for computed in range(41):
        request.num_computed_tokens = computed
        group.free_out_of_window(request)
        sees = {position // BLOCK for position in range(max(0, computed - WINDOW + 1), 40)}
        assert len(group.held_blocks(request)) == len(sees)
        assert list(group.block_table(request)[: 10 - len(sees)]) == [0] * (10 - len(sees))
        assert group.pool.num_held_blocks == len(sees)
    group.free(request)
    assert group.pool.num_held_blocks == 0
    assert group.held_blocks(request) == []


def test_completions_of_one_long_prompt_share_the_window_before_its_end():
    scheduler = make_scheduler(num_window_blocks=40)
    parent, child = (make_request("a", 30, max_tokens=6, index=i, traceless=True) for i in (0, 1))
    scheduler.add(parent)
    scheduler.add(child, fork_of=parent)
    driver = Driver(scheduler, scheduler.kv.groups[0].pool).run()
    starts = [s.start for step in driver.steps for s in step.scheduled_requests if s.request is child]
    assert starts[0] == 28
    assert child.output_token_ids == parent.output_token_ids == [1000 + i for i in range(6)]
    assert [group.pool.num_held_blocks for group in scheduler.kv.groups] == [0, 0]


def test_a_completion_that_comes_when_the_window_has_moved_on_begins_anew():
    scheduler = make_scheduler(num_window_blocks=40)
    parent = make_request("a", 30, max_tokens=60, traceless=True)
    scheduler.add(parent)
    driver = Driver(scheduler, scheduler.kv.groups[0].pool)
    while parent.num_output_tokens < 30:
        driver.step()
    child = make_request("a", 30, max_tokens=6, index=1, traceless=True)
    scheduler.add(child, fork_of=parent)
    driver.run()
    starts = [s.start for step in driver.steps for s in step.scheduled_requests if s.request is child]
    assert starts[0] == 0
    assert child.output_token_ids == [1000 + i for i in range(6)]


def test_pages_that_move_are_known_by_their_new_numbers_and_those_left_behind_by_none():
    scheduler = make_scheduler(num_window_blocks=60)
    group, request = scheduler.kv.groups[1], make_request("long", 100, max_tokens=30)
    before = group.pool.allocate(40)  # so that the sequence's pages lie high
    scheduler.add(request)
    driver = WindowDriver(scheduler, scheduler.kv.groups[0].pool)
    for _ in range(5):
        driver.step()
    group.pool.free(before)
    assert group.pool.resize(30)
    held, table = group.held_blocks(request), list(group.block_table(request))
    assert len(table) - len(held) > 10
    assert table == [0] * (len(table) - len(held)) + held
    assert max(held) < 30
    driver.run()
    assert group.pool.num_held_blocks == 0
