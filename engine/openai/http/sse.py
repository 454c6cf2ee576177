"""Server-sent events: chunks as they come, comments when nothing comes, an error event when it fails."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.openai.http.connection import Connection
from engine.openai.http.errors import ClientGoneError, describe
from engine.openai.http.lifetime import OpenRequest

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
Events = Sequence[Mapping[str, Any] | bytes]
"""What is sent at once: objects, and events that are made already (see :class:`TextEvent`)."""
_HOLE = "a text that is not known yet"


def event(data: Mapping[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: %b\n\n" % to_json(data)


class TextEvent:
    """The events that ``make`` gives for texts, of which nothing else differs: all but the text is encoded once."""

    def __init__(self, make: Callable[[str], Mapping[str, Any]], encode: Callable[[Mapping[str, Any]], bytes] = event):
        self._between = encode(make(_HOLE)).decode().split(encode_basestring(_HOLE))

    def of(self, text: str) -> bytes:
        """The event with ``text``."""
        return encode_basestring(text).join(self._between).encode()


def named_event(data: Mapping[str, Any]) -> bytes:
    """One SSE event that also carries its ``type`` as the event's name (Responses and Messages)."""
    return f"event: {data['type']}\n".encode() + event(data)


def _error_events(error: Exception) -> list[Mapping[str, Any]]:
    return [describe(error)]


def _nothing() -> None:
    return


@dataclass(frozen=True)
class StreamForm:
    """How an API writes its streams.

    ``errors`` gives the events that report a failure midway; ``left`` is called when the client
    has gone before the end.
    """

    encode: Callable[[Mapping[str, Any]], bytes] = event
    errors: Callable[[Exception], Iterable[Mapping[str, Any]]] = _error_events
    left: Callable[[], None] = _nothing
    keep_alive: bytes = KEEP_ALIVE
    end: bytes = DONE


OPENAI_FORM = StreamForm()


class EventSource(Protocol):
    """Where a stream's events come from."""

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` in this event loop whenever there may be events to take, from now on; None: nobody."""

    def take(self) -> Events | None:
        """All events there are, none yet included; None at the end. Raises what went wrong."""

    @property
    def ending(self) -> bool:
        """Whether listeners will not be called again: what is left can be taken now."""


class EventStream(Response):
    """A stream of the events of ``source`` that ends as its ``form`` says (``[DONE]`` by default).

    Headers go out at once. Events that come together are one write, which is made where they are noticed; what piles
    up for a client that reads slowly comes together later. A comment line is sent after ``keep_alive_seconds`` of
    silence. What goes wrong on the way becomes an error event; a client that leaves ends ``work``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: EventSource,
        work: OpenRequest,
        *,
        keep_alive_seconds: float,
        form: StreamForm = OPENAI_FORM,
    ) -> None:
        # X-Accel-Buffering: proxies of nginx's kind hold streams back without it.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._work = work
        self._form = form
        self._keep_alive_seconds = keep_alive_seconds
        self._last_sent = 0.0
        self._ended = False
        """Whether the end was written."""

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it all, as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with self._work:
                await self._send_events(Connection.of(scope), send)
        except ClientGoneError:
            if not self._ended:
                self._form.left()
                return
        except Exception as error:  # noqa: BLE001 - the response began: its client gets the error inside the stream
            for data in () if self._ended else self._form.errors(error):
                await self._send(send, self._form.encode(data))
        if self._form.end and not self._ended:
            await self._send(send, self._form.end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, connection: Connection | None, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            if connection is None:
                await self._pull(send)
            else:
                await self._push(connection, keeper)
        finally:
            keeper.cancel()

    async def _push(self, connection: Connection, keeper: "asyncio.Task[None]") -> None:
        """Write events where they are noticed, until there are no more. A task's turn would cost as much again."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()

        def push() -> None:
            if connection.paused or end.done():
                return
            found: list[bytes] = []
            try:
                self._ended = self._ended or self._taken(found)
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                end.set_exception(error)
            if self._ended:  # now: a client that reads again wakes it before the task that waits for the end
                keeper.cancel()
            if body := b"".join(found):  # an empty chunk would be the body's end
                self._last_sent = loop.time()
                connection.write(body)
            if self._ended and not connection.paused:  # else once the client has read it
                end.set_result(None)

        self._source.listen(push)
        connection.listen(push)
        push()
        push()  # what begins a stream hides what came before anybody listened
        try:
            await end
        finally:
            connection.listen(None)
            self._source.listen(None)

    def _taken(self, found: list[bytes]) -> bool:
        """Add what there is to send to ``found``, the end too where it is reached: whether it was."""
        source = self._source
        while events := source.take():
            found.append(self._encoded(events))
            if not source.ending:
                return False
        if events is not None:
            return False
        found.append(self._form.end)
        return True

    async def _pull(self, send: Send) -> None:
        """The same through ``send``, for any server."""
        news = asyncio.Event()
        self._source.listen(news.set)
        while (events := self._source.take()) is not None:
            if events:
                await self._send(send, self._encoded(events))
            else:
                await news.wait()
            news.clear()

    def _encoded(self, events: Events) -> bytes:
        if len(events) == 1 and isinstance(event := events[0], bytes):  # as nearly always
            return event
        encode = self._form.encode
        return b"".join([event if isinstance(event, bytes) else encode(event) for event in events])

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait = self._last_sent + self._keep_alive_seconds - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                await self._send(send, self._form.keep_alive)
