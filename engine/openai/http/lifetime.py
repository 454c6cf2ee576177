"""Requests under way: a client that leaves or a port that closes ends them and frees their blocks."""

import asyncio
from collections.abc import Sequence
from types import TracebackType

from starlette.types import Receive

from engine.openai.http.errors import ClientGoneError, ServerStoppingError
from engine.runtime.stream import RequestStream


class OpenRequests:
    """The generation requests now under way. Lives in the server's event loop."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self.closing = False

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """End all of them with :class:`ServerStoppingError`, and every later one."""
        self.closing = True
        for request in list(self._open):
            request.end(ServerStoppingError())

    def add(self, request: "OpenRequest") -> None:
        """Count ``request`` from now on."""
        self._open.add(request)

    def discard(self, request: "OpenRequest") -> None:
        """Stop counting ``request``."""
        self._open.discard(request)


class OpenRequest:
    """``async with``: work for one client, ended early when the client leaves or the port closes.

    However the block ends, its streams are aborted (nothing happens to finished ones). Raises
    :class:`ClientGoneError` or :class:`ServerStoppingError` when it was ended early.
    """

    def __init__(self, registry: OpenRequests, receive: Receive, streams: Sequence[RequestStream]) -> None:
        self._registry = registry
        self._receive = receive
        self._streams = streams
        self._reason: Exception | None = None

    def end(self, reason: Exception) -> None:
        """Cancel the block; it raises ``reason``. Only the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aenter__(self) -> None:
        if self._registry.closing:
            self._abort()
            raise ServerStoppingError
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._registry.add(self)
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._registry.discard(self)
        self._watcher.cancel()
        self._abort()
        if self._reason is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise self._reason from None

    def _abort(self) -> None:
        for stream in self._streams:
            stream.abort()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(ClientGoneError())
