"""A block pool: what is said of its blocks, and becoming larger or smaller while sequences hold some. No model."""

import random

import pytest

from engine.core.block_pool import BlockPool, hash_block
from engine.core.cache_groups import FullAttentionGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request
from engine.core.state_group import StateGroup
from engine.memory.cache_spec import FullAttentionSpec, SharedSpec, SlidingWindowSpec, StateSpec
from engine.params.sampling_params import SamplingParams


def contents(blocks):
    return [block.token_ids for block in blocks]


def fill(pool, count, start=0):
    """Held blocks with known contents."""
    blocks = pool.allocate(count)
    for i, block in enumerate(blocks, start):
        pool.cache(block, hash_block(None, [i]), [i])
    return blocks


def test_held_blocks_move_into_the_part_that_stays_and_neighbours_stay_neighbours():
    pool = BlockPool(40)
    front, back = pool.allocate(20), fill(pool, 8, start=100)
    pool.free(front[:12])
    pool.share(back[:2])
    moves = pool.resize(20)
    pool.check()
    assert sorted(moves) == list(range(20, 28))
    numbers = [block.block_id for block in back]
    assert numbers == [moves[i] for i in range(20, 28)] == list(range(numbers[0], numbers[0] + 8))
    assert [block.ref_count for block in back] == [2, 2] + [1] * 6
    assert contents(back) == [(i,) for i in range(100, 108)]
    assert pool.find_cached(hash_block(None, [103]), [103]) is back[3]
    assert pool.num_free_blocks == 20 - 16


def test_a_pool_that_grew_has_empty_blocks_and_forgets_nothing():
    pool = BlockPool(4)
    blocks = fill(pool, 4)
    pool.free(blocks)
    assert pool.resize(9) == {}
    pool.check()
    assert (pool.num_free_blocks, pool.num_free_cached) == (9, 4)
    assert [block.block_id for block in pool.allocate(5)] == [4, 5, 6, 7, 8]


def test_fewer_blocks_than_are_held_is_our_mistake():
    pool = BlockPool(8)
    fill(pool, 5)
    with pytest.raises(AssertionError, match="4 blocks are too few for 5"):
        pool.resize(4)


def test_room_that_was_reserved_in_the_part_given_up_can_still_be_released():
    pool = BlockPool(16)
    reserved = pool.reserve(2, 12)
    pool.resize(5)
    pool.release(reserved)
    assert len(pool.allocate(5)) == 5
    pool.check()


@pytest.mark.parametrize("seed", range(20))
def test_after_any_history_of_sizes_the_books_hold(seed):
    rng = random.Random(seed)
    pool, held, number = BlockPool(30), [], 0
    for _ in range(60):
        action = rng.choice(["take", "free", "resize"])
        if action == "take" and pool.num_free_blocks:
            count = rng.randint(1, pool.num_free_blocks)
            held.append(fill(pool, count, start=number))
            number += count
        elif action == "free" and held:
            pool.free(held.pop(rng.randrange(len(held))))
        elif action == "resize":
            before = [contents(blocks) for blocks in held]
            pool.resize(rng.randint(max(1, pool.num_held_blocks), 60))
            assert [contents(blocks) for blocks in held] == before
        pool.check()
        numbers = [block.block_id for blocks in held for block in blocks]
        assert len(set(numbers)) == len(numbers) == pool.num_held_blocks
        assert all(number < pool.num_blocks for number in numbers)


def test_each_block_that_must_move_goes_to_the_first_gap_that_holds_it_and_its_neighbours():
    for leaving, moved in (([10, 11], {10: 4, 11: 5}), ([9, 11], {9: 1, 11: 4})):
        pool = BlockPool(12)
        blocks = pool.allocate(12)
        pool.free([blocks[i] for i in (1, 4, 5, *sorted({8, 9, 10, 11} - set(leaving)))])
        assert pool.resize(8) == moved
        pool.check()
        assert [blocks[i].block_id for i in leaving] == list(moved.values())


@pytest.mark.parametrize(("old", "new"), [(4, 9), (9, 4), (5, 5)])
def test_a_pool_has_as_many_blocks_as_it_was_given(old, new):
    pool = BlockPool(old)
    pool.resize(new)
    assert (pool.num_blocks, pool.num_free_blocks, len(pool.states())) == (new, new, new)
    assert [block.block_id for block in pool.allocate(new)] == list(range(new))
    assert not pool.can_allocate(1)


