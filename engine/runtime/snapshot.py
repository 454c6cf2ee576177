"""Snapshots of a running engine: taken on its own thread between two steps, asked for from any other."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np

from engine.core.request import Request, RequestStatus
from engine.handover import Answer
from engine.runtime.activity import CACHED, FREE, SHARED, Activity, BlockMap, RequestActivity
from engine.runtime.callbacks import check_may_wait
from engine.runtime.engine_thread import EngineThread
from engine.runtime.llm_engine import LLMEngine

T = TypeVar("T", bound=Activity | BlockMap)
PATIENCE = 0.05
"""Seconds to wait for a new snapshot while there is one of the step before: a step can take long."""
INTEREST = 10.0
"""Seconds after a question in which snapshots are taken unasked before steps, so that the next one finds one."""
_SPARE = PATIENCE / 2
"""Shortest time between two of these: short steps are not worth one each."""
_SHARE = 0.05
"""Most of the engine's time that these may take while steps are short, where who asks has a new one soon all the same:
thousands of requests take tens of milliseconds to describe."""


class SnapshotPoller(Generic[T]):
    """The latest snapshot of the engine. Any thread may ask, and the engine is never locked.

    ``take`` makes one on the engine's thread, between two steps.
    """

    def __init__(self, thread: EngineThread, take: Callable[[LLMEngine], T]) -> None:
        self._thread = thread
        self._take = take
        self._lock = threading.Lock()
        self._asked: Answer[T] | None = None
        self._latest: tuple[float, T] | None = None
        self._cost = 0.0
        self._looked = -math.inf
        self._interest_ends = -math.inf
        thread.watch(self._before_step)

    def latest(self) -> T:
        """A new snapshot; while a step takes long, one from before that step, if somebody asked lately.

        ``age`` says how old it is. Raises EngineClosedError.
        """
        check_may_wait("activity() or block_map()")
        with self._lock:
            now = time.monotonic()
            watched, self._interest_ends = now < self._interest_ends, now + INTEREST
            if self._asked is None or self._asked.done:
                self._asked = self._ask()
            asked = self._asked
        while not asked.wait(PATIENCE):
            self._thread.check_open()
            latest = self._latest
            if watched and latest is not None:
                return replace(latest[1], age=time.monotonic() - latest[0])
        return asked.result()

    def _ask(self) -> Answer[T]:
        asked: Answer[T] = Answer()

        def command(engine: LLMEngine) -> None:
            try:
                asked.set_result(self._keep(engine))
            except BaseException as error:  # noqa: BLE001  (whoever asked gets it)
                asked.set_exception(error)

        self._thread.post(command)
        return asked

    def _before_step(self, engine: LLMEngine) -> None:
        now = time.monotonic()
        long, self._looked = now - self._looked >= PATIENCE, now
        spare = _SPARE if long else max(_SPARE, self._cost / _SHARE)
        if now < self._interest_ends and (self._latest is None or now - self._latest[0] >= spare):
            with contextlib.suppress(Exception):  # no request may fail by it; whoever asks next is told
                self._keep(engine)

    def _keep(self, engine: LLMEngine) -> T:
        began = time.monotonic()
        taken = self._take(engine)
        now = time.monotonic()
        self._latest, self._cost = (now, taken), now - began
        return taken


def snapshot_activity(engine: LLMEngine) -> Activity:
    """All requests under way, in order of arrival, and the engine's counters."""
    now = time.monotonic()
    places = {name: place for place, name in enumerate(_names(engine.scheduler.waiting.in_turn()), 1)}
    return Activity(
        requests=tuple(_request(requests, now, places) for requests in engine.requests()),
        stats=engine.stats(),
        rates=engine.throughput.recent(now),
        second=int(now),
        steps=engine.tally.totals,
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


def _names(requests: Sequence[Request]) -> Iterable[str]:
    return dict.fromkeys(request.request_id for request in requests)


def _request(requests: Sequence[Request], now: float, places: Mapping[str, int]) -> RequestActivity:
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
        place=None if _state(unfinished) == "running" else places.get(first.request_id),
    )


def _state(unfinished: Sequence[Request]) -> str:
    statuses = {request.status for request in unfinished}
    if RequestStatus.RUNNING in statuses:
        return "running"
    return "preempted" if RequestStatus.PREEMPTED in statuses else "waiting"
