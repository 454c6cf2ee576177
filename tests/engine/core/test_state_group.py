"""Slots and checkpoints of recurrent states, as bookkeeping: which slot is read, written, kept, found again."""

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import GENERATION_PROMPT_TOKENS, FullAttentionGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.scheduler import Scheduler
from engine.core.state_group import StateGroup
from engine.request import Request
from tests.engine.core.test_scheduler import Driver, make_request

BLOCK = 4


def make_hybrid(num_slots=6, *, budget=64, caching=True, max_num_seqs=4):
    """Pages and states, as in a model that mixes attention with recurrent layers."""
    pages = FullAttentionGroup(BlockPool(200, enable_caching=caching), BLOCK)
    states = StateGroup(BlockPool(num_slots, enable_caching=caching), BLOCK, min_tokens=8, min_shared_tokens=16)
    scheduler = Scheduler(KVCacheManager([pages, states]), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return scheduler, states


def run(scheduler: Scheduler, *requests: Request) -> Driver:
    for request in requests:
        scheduler.add(request)
    driver = Driver(scheduler, scheduler.kv.groups[0].pool).run()
    for group in scheduler.kv.groups:
        group.pool.check()
        assert group.pool.num_held_blocks == 0
    return driver


def shares_of(driver: Driver, request: Request) -> list[tuple[int, int]]:
    return [(s.start, s.end) for step in driver.steps for s in step.scheduled if s.request is request]


def test_the_second_turn_starts_from_the_end_of_the_first_prompt():
    scheduler, _ = make_hybrid()
    first = make_request("first", 50)
    run(scheduler, first)
    second = make_request("second", [*first.all_token_ids, *range(500, 520)])
    run(scheduler, second)
    assert second.num_cached_tokens == (50 - GENERATION_PROMPT_TOKENS) // BLOCK * BLOCK == 40


def test_a_turn_whose_template_strips_the_thought_hits_too():
    """The last tokens of the first prompt, which open the thought, are not in the second."""
    scheduler, _ = make_hybrid()
    first = make_request("first", 50)
    run(scheduler, first)
    second = make_request("second", [*range(50 - 4), *range(700, 730)])
    run(scheduler, second)
    assert second.num_cached_tokens == 40


def test_a_checkpoint_costs_no_copy_the_sequence_goes_on_in_another_slot():
    scheduler, _ = make_hybrid()
    request = make_request("one", 50, max_tokens=3)
    driver = run(scheduler, request)
    assert shares_of(driver, request) == [(0, 40), (40, 50), (50, 51), (51, 52)]
    tables = [share.block_tables[1] for step in driver.steps for share in step.scheduled]
    kept = tables[0][0]
    assert tables[0] == [kept, kept]
    assert tables[1][0] == kept
    assert tables[1][1] != kept
    assert tables[2] == tables[3] == [tables[1][1]] * 2


def test_a_hit_reads_the_checkpoint_once_and_never_writes_it():
    scheduler, states = make_hybrid()
    run(scheduler, make_request("first", 50))
    checkpoint = next(iter(states.pool._evictable))
    request = make_request("again", 50)
    driver = run(scheduler, request)
    tables = [share.block_tables[1] for step in driver.steps for share in step.scheduled]
    assert [table[0] == checkpoint for table in tables] == [True, *[False] * (len(tables) - 1)]
    assert all(table[1] != checkpoint for table in tables)


def test_a_prefix_that_two_requests_share_gets_a_checkpoint_for_the_third():
    scheduler, _ = make_hybrid()
    common = list(range(48))
    requests = [make_request(str(i), [*common, *range(1000 * i, 1000 * i + 40)]) for i in range(1, 4)]
    for request in requests:
        run(scheduler, request)
    assert [request.num_cached_tokens for request in requests] == [0, 0, 48]


def test_prompts_that_save_little_leave_no_checkpoint():
    scheduler, states = make_hybrid()
    request = make_request("short", 14)
    assert shares_of(run(scheduler, request), request)[0] == (0, 14)
    assert states.pool.num_free_cached == 0


def test_without_a_free_slot_the_state_is_not_kept_and_nothing_waits():
    scheduler, states = make_hybrid(num_slots=1, max_num_seqs=1)
    first, second = make_request("first", 50), make_request("second", 50)
    run(scheduler, first, second)
    assert (len(first.output_token_ids), len(second.output_token_ids)) == (4, 4)
    assert states.pool.num_free_cached == 0


def test_the_last_slot_is_taken_although_it_keeps_the_requests_own_checkpoint():
    """Nobody waits for a second slot: none where the pool has but one, none while another sequence runs."""
    scheduler, states = make_hybrid(num_slots=2, max_num_seqs=2)
    first = make_request("first", 50)
    run(scheduler, first)
    assert states.pool.num_free_cached == 1
    long, again = make_request("long", range(3000, 3004), max_tokens=40), make_request("again", 50)
    driver = run(scheduler, long, again)
    steps = [[share.request for share in step.scheduled] for step in driver.steps]
    assert again in steps[0]
    assert again.num_cached_tokens == 0

    scheduler, states = make_hybrid(num_slots=2, max_num_seqs=2)
    run(scheduler, make_request("first", 50))
    states.pool.resize(1)
    again = make_request("again", 50)
    run(scheduler, again)
    assert len(again.output_token_ids) == 4


def test_checkpoints_give_way_to_sequences_the_oldest_first():
    scheduler, states = make_hybrid(num_slots=4, max_num_seqs=2)
    for i in range(6):
        run(scheduler, make_request(str(i), range(1000 * i, 1000 * i + 50)))
    assert states.pool.num_free_cached <= 4
    newest, oldest = make_request("newest", range(5000, 5050)), make_request("oldest", 50)
    run(scheduler, newest)
    run(scheduler, oldest)
    assert (newest.num_cached_tokens, oldest.num_cached_tokens) == (40, 0)


def test_another_salt_finds_no_checkpoint_and_caching_off_takes_none():
    scheduler, _ = make_hybrid()
    run(scheduler, make_request("first", 50))
    other = make_request("other", 50, cache_salt="somebody else")
    run(scheduler, other)
    assert other.num_cached_tokens == 0
    scheduler, states = make_hybrid(caching=False)
    request = make_request("first", 50)
    assert shares_of(run(scheduler, request), request)[0] == (0, 50)
    assert states.pool.num_free_cached == 0


def test_many_requests_over_few_slots_end_with_clean_books():
    scheduler, _ = make_hybrid(num_slots=5, budget=32)
    requests = [make_request(str(i), [*range(40), *range(i * 97, i * 97 + 7 * i)], max_tokens=5) for i in range(12)]
    run(scheduler, *requests)
    assert all(len(request.output_token_ids) == 5 for request in requests)


def test_groups_of_different_block_sizes_agree_on_a_prefix():
    """Pages of 16 tokens, windows in pages of 8, states in steps of 12: all of them end every 48 tokens."""
    groups = [
        FullAttentionGroup(BlockPool(40), 16),
        SlidingWindowGroup(BlockPool(40), 8, window=20),
        StateGroup(BlockPool(6), 12, min_tokens=8),
    ]
    scheduler = Scheduler(KVCacheManager(groups), max_num_seqs=2, max_num_batched_tokens=64)
    first = make_request("first", 190)
    run(scheduler, first)
    second = make_request("second", [*first.all_token_ids, *range(500, 520)])
    driver = run(scheduler, second)
    assert second.num_cached_tokens == 144 == (190 - GENERATION_PROMPT_TOKENS) // 48 * 48
    lengths = {len(table) for step in driver.steps for share in step.scheduled for table in share.block_tables}
    assert len(lengths) > 2
    other = make_request("other", [*range(140), *range(900, 950)])
    run(scheduler, other)
    assert other.num_cached_tokens == 0
