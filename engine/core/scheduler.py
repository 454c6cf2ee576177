"""Which tokens of which requests the next step computes.

One idea, vLLM v1's: there is no prefill and no decode phase, only ``num_computed_tokens`` catching
up with ``num_tokens`` under a token budget. Chunked prefill, prefix hits, preemption and decoding
are the same arithmetic. Steps overlap: a step may be scheduled while the last one's tokens are
still on the device (``Request.num_pending``).
"""

import time
from collections.abc import Sequence
from typing import Protocol

from engine.core.cache_groups import KVCacheGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request, RequestStatus
from engine.core.step import ScheduledRequest, SchedulerOutput
from engine.core.token_guide import COMPLETE
from engine.core.waiting import WaitingQueue, urgency


class StepMemory(Protocol):
    """What a step may use of the device's memory (:class:`engine.memory.step_cost.AdmissionControl`)."""

    def begin(self) -> None:
        """A step is being put together."""

    def affordable(self, num_tokens: int, start: int) -> int:
        """How many of ``num_tokens`` prompt tokens from position ``start`` there is memory for."""


class Scheduler:
    """First come, first served within a priority (a lower number goes first).

    A decode never waits for a prefill: running requests with one token left come first. While
    others wait, one prefill takes at most half of the budget, so that a short request behind a
    long one has its first token within two steps. A chunk that is not a prompt's last ends at a multiple of
    ``chunk_grid`` tokens where that takes no more than half of it away.

    Requests of the port's clients (``served``) and the notebook's own start by turns, so that neither kind waits behind
    all of the other's. Where the clients' hold all there is, the latest of them gives way once.
    """

    def __init__(
        self, kv: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int, memory: StepMemory | None = None,
        chunk_grid: int = 1,
    ) -> None:  # fmt: skip
        self.kv = kv
        self.memory = memory
        self.chunk_grid = chunk_grid
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Request] = []
        self.waiting = WaitingQueue()
        self.short_of_memory: list[Request] = []
        """Requests that the last step could not schedule for lack of memory; they wait."""
        self.num_preemptions = 0
        self._no_room: Request | None = None
        """The request for which the last step had no blocks."""
        self._forks: dict[Request, Request] = {}
        """Completions that have not started -> the sibling whose prompt they may share."""
        self._prefilling: set[Request] = set()
        """Running requests with more than one token to compute, while a step is put together."""

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, request: Request, fork_of: Request | None = None) -> None:
        """Queue a request. One of ``n`` completions may wait to share the blocks of its sibling's prompt."""
        if fork_of is not None:
            self._forks[request] = fork_of
        if fork_of is None or _prompt_is_computed(fork_of):
            self.waiting.add(request)
        else:
            self.waiting.add_aside(request, fork_of)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step, take blocks for it and count its tokens as computed."""
        scheduled_requests: list[ScheduledRequest] = []
        preempted: list[Request] = []
        budget = self.max_num_batched_tokens
        self.short_of_memory = []
        if self.memory is not None:
            self.memory.begin()
        self._make_way(preempted)
        if self.kv.moves_on:
            for request in self.running:  # all of them first: what one frees is another's room
                self.kv.free_out_of_window(request)
        decoding, prefilling = self._by_need()
        self._prefilling = {request for request, _ in prefilling}
        for request, missing in (*decoding, *prefilling):
            if missing and request.status is RequestStatus.RUNNING:  # else preempted for one before it
                budget -= self._schedule_running(request, min(missing, budget), scheduled_requests, preempted)
        if not preempted and not self.short_of_memory:
            self._admit(budget, scheduled_requests)
        return SchedulerOutput(scheduled_requests, preempted)

    def update(self, scheduled: ScheduledRequest, token_id: int) -> RequestStatus | None:
        """Record a sampled token; gives the final status if the request is over by its tokens.

        Tokens of requests that ended while the step was in flight are dropped (None).
        """
        request = scheduled.request
        if request.finished:
            return None
        request.num_pending -= 1
        request.append_output_token(token_id)
        # Only what this step computed: the next one is counted already, but may yet be taken back. A request that
        # gave way meanwhile does not hold it any more.
        held = scheduled.end <= request.num_computed_tokens
        if held and scheduled.end - request.num_findable_tokens >= self.kv.granularity:
            self.kv.cache_blocks(request, scheduled.end)
        status = _stop_status(request, token_id)
        if status is not None:
            self.finish(request, status)
        return status

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request now, wherever it is; its blocks are free at once. Safe to call twice."""
        if request.finished:
            return
        assert status.finished, f"{status} is not final"
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = status
        request.metrics.finished_time = time.monotonic()
        self._forks.pop(request, None)
        self.waiting.release(request)
        self.kv.free(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits, and computes its tokens again."""
        self.kv.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.served_next = request.served  # what it lost
        self.running.remove(request)
        self._prefilling.discard(request)
        self.waiting.add(request)

    def _make_way(self, preempted: list[Request]) -> None:
        """Preempt the latest request of the port's for one of the notebook that waits, has its turn and none beside it.

        Only where nothing but the port's are in its way, and each of them once: then it is let through to its end, as
        is one that had its turn while the notebook waited.
        """
        no_room, self._no_room = self._no_room, None
        own = self.waiting.own.first()
        if own is None or self.waiting.served_next or not self.running:
            return
        if len(self.running) < self.max_num_seqs and no_room is not own:
            return
        candidates = [request for request in self.running if request.served and not request.let_through]
        if candidates and all(request.served for request in self.running):
            victim = max(candidates, key=urgency)
            victim.let_through = True
            self.preempt(victim)
            self.waiting.served_next = False
            preempted.append(victim)

    def _num_missing(self, request: Request) -> int:
        return len(request.all_token_ids) + request.num_pending - request.num_computed_tokens

    def _by_need(self) -> tuple[list[tuple[Request, int]], list[tuple[Request, int]]]:
        """The running requests with the tokens they miss: those that miss one at most, which go first, and the rest."""
        decoding: list[tuple[Request, int]] = []
        prefilling: list[tuple[Request, int]] = []
        for request in self.running:
            missing = self._num_missing(request)
            (prefilling if missing > 1 else decoding).append((request, missing))
        return decoding, prefilling

    def _schedule_running(
        self, request: Request, missing: int, scheduled_requests: list[ScheduledRequest], preempted: list[Request]
    ) -> int:
        if missing <= 0 or (request.num_pending and (request.guide_waits or request.last_token_in_flight)):
            return 0
        if missing > 1:  # a decode needs no share of the budget, and no block in the middle of one
            missing = self._chunk(request, self._fair_share(request, missing))
        if not missing:
            return 0
        start = request.num_computed_tokens
        while (missing > 1 or start % self.kv.granularity == 0) and not self.kv.allocate(request, start + missing):
            victim = self._victim(scheduled_requests)
            self.preempt(victim)
            preempted.append(victim)
            if victim is request:
                return 0
        scheduled_requests.append(self._scheduled(request, missing))
        if request in self._prefilling and self._num_missing(request) <= 1:
            self._prefilling.remove(request)
        return missing

    def _fair_share(self, request: Request, missing: int) -> int:
        """At most half of the budget for one prefill while others want to start."""
        others = len(self._prefilling) > (request in self._prefilling)
        room = len(self.running) < self.max_num_seqs
        if others or (self.waiting.num_ready and room):
            return min(missing, max(1, self.max_num_batched_tokens // 2))
        return missing

    def _admit(self, budget: int, scheduled_requests: list[ScheduledRequest]) -> None:
        while budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.first()
            if request is None:
                return
            parent = self._forks.get(request)
            if parent is not None and not _prompt_is_computed(parent):  # any more: it was preempted
                self.waiting.add_aside(request, parent)
                continue
            num_tokens = self._start(request, parent, budget)
            if num_tokens == 0:
                self._no_room = None if self.short_of_memory else request
                return
            request.let_through |= request.served and self.waiting.own.first() is not None
            scheduled_requests.append(self._scheduled(request, num_tokens, begins=True))
            budget -= num_tokens

    def _start(self, request: Request, parent: Request | None, budget: int) -> int:
        """Move a waiting request to the running ones; gives the length of its first chunk, 0 if none fits."""
        cached = 0
        if parent is not None and parent.status is RequestStatus.RUNNING:
            cached = self.kv.fork(parent, request)
        cached = cached or self.kv.num_cached_tokens(request)
        request.num_computed_tokens = cached
        num_tokens = self._chunk(request, self._first_chunk(request, budget))
        if not num_tokens or not self.kv.allocate(request, cached + num_tokens, cached):
            request.num_computed_tokens = 0
            self.kv.free(request)
            return 0
        self._forks.pop(request, None)
        self.waiting.remove(request)
        self.waiting.served_next = not request.served
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = cached
            request.metrics.scheduled_time = time.monotonic()
        return num_tokens

    def _first_chunk(self, request: Request, budget: int) -> int:
        missing = min(self._num_missing(request), budget)
        if self.waiting.num_ready > 1 and missing > 1:
            return min(missing, max(1, self.max_num_batched_tokens // 2))
        return missing

    def _chunk(self, request: Request, num_tokens: int) -> int:
        """At most ``num_tokens``: up to where a group wants to keep what is there, and as memory allows."""
        start = request.num_computed_tokens
        end = start + num_tokens
        if num_tokens < self._num_missing(request) and end % self.chunk_grid <= num_tokens // 2:
            end -= end % self.chunk_grid
        num_tokens = self.kv.chunk_end(request, end) - start
        if num_tokens <= 1 or self.memory is None:
            return num_tokens
        affordable = self.memory.affordable(num_tokens, start)
        if not affordable:
            self.short_of_memory.append(request)
        return affordable

    def _scheduled(self, request: Request, num_tokens: int, *, begins: bool = False) -> ScheduledRequest:
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == len(request.all_token_ids) + request.num_pending
        pending = samples and request.num_pending > 0
        request.num_computed_tokens = end
        request.num_pending += samples
        if self.waiting.num_aside and _prompt_is_computed(request):
            self.waiting.release(request)
        if end - request.num_findable_tokens >= self.kv.granularity:
            self.kv.cache_blocks(request, end)
        tables = self.kv.block_tables(request)
        return ScheduledRequest(request, start, num_tokens, tables, samples, pending, begins)

    def _victim(self, scheduled_requests: Sequence[ScheduledRequest]) -> Request:
        """The running request that gives way: least urgent, latest come, not yet in this step."""
        chosen = {scheduled.request for scheduled in scheduled_requests}
        candidates = [request for request in self.running if request not in chosen]
        return max(candidates, key=urgency)


def _prompt_is_computed(request: Request) -> bool:
    return request.finished or request.num_computed_tokens >= request.num_prompt_tokens


def _stop_status(request: Request, token_id: int) -> RequestStatus | None:
    """Whether the token just read ends the request (stop strings are found on text, elsewhere)."""
    params = request.params
    if len(request.output_token_ids) >= params.min_tokens:
        if not params.ignore_eos and token_id in request.eos_token_ids:
            return RequestStatus.FINISHED_STOPPED
        if token_id in params.stop_token_ids:
            request.stop_reason = token_id
            return RequestStatus.FINISHED_STOPPED
    if request.guide is not None and (why := request.guide.advance(token_id)) is not None:
        request.stop_reason = None if why == COMPLETE else why
        return RequestStatus.FINISHED_BY_GUIDE if why == COMPLETE else RequestStatus.FINISHED_REPETITION
    if len(request.output_token_ids) >= request.max_tokens:
        return RequestStatus.FINISHED_LENGTH
    return None


def must_end(
    running: Sequence[Request], groups: Sequence[KVCacheGroup], sizes: Sequence[int], max_num_seqs: int
) -> list[Request]:
    """The requests of ``running`` that must end before pools of ``sizes`` blocks (by group) hold the others.

    The least urgent and latest come, as in preemption; none where all fit.
    """
    keep = sorted(running, key=urgency)
    end: list[Request] = []
    while keep and not _fit(keep, groups, sizes, max_num_seqs):
        end.append(keep.pop())
    return end


def _fit(running: Sequence[Request], groups: Sequence[KVCacheGroup], sizes: Sequence[int], max_num_seqs: int) -> bool:
    if len(running) > max_num_seqs:
        return False
    # Requests may share blocks, so each is counted once.
    held = ({block for request in running for block in group.held_blocks(request)} for group in groups)
    return all(len(blocks) <= size for blocks, size in zip(held, sizes, strict=True))
