"""Threads that wait for each other, and what an interrupt may leave with the main thread."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tqdm import tqdm

from engine import handover
from engine.handover import Answer, BackgroundThread, Bell, free_logging, interruptible
from engine.llm import LLM
from tests.engine.faults.calls import Interrupts
from tests.engine.faults.scenes import assert_goes_on

LIMIT = 60.0


def elsewhere(action: Any) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_an_answer_is_given_to_all_who_wait_and_to_who_comes_late() -> None:
    answer, found = Answer[int](), list[int]()
    waiting = [elsewhere(lambda: found.append(answer.result())) for _ in range(3)]
    assert not answer.wait(0.01)
    assert not answer.done
    answer.set_result(7)
    for thread in waiting:
        thread.join(LIMIT)
    assert [*found, answer.result()] == [7] * 4
    assert answer.wait(0)


def test_an_error_is_raised_to_each_even_if_it_is_a_time_out() -> None:
    answer = Answer[int]()
    answer.set_exception(TimeoutError("its own"))
    for _ in range(2):
        with pytest.raises(TimeoutError, match="its own"):
            answer.result()


def test_a_ring_between_listening_and_waiting_is_heard_and_one_before_is_not() -> None:
    bell = Bell()
    bell.ring()
    heard = bell.listen()
    assert not bell.wait(heard, 0.01)
    heard = bell.listen()
    bell.ring()
    assert bell.wait(heard, 0)


def test_who_waits_in_vain_leaves_nothing() -> None:
    answer = Answer[int]()
    for _ in range(50):
        assert not answer.wait(0.001)
    assert not answer._bell.waiting


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    handler, root = logging.NullHandler(), logging.getLogger("engine")
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)


def others_can_log(handler: logging.Handler) -> bool:
    def log() -> None:
        logging.getLogger(f"of {time.monotonic()}").error("asks for the module's lock")
        with handler.lock or threading.Lock():
            pass

    thread = elsewhere(log)
    thread.join(0.3)
    return not thread.is_alive()


def take(handler: logging.Handler) -> None:
    """As an interrupt leaves them that falls between ``acquire`` and ``try``."""
    logging._lock.acquire()  # type: ignore[attr-defined]
    logging._lock.acquire()  # type: ignore[attr-defined]
    handler.acquire()


def test_locks_of_logging_that_nobody_uses_are_given_back(handler: logging.Handler) -> None:
    take(handler)
    assert not others_can_log(handler)
    thread = elsewhere(free_logging)  # only who has them may
    thread.join(LIMIT)
    assert not others_can_log(handler)
    free_logging()
    assert others_can_log(handler)


def test_locks_of_logging_that_are_in_use_stay(handler: logging.Handler) -> None:
    class Asking(logging.Handler):
        free = True

        def emit(self, record: logging.LogRecord) -> None:
            free_logging()
            assert self.lock is not None
            self.free = not self.lock._is_owned()  # type: ignore[attr-defined]

    asking, logger = Asking(), logging.getLogger("asking")
    logger.addHandler(asking)
    logger.error("something")
    logger.removeHandler(asking)
    assert not asking.free


def test_an_engine_and_its_port_go_on_after_such_an_interrupt(tiny_model_dir: Any, handler: logging.Handler) -> None:
    folder = str(tiny_model_dir("llama", num_hidden_layers=2))
    take(handler)
    with LLM(folder, max_model_len=256, gpu_memory_utilization=0.5) as llm:
        for action in (llm.stats, lambda: llm.serve(port=0, no_api_key=True), llm.server and llm.server.stop):
            take(handler)
            logging.getLogger("engine").setLevel(logging.getLogger("engine").level)  # forgets what is enabled
            if action:
                action()
        take(handler)
        assert_goes_on(llm, folder)
        take(handler)
    free_logging()


def test_a_thread_runs_until_it_ends_whoever_was_interrupted() -> None:
    goes_on, ended = threading.Event(), threading.Event()
    thread = BackgroundThread(lambda: (goes_on.wait(LIMIT), ended.set()), "of-a-test")
    assert not thread.is_alive()
    interrupts = Interrupts(in_locks=True)
    assert interrupts.interrupt(thread.start, 2)
    assert thread.is_alive()
    total = interrupts.count(lambda: thread.join(0.05))
    assert total > 5
    for number in range(total):
        interrupts.interrupt(lambda: thread.join(0.05), number)
        assert thread.is_alive(), interrupts.at


def test_a_thread_whose_start_was_interrupted_runs_or_never_will() -> None:
    interrupts = Interrupts(in_locks=True)
    total = interrupts.count(lambda: BackgroundThread(lambda: None, "of-a-test").start())
    assert total >= 3
    for number in range(total):
        ended, goes_on = threading.Event(), threading.Event()
        thread = BackgroundThread(lambda on=goes_on, end=ended: (on.wait(LIMIT), end.set()), "of-a-test")  # type: ignore[misc]
        interrupts.interrupt(thread.start, number)
        runs = thread.is_alive()
        goes_on.set()
        thread.join(LIMIT)
        assert ended.is_set() == runs, interrupts.at


def test_a_thread_is_over_once_joined() -> None:
    goes_on, ended = threading.Event(), threading.Event()
    thread = BackgroundThread(lambda: (goes_on.wait(LIMIT), ended.set()), "of-a-test")
    thread.start()
    thread.join(0.01)
    assert thread.is_alive()
    goes_on.set()
    thread.join(LIMIT)
    assert ended.is_set()
    assert not thread.is_alive()
    assert thread not in threading.enumerate()


def test_a_thread_that_cannot_start_says_why_and_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise RuntimeError("can't start new thread")

    for owner, name in ((threading, "_start_new_thread"), (handover._thread, "start_new_thread")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            thread = BackgroundThread(print, "of-a-test")
            with pytest.raises(RuntimeError, match="can't start new thread"):
                thread.start()
            thread.join(LIMIT)
            assert not thread.is_alive()


def test_behind_a_fork_a_thread_does_not_run() -> None:
    goes_on = threading.Event()
    thread = BackgroundThread(goes_on.wait, "of-a-test")
    thread.start()
    thread._process = -1  # as another process sees it
    assert not thread.is_alive()
    thread.join()
    goes_on.set()


def test_a_bars_lock_is_free_whoever_was_interrupted() -> None:
    bar = interruptible(tqdm)
    assert interruptible(tqdm) is bar
    assert isinstance(bar.get_lock(), type(threading.RLock()))
    assert bar.get_lock() is not tqdm.get_lock()
    assert list(bar([1, 2], disable=True)) == [1, 2]
