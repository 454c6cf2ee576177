"""What the engine shows of itself: requests under way, blocks by holder, speed; and ending any request."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.core.block_pool import BlockPool
from engine.runtime.activity import CACHED, FREE, SHARED, THROUGHPUT_SECONDS, Throughput
from engine.runtime.snapshot import PATIENCE, SnapshotPoller
from tests.engine.test_live_settings import COUNTING, PROMPT, SLOW, wait_until

LONG = "word " * 40 + PROMPT


def test_requests_are_told_with_their_state_and_speed(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=200)
    streams = [llm.submit_prompt(PROMPT, params, request_id=name) for name in ("one", "two")]
    wait_until(lambda: any(request.num_output_tokens > 4 for request in llm.activity().requests))
    activity = llm.activity()
    running, waiting = activity.requests
    assert (activity.num_running, activity.num_waiting) == (1, 1)
    assert (running.request_id, running.state, running.prompt_share) == ("one", "running", 1.0)
    assert running.tokens_per_second is not None
    assert 0 < running.tokens_per_second < 1 / SLOW
    assert running.time_to_first_token is not None
    assert (waiting.request_id, waiting.state, waiting.num_cached_tokens) == ("two", "waiting", None)
    assert (running.place, waiting.place) == (None, 1)
    assert sum(rate.generation_tokens for rate in activity.rates) >= running.num_output_tokens
    for stream in streams:
        stream.abort()
    wait_until(lambda: not llm.activity().requests)


def test_the_cached_share_of_a_prompt_is_told(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    llm.generate(LONG, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    stream = llm.submit_prompt(LONG, SamplingParams(temperature=0, max_tokens=100))
    wait_until(lambda: any(request.num_output_tokens for request in llm.activity().requests))
    share = llm.activity().requests[0].cached_share
    assert share is not None
    assert 0.5 < share < 1
    assert llm.activity().stats.prefix_hits > 0
    stream.abort()


def test_tokens_found_in_the_cache_are_not_counted_as_computed(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING)
    params = SamplingParams(temperature=0, max_tokens=2)
    first = llm.generate(LONG, params)[0]
    computed = llm.stats().prompt_tokens
    assert computed == len(first.prompt_token_ids)
    second = llm.generate(LONG, params)[0]
    assert second.num_cached_tokens > 0
    assert llm.stats().prompt_tokens - computed == len(second.prompt_token_ids) - second.num_cached_tokens
    by_source = {
        sample.labels["source"]: sample.value
        for family in llm.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_by_source_total"
    }
    assert by_source["local_compute"] == llm.stats().prompt_tokens
    assert by_source["local_cache_hit"] == second.num_cached_tokens


def test_abort_ends_one_request_and_no_other(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    params = SamplingParams(temperature=0, max_tokens=50)
    one, two = (llm.submit_prompt(PROMPT, params, request_id=name) for name in ("one", "two"))
    llm.abort("one")
    llm.abort("no such request")
    assert one.result().outputs[0].finish_reason == "abort"
    assert len(two.result().outputs[0].token_ids) == 50


def test_every_block_has_its_holder_and_blocks_of_several_are_shared(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    assert set(llm.block_map().owners.tolist()) == {FREE}
    params = SamplingParams(temperature=0, max_tokens=200)
    llm.generate(LONG, params.replace(max_tokens=2), use_tqdm=False)
    wait_until(lambda: (llm.block_map().owners == CACHED).sum() >= 2)
    cached = (llm.block_map().owners == CACHED).sum()
    streams = [llm.submit_prompt(LONG, params, request_id=name) for name in ("one", "two")]
    wait_until(lambda: sum(request.num_output_tokens > 3 for request in llm.activity().requests) == 2)
    wait_until(lambda: llm.block_map().request_ids == ("one", "two"))
    blocks = llm.block_map()
    assert blocks.num_blocks == len(blocks.owners) == llm.plan.num_blocks
    assert (blocks.owners == SHARED).sum() == cached
    assert (blocks.owners == 0).any()
    assert (blocks.owners == 1).any()
    for stream in streams:
        stream.abort()


def test_a_long_step_keeps_nobody_waiting(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=0.5)
    llm.activity()
    stream = llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=100))
    wait_until(lambda: llm.stats().num_running == 1)
    before = time.monotonic()
    for _ in range(3):
        llm.activity()
    assert time.monotonic() - before < 3 * PATIENCE + 1.2, "each look would have taken a step"
    stream.abort()


@pytest.mark.parametrize("pause", [0.0, 0.7])
def test_a_look_is_never_older_than_the_step_under_way(
    scripted_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    step = 0.2
    llm = scripted_llm(COUNTING, step_seconds=step)
    llm.activity()
    stream = llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=100))
    told = 0
    deltas = iter(stream)
    for _ in range(3):
        before = time.monotonic()
        while time.monotonic() - before < pause or not told:
            told += len(next(deltas).token_ids)
        activity, blocks = llm.activity(), llm.block_map()
        assert sum(request.num_output_tokens for request in activity.requests) >= told - 1
        assert 0 <= max(activity.age, blocks.age) < 2 * step
        assert (blocks.owners == 0).any()
    monkeypatch.setattr("engine.runtime.snapshot.INTEREST", 0.0)  # nobody asked lately: it is waited for
    llm.activity()
    assert llm.activity().age == 0
    stream.abort()


def test_many_threads_may_look_at_once(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=0.001)
    stream = llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=300))
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(llm.block_map().num_blocks)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [llm.plan.num_blocks] * 8
    stream.result()


def test_throughput_forgets_what_is_long_past() -> None:
    throughput = Throughput()
    throughput.add(10.2, 5, 1)
    throughput.add(10.9, 0, 1)
    throughput.add(11.1, 0, 0)
    throughput.add(12.0, 0, 3)
    assert [(rate.second, rate.prompt_tokens, rate.generation_tokens) for rate in throughput.recent(13)] == [
        (10, 5, 2),
        (12, 0, 3),
    ]
    assert [rate.second for rate in throughput.recent(10 + THROUGHPUT_SECONDS)] == [12]


def test_states_of_a_pool_agree_with_its_books() -> None:
    pool = BlockPool(10)
    one = pool.allocate(3)
    pool.share(one[:1])
    pool.cache(one[2], b"hash", [1])
    pool.free(one[1:])
    names = {BlockPool.FREE: "free", BlockPool.CACHED: "cached", BlockPool.HELD: "held", BlockPool.SHARED: "shared"}
    assert [names[state] for state in pool.states().tolist()[:4]] == ["shared", "free", "cached", "free"]
    assert np.count_nonzero(pool.states() == BlockPool.CACHED) == pool.num_free_cached


@pytest.mark.parametrize("architecture", ["gemma3_text"])
def test_windows_and_other_groups_are_seen_too(tiny_model_dir: Callable[..., object], architecture: str) -> None:
    with LLM(str(tiny_model_dir(architecture)), max_model_len=256, gpu_memory_utilization=0.2) as llm:
        llm.generate([[5, 6, 7] * 20], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert len(llm.block_map().owners) == llm.block_map().num_blocks


def test_a_snapshot_that_takes_long_is_taken_the_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cost, taken = 100.0, 0.0, 0

    def take(engine):
        nonlocal clock, taken
        clock, taken = clock + cost, taken + 1
        return Throughput()

    class Thread:
        def watch(self, before_step):
            self.before_step = before_step

        def post(self, command):
            command(None)

    monkeypatch.setattr("engine.runtime.snapshot.time.monotonic", lambda: clock)
    for seconds, most in ((0.0, 9 / PATIENCE * 2), (0.2, 9 / 0.2 * 0.06)):
        thread, taken, cost = Thread(), 0, seconds
        poller = SnapshotPoller(thread, take)
        poller.latest()
        end = clock + 9  # within the time in which a question makes snapshots worth taking
        while clock < end:
            clock += 0.001
            thread.before_step(None)
        assert 1 < taken <= most + 2
