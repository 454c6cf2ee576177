"""A request's deltas, handed from the engine's thread to whoever waits for them."""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from engine.handover import Bell
from engine.outputs import (
    CompletionDelta,
    CompletionOutput,
    LogprobsAtPosition,
    RequestMetrics,
    RequestOutput,
)
from engine.params.sampling_params import SamplingParams
from engine.runtime.callbacks import call_safely, callbacks, check_may_wait
from engine.runtime.interrupt import ended_by_interrupt

_WAIT_SLICE = 0.2
"""Seconds between looks for KeyboardInterrupt while a thread waits (a lock's wait ignores signals on some systems)."""


class LoopNews:
    """News for the listeners of one event loop, which is called once for all that came until it has its turn.

    The engine's thread adds and rings, the loop calls; neither ever waits for the other.
    """

    _of_loops: ClassVar["weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopNews]"] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._due: deque[Callable[[], None]] = deque()
        self._rung = False
        """Whether the loop was told and has not called yet."""

    @classmethod
    def of_running_loop(cls) -> "LoopNews":
        """The one of the loop that runs in this thread."""
        loop = asyncio.get_running_loop()
        found = cls._of_loops.get(loop)
        return cls._of_loops.setdefault(loop, cls(loop)) if found is None else found

    def add(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, once the loop is told."""
        self._due.append(listener)

    def ring(self) -> None:
        """Tell the loop, unless it was told and has yet to call: telling it is a write."""
        loop = self._loop()
        if loop is None or (self._rung and loop.is_closed()):  # what was due will never be called
            self._due.clear()
            return
        if self._rung:
            return
        self._rung = True
        # A loop that was closed has nobody left to wake; asking first would still race with its end.
        try:
            loop.call_soon_threadsafe(self._call)
        except RuntimeError:
            self._rung = False
            self._due.clear()

    def _call(self) -> None:
        self._rung = False  # before looking: who adds behind the last look rings again
        due = self._due
        listeners = deque(dict.fromkeys([due.popleft() for _ in range(len(due))]))
        try:
            while listeners:
                self._tell(listeners.popleft())
        finally:
            if listeners:  # an interrupt left the loop: the others are called once it runs again
                due.extendleft(reversed(listeners))
                self.ring()

    @staticmethod
    def _tell(listener: Callable[[], None]) -> None:
        try:
            listener()
        except Exception as error:  # noqa: BLE001 - the others' news must reach them
            context = {"message": "A listener to a request's stream failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


class RequestStream:
    """Deltas of one request, to be iterated (``for`` or ``async for``) or awaited whole by :meth:`result`.

    Any thread may call any method; one consumer at a time takes the deltas. If the request or the
    engine fails, iteration and :meth:`result` raise the error after what came before it.
    """

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams,
        abort: Callable[[], None], finish_thinking: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.prompt_logprobs: list[LogprobsAtPosition | None] | None = None
        self.num_cached_tokens = 0
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.default_thinking_budget: int | None = None
        """The live setting's, for a request that has no budget of its own."""
        self._abort = abort
        self._finish_thinking = finish_thinking
        self._lock = threading.RLock()
        self._changed, self._ended = Bell(), Bell()
        self._deltas: deque[CompletionDelta] = deque()
        self._outputs = [CompletionOutput(i, "", []) for i in range(params.n)]
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._over = False
        self._error: BaseException | None = None
        self._listener: tuple[LoopNews, Callable[[], None]] | None = None
        self._when_over: list[Callable[[], None]] = []

    @property
    def finished(self) -> bool:
        """Whether the engine is done with the request (deltas may still wait to be taken)."""
        return self._over

    @property
    def num_tokens(self) -> int:
        """Tokens so far, all completions together."""
        return sum(len(output.token_ids) for output in self._outputs)

    @property
    def error(self) -> BaseException | None:
        """What failed, once the request is over; None where nothing did."""
        return self._error

    def abort(self) -> None:
        """Ask the engine to end the request; its last deltas then say ``abort``. Safe to repeat."""
        if not self._over:
            self._abort()

    def finish_thinking(self) -> None:
        """End the thought now: its end marker is written for the model, and the answer follows. Safe to repeat."""
        if not self._over and self._finish_thinking is not None:
            self._finish_thinking()

    def __iter__(self) -> Iterator[CompletionDelta]:
        return self

    def __next__(self) -> CompletionDelta:
        while True:
            with self._lock:
                if self._deltas:
                    return self._deltas.popleft()
                if self._over:
                    self._raise_error()
                    raise StopIteration
                heard = self._listen(self._changed)
            self._changed.wait(heard, _WAIT_SLICE)

    def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        return self

    async def __anext__(self) -> CompletionDelta:
        while True:
            with self._lock:
                if self._deltas:
                    return self._deltas.popleft()
                if self._over:
                    self._raise_error()
                    raise StopAsyncIteration
                waiter = news_of([self])
            with ended_by_interrupt(self):
                await waiter

    def drain(self, timeout: float | None = None) -> list[CompletionDelta]:
        """All deltas there are; waits up to ``timeout`` seconds for a first one. Empty on time-out or at the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _WAIT_SLICE if deadline is None else deadline - time.monotonic()
            with self._lock:
                taken = list(self._deltas)
                self._deltas.clear()
                if not taken and self._over:
                    self._raise_error()
                if taken or self._over or left <= 0:
                    return taken
                heard = self._listen(self._changed)
            self._changed.wait(heard, min(left, _WAIT_SLICE))

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` in the running event loop whenever there is news, from now on, in place of another."""
        self._listener = None if listener is None else (LoopNews.of_running_loop(), listener)

    def take(self) -> list[CompletionDelta]:
        """All deltas there are, without waiting. Takes no lock, for which the engine's thread might have to wait."""
        deltas = self._deltas
        if len(deltas) == 1:  # as where its taker keeps up
            return [deltas.popleft()]
        return [deltas.popleft() for _ in range(len(deltas))]

    def result(self) -> RequestOutput:
        """Wait for the end and give everything, also what was iterated before."""
        while True:
            with self._lock:
                if self._over:
                    self._raise_error()
                    return self.snapshot()
                heard = self._listen(self._ended, "result()")
            self._ended.wait(heard, _WAIT_SLICE)

    def snapshot(self) -> RequestOutput:
        """Everything that came so far."""
        with self._lock:
            for output, parts in zip(self._outputs, self._texts, strict=True):
                output.text = "".join(parts)
            return RequestOutput(
                self.request_id,
                self.prompt,
                self.prompt_token_ids,
                list(self._outputs),
                self._over,
                self.prompt_logprobs,
                self.metrics,
                self.num_cached_tokens,
            )

    def put(self, delta: CompletionDelta) -> None:
        """Add a delta and wake whoever waits for one."""
        self.append(delta)
        wake_all([self])

    def append(self, delta: CompletionDelta) -> None:
        """Add a delta; whoever waits learns of it from :func:`wake_all` (the engine thread calls both)."""
        with self._lock:
            output = self._outputs[delta.index]
            self._texts[delta.index].append(delta.text)
            output.token_ids.extend(delta.token_ids)
            if delta.logprobs is not None:
                self._add_logprobs(output, delta)
            if delta.thinking_cut is not None:
                output.thinking_cut = delta.thinking_cut
            if delta.finish_reason is not None:
                output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            self._deltas.append(delta)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes (the engine thread calls this)."""
        with self._lock:
            if self._over:
                return
            self._error, self._over = error, True  # in this order, for who looks without the lock
            due, self._when_over = self._when_over, []
            self._ended.ring()
        wake_all([self])
        for callback in due:
            call_safely(callback, "what follows the end of a request")

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the request is over; at once if it is. It may use the engine, wait and fail.

        It runs on a thread that only calls such callbacks, one after the other: a slow one holds up others of them, and
        no request. What it raises is logged.
        """
        self.when_over(lambda: callbacks.call(callback))

    def when_over(self, callback: Callable[[], None]) -> None:
        """As :meth:`add_done_callback`, on the very thread that ends the request: it must be quick and never wait."""
        with self._lock:
            if not self._over:
                self._when_over.append(callback)
                return
        call_safely(callback, "what follows the end of a request")

    @staticmethod
    def _add_logprobs(output: CompletionOutput, delta: CompletionDelta) -> None:
        assert delta.logprobs is not None
        if output.logprobs is None:
            output.logprobs = []
        output.logprobs += delta.logprobs
        taken = sum(position[token].logprob for position, token in zip(delta.logprobs, delta.token_ids, strict=True))
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + taken

    @staticmethod
    def _listen(bell: Bell, what: str = "waiting for a request") -> threading.Lock:
        """For the next ring; the lock is held, so that whatever is added from here on is heard."""
        check_may_wait(what)
        return bell.listen()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def take_all(streams: Sequence[RequestStream]) -> tuple[list[tuple[int, CompletionDelta]], BaseException | None] | None:
    """The deltas that there are, with their stream's position, and what failed in one of the streams.

    None when all are at their end, and none failed.
    """
    found: list[tuple[int, CompletionDelta]] = []
    failure: BaseException | None = None
    over = True
    for position, stream in enumerate(streams):
        finished = stream._over  # before taking: nothing comes behind the end
        for delta in stream.take():
            found.append((position, delta))
        if not finished:
            over = False
        elif stream.error is not None:
            failure = stream.error
    return None if over and not found and failure is None else (found, failure)


def news_of(streams: Iterable[RequestStream]) -> "asyncio.Future[None]":
    """A future that is done once there is news of ``streams`` (see :meth:`RequestStream.listen`)."""
    waiter = asyncio.get_running_loop().create_future()

    def listener() -> None:
        if not waiter.done():
            waiter.set_result(None)

    for stream in streams:
        stream.listen(listener)
    return waiter


def wake_all(streams: Iterable[RequestStream]) -> None:
    """Tell whoever waits for news of ``streams``: an event loop once for all of them (see :class:`LoopNews`)."""
    loops: list[LoopNews] = []
    for stream in streams:
        if stream._changed.waiting:
            stream._changed.ring()
        if (known := stream._listener) is not None:
            news, listener = known
            news.add(listener)
            if news not in loops:
                loops.append(news)
    for news in loops:
        news.ring()
