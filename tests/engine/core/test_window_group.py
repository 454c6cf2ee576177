"""Pages of a sliding window, as bookkeeping: what a long prompt leaves behind, and who gives way to it."""

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import FullAttentionGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from tests.engine.core.test_scheduler import Driver, make_request

BLOCK, WINDOW, CHUNK = 4, 10, 16


def make_scheduler(num_window_blocks: int) -> Scheduler:
    groups = [
        FullAttentionGroup(BlockPool(500), BLOCK),
        SlidingWindowGroup(BlockPool(num_window_blocks), BLOCK, window=WINDOW),
    ]
    return Scheduler(KVCacheManager(groups), max_num_seqs=2, max_num_batched_tokens=CHUNK)


def run(scheduler: Scheduler, request: Request) -> Request:
    scheduler.add(request)
    Driver(scheduler, scheduler.kv.groups[0].pool).run()
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
