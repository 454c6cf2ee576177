"""Floors by hand: what a step reads and computes."""

import pytest

from engine.memory.cache_spec import FullAttentionSpec, SlidingWindowSpec, StateSpec
from engine.memory.roofline import DeviceSpeed, ModelWork, cache_bytes, decode_reached, prompt_reached
from engine.outputs import StepTotals

DEVICE = DeviceSpeed(bytes_per_second=100e9, flops_per_second=1e12, dtype="float32", how="by hand")


def test_a_decode_reads_all_weights_once_and_the_keys_of_its_rows() -> None:
    group = FullAttentionSpec((0, 1), 1000)
    totals = StepTotals(decodes=10, decode_seconds=1.0, rows=20, context=(5000,))
    reached = decode_reached(totals, ModelWork(dense_bytes=2 * 10**9), [group], DEVICE)
    assert reached is not None
    assert (reached.rows, reached.seconds, reached.weight_bytes) == (2.0, 0.1, 2e9)
    assert reached.cache_bytes == (5000 + 20) * 1000 / 10
    assert reached.share == pytest.approx((2e9 + 502_000) / 100e9 / 0.1)
    assert reached.bytes_per_second == pytest.approx((2e9 + 502_000) / 0.1)


def test_of_experts_only_those_are_read_that_rows_would_take_evenly() -> None:
    work = ModelWork(dense_bytes=100, expert_bytes=800, num_experts=8, chosen=2)
    assert work.weight_bytes(1) == pytest.approx(100 + 800 * 2 / 8)
    assert work.weight_bytes(2) == pytest.approx(100 + 800 * (1 - (6 / 8) ** 2))
    assert ModelWork(dense_bytes=100, expert_bytes=800, num_experts=8).weight_bytes(1) == 900, "not known: all of them"


def test_windows_are_read_as_far_as_they_reach_and_states_both_ways() -> None:
    groups = [FullAttentionSpec((0,), 10), SlidingWindowSpec((1,), 20, window=64), StateSpec((2,), state_bytes=7)]
    assert cache_bytes(groups, (300, 64, 0), 1) == (300 + 1) * 10 + (64 + 1) * 20 + 2 * 7


def test_a_long_prompt_is_bound_by_products_and_a_short_one_by_reading() -> None:
    work = ModelWork(dense_bytes=4 * 10**9, dense_products=10**9, head_products=10**8, pair_products=1000)
    group = FullAttentionSpec((0, 1, 2), 10)
    long = prompt_reached(
        StepTotals(prompts=2, prompt_seconds=4.0, prompt_tokens=1000, pairs=(500_500,)), work, [group], DEVICE
    )
    assert long is not None
    assert not long.by_memory
    assert long.flops == 2 * (1000 * 1e9 + 2 * 1e8 + 3 * 500_500 * 1000) / 2
    assert long.share == pytest.approx(long.flops / 1e12 / 2.0)
    short = prompt_reached(
        StepTotals(prompts=1, prompt_seconds=0.1, prompt_tokens=4, pairs=(10,)), work, [group], DEVICE
    )
    assert short is not None
    assert short.by_memory
    assert short.share == pytest.approx(0.04 / 0.1)


def test_without_steps_there_is_no_share() -> None:
    work = ModelWork(dense_bytes=1)
    assert decode_reached(StepTotals(), work, [], DEVICE) is None
    assert prompt_reached(StepTotals(), work, [], DEVICE) is None


def test_totals_differ_by_what_lies_between() -> None:
    before = StepTotals(decodes=1, decode_seconds=0.5, rows=2, context=(10, 5))
    after = StepTotals(decodes=3, decode_seconds=2.0, rows=6, context=(40, 9), pairs=(7, 7))
    between = after.since(before)
    assert (between.decodes, between.decode_seconds, between.rows, between.context) == (2, 1.5, 4, (30, 4))
    assert between.pairs == (7, 7)
