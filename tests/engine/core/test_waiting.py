"""Requests that wait: in which order, for whom, and what is kept of them."""

import random

from engine.core.waiting import WaitingQueue
from tests.engine.core.test_scheduler import Driver, make_request, make_scheduler


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


def test_the_order_is_kept_where_many_ended_while_they_waited():
    waiting, rng = WaitingQueue(), random.Random(5)
    requests = [make_request(str(i), 4, arrival_time=rng.random()) for i in range(400)]
    for request in requests:
        waiting.add(request)
    for request in rng.sample(requests, 330):
        waiting.remove(request)
    assert waiting.own.num_entries < 400
    left, order = list(waiting), []
    while (request := waiting.first()) is not None:
        waiting.remove(request)
        order.append(request)
    assert order == left == sorted(left, key=lambda request: request.arrival_time)
    assert len(order) == 70


def test_who_looks_is_told_in_which_order_both_kinds_start_whosever_turn_it_is():
    waiting = WaitingQueue()
    for name, served in (("o0", False), ("s0", True), ("s1", True), ("s2", True)):
        waiting.add(make_request(name, 4, served=served))
    for served_next, order in ((False, ["o0", "s0", "s1", "s2"]), (True, ["s0", "o0", "s1", "s2"])):
        waiting.served_next = served_next
        assert [request.request_id for request in waiting.in_turn()] == order


def test_nothing_is_kept_of_siblings_that_ended_while_they_stood_aside():
    waiting = WaitingQueue()
    parent, *siblings = (make_request("a", 4, index=index) for index in range(3))
    for sibling in siblings:
        waiting.add_aside(sibling, parent)
    waiting.remove(siblings[0])
    waiting.release(parent)
    assert (list(waiting), waiting.num_aside) == ([siblings[1]], 0)
    waiting.add_aside(siblings[1], parent)
    waiting.remove(siblings[1])
    assert (len(waiting), waiting._aside, waiting._parents) == (0, {}, {})
