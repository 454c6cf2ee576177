"""Server-sent events: chunks as they come, comments when nothing comes, an error event when it fails."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.openai.http.errors import ClientGoneError, describe
from engine.openai.http.lifetime import OpenRequest

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


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


class EventStream(Response):
    """A stream of ``events`` that ends as its ``form`` says (``[DONE]`` by default).

    Headers go out at once. A comment line is sent after ``keep_alive_seconds`` of silence. What
    goes wrong on the way becomes an error event; a client that leaves ends ``work``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Mapping[str, Any], None],
        work: OpenRequest,
        *,
        keep_alive_seconds: float,
        form: StreamForm = OPENAI_FORM,
    ) -> None:
        # X-Accel-Buffering: proxies of nginx's kind hold streams back without it.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._work = work
        self._form = form
        self._keep_alive_seconds = keep_alive_seconds
        self._last_sent = 0.0

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it all, as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with self._work:
                await self._send_events(send)
        except ClientGoneError:
            self._form.left()
            return
        except Exception as error:  # noqa: BLE001 - the response began: its client gets the error inside the stream
            for data in self._form.errors(error):
                await self._send(send, self._form.encode(data))
        if self._form.end:
            await self._send(send, self._form.end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, self._form.encode(data))
        finally:
            keeper.cancel()

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
