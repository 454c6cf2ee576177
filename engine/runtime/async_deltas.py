"""A request's deltas for ``async for``, ended where the loop over them ends."""

from collections.abc import AsyncIterator, Callable

from engine.outputs import CompletionDelta
from engine.runtime.stream import RequestStream


class AsyncDeltas(AsyncIterator[CompletionDelta]):
    """Deltas of the request that ``start`` begins, once the first is asked for.

    The request ends when the task that waits is cancelled, with :meth:`aclose`, and when nobody holds this any more: at
    once behind a ``break`` or an exception in the loop's body. An asynchronous generator would end it only when its
    event loop runs again, which in a terminal may be never.
    """

    def __init__(self, start: Callable[[], RequestStream]) -> None:
        self._start = start
        self._stream: RequestStream | None = None
        self._over = False

    async def __anext__(self) -> CompletionDelta:
        if self._over:
            raise StopAsyncIteration
        if self._stream is None:
            self._stream = self._start()
        try:
            return await anext(self._stream)
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """End the request. Safe to repeat."""
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._over = True
        if self._stream is not None:
            self._stream.abort()
