"""Snapshots of a running engine: taken on its own thread between two steps, asked for from any other."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from engine.core.request import Request, RequestStatus
from engine.runtime.activity import CACHED, FREE, SHARED, Activity, BlockMap, RequestActivity
from engine.runtime.llm_engine import LLMEngine

T = TypeVar("T")
PATIENCE = 0.05
"""Seconds to wait for a new snapshot while there is an older one: a step can take long."""


class SnapshotPoller(Generic[T]):
    """The latest snapshot of the engine. Any thread may ask; nobody waits long, and the engine is never locked.

    ``take`` makes one on the engine's thread; ``post`` hands a command to the engine's thread.
    """

    def __init__(self, post: Callable[[Callable[[LLMEngine], None]], None], take: Callable[[LLMEngine], T]) -> None:
        self._post = post
        self._take = take
        self._lock = threading.Lock()
        self._asked: Future[T] | None = None
        self._latest: T | None = None

    def latest(self, first: Callable[[Callable[[LLMEngine], T]], T]) -> T:
        """A new snapshot if the engine gives one within :data:`PATIENCE`, else the one before.

        The very first is waited for through ``first``.
        """
        with self._lock:
            if self._latest is None:
                self._latest = first(self._take)
                return self._latest
            self._wait(0)
            if self._asked is None:
                self._ask()
            self._wait(PATIENCE)
            return self._latest

    def _wait(self, patience: float) -> None:
        if self._asked is None:
            return
        try:
            self._latest = self._asked.result(patience)
        except TimeoutError:
            return
        self._asked = None

    def _ask(self) -> None:
        asked = self._asked = Future[T]()

        def command(engine: LLMEngine) -> None:
            try:
                asked.set_result(self._take(engine))
            except Exception as error:  # noqa: BLE001  (whoever asked gets it)
                asked.set_exception(error)

        self._post(command)


def snapshot_activity(engine: LLMEngine) -> Activity:
    """All requests under way, in order of arrival, and the engine's counters."""
    now = time.monotonic()
    return Activity(
        requests=tuple(_request(requests, now) for requests in engine.requests()),
        stats=engine.stats(),
        rates=engine.throughput.recent(now),
        second=int(now),
    )


def snapshot_blocks(engine: LLMEngine) -> BlockMap:
    """Every block of the first group (the one that grows with a sequence) and its holder."""
    group = engine.scheduler.kv.groups[0]
    states = group.pool.states()
    owners = np.choose(states, [FREE, CACHED, SHARED, SHARED]).astype(np.int32)
    running = engine.requests()
    for index, requests in enumerate(running):
        for request in requests:
            held = np.array(group.held_blocks(request), dtype=np.int64)
            owners[held[states[held] == group.pool.HELD]] = index
    names = tuple(requests[0].request_id for requests in running)
    return BlockMap(group.pool.num_blocks, group.block_size, owners, names)


def _request(requests: Sequence[Request], now: float) -> RequestActivity:
    """A request from its completions; the first one has the prompt's story."""
    first = requests[0]
    unfinished = [request for request in requests if not request.finished]
    num_output = sum(len(request.output_token_ids) for request in requests)
    rates = [request.metrics.decode_rate(len(request.output_token_ids)) for request in requests]
    known = [rate for rate in rates if rate is not None]
    return RequestActivity(
        request_id=first.request_id,
        state=_state(unfinished),
        num_prompt_tokens=first.num_prompt_tokens,
        num_computed_tokens=max(request.num_computed_tokens for request in requests),
        num_cached_tokens=first.num_cached_tokens if first.num_cached_tokens >= 0 else None,
        num_output_tokens=num_output,
        tokens_per_second=sum(known) if known else None,
        time_to_first_token=first.metrics.time_to_first_token,
        age=now - first.arrival_time,
        thinking=any(request.guide is not None and request.guide.thinking for request in unfinished),
        params=first.params,
    )


def _state(unfinished: Sequence[Request]) -> str:
    statuses = {request.status for request in unfinished}
    if RequestStatus.RUNNING in statuses:
        return "running"
    return "preempted" if RequestStatus.PREEMPTED in statuses else "waiting"
