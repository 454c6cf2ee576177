"""Server-sent events: chunks as they come, comments when nothing comes, an error event when it fails."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.openai.errors import ClientGoneError, describe
from engine.openai.lifetime import OpenRequest

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of ``events`` that ends with ``[DONE]``.

    Headers go out at once. A comment line is sent after ``keep_alive_seconds`` of silence. What
    goes wrong on the way becomes an error event; a client that leaves ends ``work``.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any], None], work: OpenRequest, *, keep_alive_seconds: float
    ) -> None:
        # X-Accel-Buffering: proxies of nginx's kind hold streams back without it.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._work = work
        self._keep_alive_seconds = keep_alive_seconds
        self._last_sent = 0.0

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it all, as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with self._work:
                await self._send_events(send)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - the response began: its client is told inside the stream
            await self._send(send, event(describe(error)))
        await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, event(data))
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
                await self._send(send, KEEP_ALIVE)
