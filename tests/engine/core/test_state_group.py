"""Slots and checkpoints of recurrent states, as bookkeeping: which slot is read, written, kept, found again."""

import random

import pytest

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import GENERATION_PROMPT_TOKENS, FullAttentionGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request, RequestStatus
from engine.core.scheduler import Scheduler
from engine.core.state_group import StateGroup
from engine.core.step import SchedulerOutput
from tests.engine.core.test_scheduler import Driver, make_request

BLOCK = 4


def make_hybrid(num_slots=6, *, budget=64, caching=True, max_num_seqs=4, num_pages=200):
    """Pages and states, as in a model that mixes attention with recurrent layers."""
    pages = FullAttentionGroup(BlockPool(num_pages, enable_caching=caching), BLOCK)
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
    return [(s.start, s.end) for step in driver.steps for s in step.scheduled_requests if s.request is request]


def next_turn(request: Request, *, stripped: bool = False, max_tokens: int = 4) -> Request:
    """The prompt, the reply (``stripped``: another, behind another opening) and a new question."""
    length = request.num_prompt_tokens
    said = [*request.prompt_token_ids[:-4], *range(600, 630)] if stripped else request.all_token_ids
    return make_request(f"after {length}", [*said, *range(500 + length, 520 + length)], max_tokens=max_tokens)


def test_the_second_turn_starts_within_the_reply_that_it_repeats():
    scheduler, _ = make_hybrid()
    first = make_request("first", 50, max_tokens=30)
    run(scheduler, first)
    second = next_turn(first)
    run(scheduler, second)
    assert second.num_cached_tokens == (50 + 30 - 1) // BLOCK * BLOCK == 76


@pytest.mark.parametrize("length", [GENERATION_PROMPT_TOKENS + BLOCK, 14, 21, 50])
def test_the_second_turn_of_a_short_chat_hits_where_the_template_strips_the_thought(length: int):
    """The last tokens of the first prompt, which open the thought, are not in the second."""
    scheduler, _ = make_hybrid()
    first = make_request("first", length, max_tokens=30)
    run(scheduler, first)
    second = next_turn(first, stripped=True)
    run(scheduler, second)
    assert second.num_cached_tokens == (length - GENERATION_PROMPT_TOKENS) // BLOCK * BLOCK > 0


def test_a_long_reply_keeps_one_checkpoint_of_its_own_and_no_pass_is_spent_on_it():
    scheduler, states = make_hybrid(num_slots=8)
    others = [make_request(str(i), range(1000 * i, 1000 * i + 50), max_tokens=1) for i in range(1, 5)]
    run(scheduler, *others)
    long = make_request("long", 50, max_tokens=200)
    driver = run(scheduler, long)
    assert [end - start for start, end in shares_of(driver, long)] == [40, 10, *[1] * 199]
    assert states.pool.num_free_cached == 4 + 2
    for other in others:
        turn = next_turn(other)
        run(scheduler, turn)
        assert turn.num_cached_tokens == 40


@pytest.mark.parametrize("stripped", [False, True], ids=["reply kept", "reply stripped"])
@pytest.mark.parametrize("num_slots", [2, 3, 4, 6])
def test_every_turn_of_a_chat_hits_in_few_slots_and_after_others_have_filled_them(num_slots: int, stripped: bool):
    scheduler, states = make_hybrid(num_slots, max_num_seqs=1)
    run(scheduler, *[make_request(str(i), range(1000 * i, 1000 * i + 50)) for i in range(1, 9)])
    assert states.pool.num_free_cached == num_slots - 1
    before = make_request("first", 50, max_tokens=12)
    run(scheduler, before)
    for _ in range(12):
        request = next_turn(before, stripped=stripped, max_tokens=12)
        run(scheduler, request)
        prompt_end = (before.num_prompt_tokens - GENERATION_PROMPT_TOKENS) // BLOCK * BLOCK
        reply_end = (before.num_tokens - 1) // BLOCK * BLOCK
        assert request.num_cached_tokens in (prompt_end, reply_end)
        last, before = before, request
    assert (request.num_cached_tokens > last.num_prompt_tokens) == (not stripped and num_slots > 3)


def test_a_checkpoint_costs_no_copy_the_sequence_goes_on_in_another_slot():
    scheduler, _ = make_hybrid()
    request = make_request("one", 50, max_tokens=3)
    driver = run(scheduler, request)
    assert shares_of(driver, request) == [(0, 40), (40, 50), (50, 51), (51, 52)]
    tables = [scheduled.block_tables[1] for step in driver.steps for scheduled in step.scheduled_requests]
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
    tables = [scheduled.block_tables[1] for step in driver.steps for scheduled in step.scheduled_requests]
    assert [table[0] == checkpoint for table in tables] == [True, *[False] * (len(tables) - 1)]
    assert all(table[1] != checkpoint for table in tables)


