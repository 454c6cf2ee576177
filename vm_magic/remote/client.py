"""HTTP to one server: an asyncio loop on a thread of its own, so that closing a stream takes effect at once.

Imports httpx; import this module inside functions.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpx

from engine.handover import BackgroundThread
from vm_magic.remote.address import RETRIED, Address, RemoteReplyError
from vm_magic.remote.wire import EventReader

T = TypeVar("T")
CONNECT_SECONDS = 10.0
READ_SECONDS = 600.0
"""Longest silence of a server, as in the OpenAI SDK: a long prompt may wait and compute that long."""
MAX_TRIES = 4
MAX_PAUSE = 20.0
_WAIT_SLICE = 0.2


class RemoteClient:
    """Requests to ``address``. Redirects are not followed: the key goes to the named server alone."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._thread = BackgroundThread(self._loop.run_forever, "vm-remote")
        self._thread.start()
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {address.key}"} if address.key else {},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=not address.is_loopback,
            follow_redirects=False,
        )
        self._lock = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``work`` on the loop; cancelling the future cancels it there."""
        with self._lock:
            if self._closed:
                work.close()
                raise self.address.unreachable(ConnectionError("the connection was closed"))
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def get(self, path: str, *, root: bool = False, timeout: float = CONNECT_SECONDS) -> httpx.Response:
        """The answer to a GET below the API's path, or below the server's root; interruptible.

        Raises RemoteConnectionError, or the error that the status means.
        """
        future = self.ask(path, root=root, timeout=timeout)
        while True:
            try:
                return future.result(timeout=_WAIT_SLICE)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
            except BaseException:
                future.cancel()
                raise

    def ask(
        self, path: str, *, root: bool = False, timeout: float = CONNECT_SECONDS
    ) -> concurrent.futures.Future[httpx.Response]:
        """:meth:`get` without waiting: returns at once, and the future raises what ``get`` does."""
        return self.begin(self._answer((self.address.root if root else self.address.base_url) + path, timeout))

    async def _answer(self, url: str, timeout: float) -> httpx.Response:
        try:
            response = await self._http.get(url, timeout=timeout)
        except httpx.HTTPError as error:
            raise self.address.unreachable(error) from None
        if response.status_code != 200:
            raise self.address.refusal(
                response.status_code, body_of(response), location=response.headers.get("location")
            )
        return response

    async def events(self, path: str, body: dict[str, Any], started: Callable[[], None]) -> AsyncIterator[Any]:
        """The events of a streamed POST. A busy server is asked again a few times, before it has begun.

        ``started()`` when the server begins to answer. Raises the errors of :class:`Address`.
        """
        for attempt in range(MAX_TRIES):
            try:
                async with self._http.stream("POST", self.address.base_url + path, json=body) as response:
                    if response.status_code == 200:
                        started()
                        async for event in self._read(response):
                            yield event
                        return
                    await response.aread()
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
                raise self.address.unreachable(error) from None
            except httpx.HTTPError as error:
                reason = self.address.hidden(str(error)) or type(error).__name__
                raise RemoteReplyError(f"the connection to {self.address.base_url} broke: {reason}") from None
            if response.status_code not in RETRIED or attempt == MAX_TRIES - 1:
                raise self.address.refusal(
                    response.status_code, body_of(response), location=response.headers.get("location")
                )
            await asyncio.sleep(_pause(response, attempt))

    async def _read(self, response: httpx.Response) -> AsyncIterator[Any]:
        reader = EventReader()
        try:
            async for line in response.aiter_lines():
                event = reader.feed(line)
                if event is not None:
                    yield event
                if reader.done:
                    return
            event = reader.close()
        except ValueError:
            raise RemoteReplyError(f"{self.address.base_url} did not send JSON; is it an OpenAI server?") from None
        if event is not None:
            yield event

    def close(self) -> None:
        """End all requests, close the connections and the loop. Safe to repeat."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()


def body_of(response: httpx.Response) -> Any:
    """The body as JSON, or as text where it is not JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(response.content)
    return "" if "<html" in response.text[:500].lower() else response.text


def _pause(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try: what the server asks for, within reason."""
    try:
        wanted = float(response.headers.get("retry-after", ""))
    except ValueError:
        wanted = 0.5 * 2**attempt
    return min(max(wanted, 0.0), MAX_PAUSE)
