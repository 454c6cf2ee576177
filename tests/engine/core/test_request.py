"""A request as the scheduler sees it: its counts, its limits, and what of it says how full the pools are."""

import pytest

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import FullAttentionGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import RequestStatus, check_length
from engine.errors import ContextLengthError
from tests.engine.core.stand_ins import WaitingGuide
from tests.engine.core.test_scheduler import make_request


@pytest.mark.parametrize(("prompt", "asked"), [(5, 5), (9, 1), (9, None), (1, 9)])
def test_a_prompt_and_what_is_asked_for_may_fill_the_context(prompt, asked):
    check_length(prompt, asked, 10)


@pytest.mark.parametrize(
    ("prompt", "asked", "param", "total"),
    [(5, 6, "max_tokens", 11), (9, 2, "max_tokens", 11), (10, None, "prompt", 11), (12, 3, "prompt", 15)],
)
def test_one_token_more_is_refused_with_the_numbers_and_the_field_to_change(prompt, asked, param, total):
    with pytest.raises(ContextLengthError) as refused:
        check_length(prompt, asked, 10)
    error = refused.value
    assert (error.param, error.num_prompt, error.asked, error.limit) == (param, prompt, asked or 1, 10)
    assert f"requested {asked or 1} output tokens" in str(error)
    assert f"at least {prompt} input tokens, for a total of at least {total} tokens" in str(error)


def test_tokens_in_flight_count_and_the_last_one_may_be_among_them():
    request = make_request("a", 4, max_tokens=2, guide=WaitingGuide())
    counts = []
    for pending in (0, 1):
        request.num_pending = pending
        counts.append(
            (request.num_tokens, request.num_output_tokens, request.guide_waits, request.last_token_in_flight)
        )
    request.append_output_token(7)
    counts.append((request.num_tokens, request.num_output_tokens, request.guide_waits, request.last_token_in_flight))
    assert counts == [(4, 0, False, False), (5, 1, True, False), (6, 2, True, True)]
    request.guide, request.num_pending = None, 1
    assert not request.guide_waits
    request.num_pending, request.output_token_ids = 0, [7, 8]
    assert not request.last_token_in_flight, "it is there"


def test_output_stands_behind_the_prompt_from_the_first_token_on_and_the_prompt_stays_as_it_was():
    request = make_request("a", 3)
    for token in (7, 8):
        request.append_output_token(token)
    assert (request.prompt_token_ids, request.output_token_ids) == ([0, 1, 2], [7, 8])
    assert request.all_token_ids == [0, 1, 2, 7, 8]
    again = make_request("b", 3, output_token_ids=[5])
    assert again.all_token_ids == [0, 1, 2, 5]
    assert again.metrics.arrival_time == again.arrival_time


def test_final_states_have_the_words_of_openai_and_vllm():
    final = {status: status.finish_reason for status in RequestStatus if status.finished}
    assert list(final.values()) == ["stop", "stop", "repetition", "length", "abort", "error"]
    waiting = (RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)
    assert [status.finish_reason for status in waiting] == [None] * 3


def test_usage_is_that_of_the_fullest_pool():
    kv = KVCacheManager([FullAttentionGroup(BlockPool(number), 4) for number in (8, 10)])
    assert kv.usage == 0
    kv.groups[1].pool.allocate(2)
    assert kv.usage == 0.2
    kv.groups[0].pool.allocate(4)
    assert kv.usage == 0.5