def test_a_blocks_state_is_free_cached_held_or_shared():
    pool = BlockPool(7)
    held, shared, cached = pool.allocate(2), fill(pool, 2), fill(pool, 1, start=5)
    pool.share(shared)
    pool.share(shared[:1])
    pool.free(cached)
    expected = [pool.HELD] * 2 + [pool.SHARED] * 2 + [pool.CACHED] + [pool.FREE] * 2
    assert pool.states().tolist() == expected
    assert pool.states().dtype.itemsize == 1
    pool.free(shared)
    pool.free(shared[:1])
    pool.free(held)
    assert pool.states().tolist() == [pool.FREE] * 2 + [pool.HELD] * 2 + [pool.CACHED] + [pool.FREE] * 2
    assert len({pool.FREE, pool.CACHED, pool.HELD, pool.SHARED}) == 4


def test_a_pool_whose_cache_is_reset_finds_nothing_and_held_blocks_stay_held():
    pool = BlockPool(6)
    held, cached = fill(pool, 2), fill(pool, 2, start=5)
    pool.free(cached)
    pool.reset_cache()
    pool.check()
    assert [pool.find_cached(hash_block(None, [i]), [i]) for i in (0, 1, 5, 6)] == [None] * 4
    assert (pool.num_held_blocks, pool.num_free_cached, pool.num_free_blocks) == (2, 0, 4)
    assert [block.block_id for block in pool.allocate(4)] == [2, 3, 4, 5]
    pool.cache(held[0], hash_block(None, [0]), [0])
    assert pool.find_cached(hash_block(None, [0]), [0]) is held[0]


@pytest.mark.parametrize("evict_first", [False, True])
def test_a_sequences_end_is_evicted_before_its_beginning_and_before_or_after_all_others(evict_first):
    pool = BlockPool(5)
    others, mine = fill(pool, 2, start=50), fill(pool, 3)
    pool.free(others)
    pool.free(mine, evict_first=evict_first)
    order = [block.block_id for block in pool.allocate(5)]
    assert order == ([4, 3, 2, 1, 0] if evict_first else [1, 0, 4, 3, 2])


def test_only_blocks_that_are_held_can_be_cached_and_their_hashes_have_16_bytes():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError, match="is not held"):
        pool.cache(block, hash_block(None, [0]), [0])
    assert {len(hash_block(parent, [1, 2])) for parent in (None, b"0" * 16)} == {16}


def test_block_tables_follow_the_blocks_that_move():
    group = FullAttentionGroup(BlockPool(20, enable_caching=False), 4)
    first, second = Request("first", [1] * 40, SamplingParams()), Request("second", [2] * 12, SamplingParams())
    for request in (first, second):
        group.allocate(request, request.num_tokens, 0)
    table = group.block_table(second)
    group.free(first)
    moves = group.pool.resize(6)
    assert moves
    assert table is group.block_table(second), "whoever holds a request's table sees it change"
    assert list(table) == [block.block_id for block in group._sequences[second].blocks if block is not None]
    assert set(table) == set(moves.values())


def test_a_table_says_0_for_what_lies_behind_a_window_also_where_other_blocks_moved():
    group = SlidingWindowGroup(BlockPool(20, enable_caching=False), 4, window=8)
    first, second = Request("first", [1] * 28, SamplingParams()), Request("second", [2] * 40, SamplingParams())
    for request in (first, second):
        group.allocate(request, request.num_tokens, 0)
    group.free(first)
    second.num_computed_tokens = 32
    group.free_out_of_window(second)
    assert group.pool.resize(6)
    table = list(group.block_table(second))
    assert table[:6] == [0] * 6
    assert table[6:] == [block.block_id for block in group._sequences[second].blocks[6:]]
    assert len(table) == 10


def test_each_kind_of_memory_has_its_group_with_as_many_blocks_as_are_planned():
    specs = [FullAttentionSpec((0,), 1), SlidingWindowSpec((1,), 1, window=9), StateSpec((2,), state_bytes=5)]
    for caching in (True, False):
        kv = KVCacheManager.of_specs(zip(specs, (3, 4, 5), strict=True), enable_caching=caching)
        assert [type(group) for group in kv.groups] == [FullAttentionGroup, SlidingWindowGroup, StateGroup]
        assert [group.pool.num_blocks for group in kv.groups] == [3, 4, 5]
        assert [group.pool.enable_caching for group in kv.groups] == [caching] * 3
        assert [group.block_size for group in kv.groups] == [spec.block_size for spec in specs]
        assert kv.groups[1].window == 9
    with pytest.raises(AssertionError, match="no bookkeeping for 1 blocks of kind shared"):
        KVCacheManager.of_specs([(SharedSpec((0,)), 1)], enable_caching=True)