@pytest.mark.parametrize("num_own", [1, 5, 12, 40])
def test_a_prefix_that_two_requests_share_gets_a_checkpoint_for_the_third(num_own: int):
    """However short their own questions are."""
    scheduler, _ = make_hybrid()
    common = list(range(48))
    requests = [make_request(str(i), [*common, *range(1000 * i, 1000 * i + num_own)]) for i in range(1, 5)]
    for request in requests:
        run(scheduler, request)
    # What opens a reply is not counted as shared: with one token of its own, not even the first turn ends so late.
    shared = min(48, (48 + num_own - GENERATION_PROMPT_TOKENS) // BLOCK * BLOCK)
    first = 0 if num_own > GENERATION_PROMPT_TOKENS else shared
    assert [request.num_cached_tokens for request in requests] == [0, first, shared, shared]


def test_a_shared_prefix_outlives_the_turns_of_chats_that_begin_with_it():
    scheduler, _ = make_hybrid(num_slots=5)
    chats = [make_request(str(i), [*range(48), *range(1000 * i, 1000 * i + 20)]) for i in range(1, 3)]
    run(scheduler, chats[0])
    run(scheduler, chats[1])
    for i in range(5):
        other = make_request("other", [*range(48), *range(5000 + 100 * i, 5020 + 100 * i)])
        run(scheduler, other)
        assert other.num_cached_tokens == 48
        chats = [next_turn(chat) for chat in chats]
        run(scheduler, chats[0])
        run(scheduler, chats[1])


def test_a_prompt_with_no_boundary_before_what_opens_the_reply_leaves_no_checkpoint():
    scheduler, states = make_hybrid()
    request = make_request("short", GENERATION_PROMPT_TOKENS + BLOCK - 1, max_tokens=1)
    assert shares_of(run(scheduler, request), request) == [(0, 11)]
    assert states.pool.num_free_cached == 0


def test_while_sequences_hold_most_slots_no_pass_is_spent_on_short_prompts():
    """Their checkpoints would not last until the next turn."""
    scheduler, _ = make_hybrid(num_slots=5)
    short = [make_request(str(i), range(100 * i, 100 * i + 15), max_tokens=9) for i in range(1, 5)]
    driver = run(scheduler, *short)
    assert [shares_of(driver, request)[0][1] % 100 for request in short] == [4, 4, 4, 15]


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
    steps = [[scheduled.request for scheduled in step.scheduled_requests] for step in driver.steps]
    assert again in steps[0]
    assert again.num_cached_tokens == 40

    scheduler, states = make_hybrid(num_slots=2, max_num_seqs=2)
    run(scheduler, make_request("first", 50))
    states.pool.resize(1)
    again = make_request("again", 50)
    run(scheduler, again)
    assert (again.num_cached_tokens, len(again.output_token_ids)) == (40, 4)
    assert states.pool.num_free_cached == 0  # it went on in its checkpoint's slot


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
    scheduler, states = make_hybrid(num_slots=5, budget=32)
    requests = [make_request(str(i), [*range(40), *range(i * 97, i * 97 + 7 * i)], max_tokens=5) for i in range(12)]
    run(scheduler, *requests)
    assert all(len(request.output_token_ids) == 5 for request in requests)
    assert (states._states, states._targets) == ({}, {})


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
    second = next_turn(first, stripped=True)
    driver = run(scheduler, second)
    assert second.num_cached_tokens == 144 == (190 - GENERATION_PROMPT_TOKENS) // 48 * 48
    lengths = {
        len(table) for step in driver.steps for scheduled in step.scheduled_requests for table in scheduled.block_tables
    }
    assert len(lengths) > 2
    other = make_request("other", [*range(140), *range(900, 950)])
    run(scheduler, other)
    assert other.num_cached_tokens == 0


class StatesDriver(Driver):
    """A fake model whose state is the tokens that it has seen: every read is checked against the sequence."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler, scheduler.kv.groups[0].pool)
        self.slots: dict[int, list[int]] = {}

    def step(self) -> SchedulerOutput:
        output = super().step()
        decodes = [s for s in output.scheduled_requests if s.num_tokens == 1 and s.start >= s.request.num_prompt_tokens]
        calls = [decodes, *([scheduled] for scheduled in output.scheduled_requests if scheduled not in decodes)]
        for call in calls:
            read = [self.slots.get(scheduled.block_tables[1][0]) for scheduled in call]
            for scheduled, state in zip(call, read, strict=True):
                tokens = [*scheduled.request.prompt_token_ids, *range(1000, 1200)]
                assert scheduled.start == 0 or state == tokens[: scheduled.start], f"another state at {scheduled.start}"
                self.slots[scheduled.block_tables[1][1]] = tokens[: scheduled.end]
        return output


@pytest.mark.parametrize("seed", range(30))
def test_every_step_reads_the_state_of_exactly_the_tokens_before_it(seed: int):
    """Chats in few slots and pages: shared beginnings, replies kept and stripped, n, preemption, abort, resize."""
    rng = random.Random(seed)
    num_slots = rng.choice([1, 2, 3, 4, 6, 9])
    scheduler, states = make_hybrid(
        num_slots, budget=rng.choice([8, 24, 64]), max_num_seqs=min(num_slots, 4), num_pages=rng.choice([40, 60, 200])
    )
    driver, chats, hits = StatesDriver(scheduler), [], 0
    for i in range(60):
        if chats and rng.random() < 0.6:
            request = next_turn(rng.choice(chats), stripped=rng.random() < 0.5, max_tokens=rng.randrange(1, 20))
        else:
            own = range(2000 + 100 * i, 2000 + 100 * i + rng.randrange(1, 40))
            request = make_request(str(i), [*range(rng.choice([0, 8, 30])), *own], max_tokens=rng.randrange(1, 20))
        if request.num_prompt_tokens > 110:
            continue
        scheduler.add(request)
        if rng.random() < 0.2:
            twin = make_request("twin", request.prompt_token_ids, max_tokens=request.max_tokens, index=1)
            scheduler.add(twin, fork_of=request)
        for _ in range(rng.randrange(40)):
            driver.step()
        if rng.random() < 0.1:
            scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.1:
            _resize(driver, states, rng)
        if request.status is RequestStatus.FINISHED_LENGTH:
            chats.append(request)
            hits += request.num_cached_tokens > 0
    driver.run()
    for group in scheduler.kv.groups:
        group.pool.check()
        assert group.pool.num_held_blocks == 0
    assert hits or num_slots == 1


def _resize(driver: StatesDriver, states: StateGroup, rng: random.Random) -> None:
    for request in driver.scheduler.running:
        states.free_out_of_window(request)
    held = states.pool.num_held_blocks
    moves = states.pool.resize(max(held, driver.scheduler.max_num_seqs, rng.randrange(1, 10)))
    moved = {new: driver.slots.get(old) for old, new in moves.items()}
    driver.slots |= {slot: state for slot, state in moved.items() if state is not None}


@pytest.mark.parametrize("max_tokens", [2, 30])
@pytest.mark.parametrize("num_slots", [3, 6])
def test_three_slots_are_enough_for_a_reply_that_the_next_turn_repeats(num_slots: int, max_tokens: int):
    """One is the prompt's checkpoint, one the reply's, which may lie at the prompt's very end, and one is in use."""
    scheduler, _ = make_hybrid(num_slots)
    first = make_request("first", 52, max_tokens=max_tokens)
    run(scheduler, first)
    second = next_turn(first)
    run(scheduler, second)
    assert second.num_cached_tokens == (52 + max_tokens - 1) // BLOCK * BLOCK


def test_a_prefix_counts_as_shared_from_the_smallest_number_of_tokens_on():
    for num_shared, third_finds in ((12, 0), (16, 16)):
        scheduler, _ = make_hybrid()
        requests = [make_request(str(i), [*range(num_shared), *range(1000 * i, 1000 * i + 40)]) for i in range(1, 4)]
        for request in requests:
            run(scheduler, request)
        assert [request.num_cached_tokens for request in requests] == [0, 0, third_finds]


def test_two_that_begin_at_one_checkpoint_in_one_step_need_one_slot_each():
    scheduler, _ = make_hybrid(num_slots=3)
    run(scheduler, make_request("first", 50))
    driver = run(scheduler, *(make_request(name, 50) for name in ("one", "two")))
    assert [scheduled.start for scheduled in driver.steps[0].scheduled_requests] == [40, 40]


def test_two_equal_prompts_side_by_side_leave_one_checkpoint():
    scheduler, states = make_hybrid(num_slots=3)
    driver = run(scheduler, *(make_request(name, 50, max_tokens=1) for name in ("one", "two")))
    assert scheduler.num_preemptions == 0
    assert len(driver.steps[1].scheduled_requests) == 2
    assert states.pool.num_free_cached == 1


def test_a_checkpoint_outlives_its_reader_where_another_slot_is_left():
    scheduler, states = make_hybrid(num_slots=3, max_num_seqs=2)
    run(scheduler, make_request("first", 50))
    long, again = make_request("long", range(3000, 3004), max_tokens=60), make_request("again", 50, max_tokens=1)
    scheduler.add(long)
    scheduler.add(again)
    driver = Driver(scheduler, scheduler.kv.groups[0].pool)
    while not again.finished:
        driver.step()
    assert not long.finished
    assert states.pool.num_free_cached > 0
    third = make_request("third", 50)
    scheduler.add(third)
    driver.run()
    assert (again.num_cached_tokens, third.num_cached_tokens) == (40, 40)


class SlotDriver(Driver):
    """Of models that have states only: a table is the slot to read and the slot to write."""

    def check_scheduled(self, scheduled) -> None:
        assert len(scheduled.block_tables[0]) == 2


def test_a_model_of_states_only_finds_the_reply_that_the_next_turn_repeats():
    states = StateGroup(BlockPool(6), BLOCK, min_tokens=8)
    scheduler = Scheduler(KVCacheManager([states]), max_num_seqs=4, max_num_batched_tokens=64)
    first = make_request("first", 50, max_tokens=30)
    scheduler.add(first)
    SlotDriver(scheduler, states.pool).run()
    turn = next_turn(first)
    scheduler.add(turn)
    SlotDriver(scheduler, states.pool).run()
    assert turn.num_cached_tokens == 76
    assert states.pool.num_held_blocks == 0


def test_completions_of_one_prompt_begin_apart_where_there_are_states():
    scheduler, _ = make_hybrid()
    parent, child = make_request("a", 20, max_tokens=3), make_request("a", 20, max_tokens=3, index=1)
    scheduler.add(parent)
    scheduler.add(child, fork_of=parent)
    driver = Driver(scheduler, scheduler.kv.groups[0].pool).run()
    assert shares_of(driver, parent)[0] == (0, 12)
    assert shares_of(driver, child)[0] == (12, 20), "the checkpoint is found as a prefix"
    assert [request.output_token_ids for request in (parent, child)] == [[1000, 1001, 1002]] * 2


def test_hashes_that_collide_give_nobody_anothers_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.core.cache_groups.hash_block", lambda parent, token_ids, salt=None: b"the same")
    states = StateGroup(BlockPool(6), BLOCK, min_tokens=8)
    scheduler = Scheduler(KVCacheManager([states]), max_num_seqs=4, max_num_batched_tokens=64)
    requests = [make_request("first", 50, 1), make_request("other", range(70, 120), 1), make_request("again", 50, 1)]
    for request in requests:
        scheduler.add(request)
        SlotDriver(scheduler, states.pool).run()
    assert [request.num_cached_tokens for request in requests] == [0, 0, 40]


def test_held_slots_are_the_one_in_use_and_the_checkpoint_that_is_read():
    scheduler, states = make_hybrid()
    run(scheduler, make_request("first", 50))
    checkpoint = next(iter(states.pool._evictable))
    request = make_request("again", 50)
    assert states.held_blocks(request) == []
    scheduler.add(request)
    scheduler.schedule()
    held = states.held_blocks(request)
    assert len(held) == 2
    assert checkpoint in held
    assert held == sorted(states.block_table(request))
    scheduler.kv.free_out_of_window(request)
    assert states.held_blocks(request) == [states.block_table(request)[1]]
    assert states.block_table(request) == states.held_blocks(request) * 2


def test_while_sequences_hold_most_slots_a_pass_is_counted_from_what_is_there_or_kept_anyway():
    """From the checkpoint that a prompt begins at, and from the one of a shared prefix."""
    for before, length, chunks in (
        (make_request("before", 16, max_tokens=1), 20, [(8, 20)]),
        (make_request("before", [*range(16), *range(900, 940)], max_tokens=1), 28, [(0, 16), (16, 28)]),
    ):
        scheduler, _ = make_hybrid(num_slots=5)
        run(scheduler, before)
        others = [make_request(str(i), range(100 * i, 100 * i + 3), max_tokens=9) for i in range(1, 4)]
        request = make_request("request", length, max_tokens=1)
        assert shares_of(run(scheduler, *others, request), request) == chunks


def test_a_turn_that_begins_at_its_own_checkpoint_needs_no_earlier_one_of_what_it_shares_with_others():
    scheduler, states = make_hybrid(num_slots=8)
    first = make_request("first", 50)
    run(scheduler, first)
    run(scheduler, make_request("other", [*range(16), *range(1000, 1040)]))
    shared = states._checkpoint(first, 16)
    assert not states._checkpoints[shared].expendable
    run(scheduler, make_request("again", 50))  # which leaves none of its own
    assert states._checkpoints[shared].expendable
