"""Work on several threads ahead of what takes its results."""

import threading
import time

import pytest

from engine.runner.load.host_work import in_order


def test_results_come_in_order_whoever_is_first() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number * number

    found = list(in_order(work, range(30), lambda _: 1, threads=4, most_bytes=100))
    assert found == [(number, number * number) for number in range(30)]


def test_several_threads_work_at_once() -> None:
    together = threading.Barrier(3)
    found = in_order(lambda _: together.wait(5), range(3), lambda _: 1, threads=3, most_bytes=10)
    assert len(list(found)) == 3


@pytest.mark.parametrize(("most", "at_once"), [(10, 2), (4, 1), (1000, 8)])
def test_what_waits_is_bounded_in_bytes_and_in_number(most: int, at_once: int) -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun.append(number)
        return number

    ahead = []
    for number, _ in in_order(work, range(20), lambda _: 5, threads=4, most_bytes=most):
        time.sleep(0.005)
        ahead.append(len(begun) - number)
    assert max(ahead) <= at_once
    assert sorted(begun) == list(range(20))


def test_a_large_item_goes_alone() -> None:
    sizes = {0: 1, 1: 1000, 2: 1}
    found = in_order(lambda item: item, [0, 1, 2], sizes.__getitem__, threads=2, most_bytes=10)
    assert [item for item, _ in found] == [0, 1, 2]


def test_what_work_raises_comes_out_in_its_turn_and_ends_the_threads() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("the third")
        return number

    before = threading.active_count()
    found = in_order(work, range(9), lambda _: 1, threads=2, most_bytes=10)
    assert [next(found), next(found)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert threading.active_count() == before


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    done: list[int] = []
    found = in_order(done.append, range(1000), lambda _: 1, threads=2, most_bytes=10)
    next(found)
    found.close()
    assert threading.active_count() == before
    assert len(done) < 10


def test_nothing_to_do_is_done() -> None:
    assert list(in_order(str, [], lambda _: 1, threads=2, most_bytes=10)) == []
