"""A client's connection: streams write to it at once, without a task's turn, and nobody holds it for nothing."""

import asyncio
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Self

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.openai.http.connections import IDLE_SECONDS, LINGER_SECONDS, OpenConnections
from engine.openai.http.errors import plain_error
from engine.openai.http.options import ServerOptions

logger = logging.getLogger("engine.openai")
_STATE = "vm_magic.connection"


class Connection:
    """The body of a response in chunks, as HTTP/1.1 frames them. Lives in the server's event loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.paused = False
        """Whether the client reads more slowly than is written: what comes now should wait."""
        self.trusted = False
        """Whether a request on it brought a key, where one is asked for."""
        self._transport = transport
        self._listener: Callable[[], None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Self | None:
        """The connection of a request; None where another server runs the application, or chunks are not understood."""
        found = cls._found(scope)
        return found if scope["http_version"] == "1.1" else None

    @classmethod
    def trust(cls, scope: Scope) -> None:
        """Note that a request may be served."""
        if (found := cls._found(scope)) is not None:
            found.trusted = True

    @classmethod
    def _found(cls, scope: Scope) -> Self | None:
        found = scope.get("state", {}).get(_STATE)
        return found if isinstance(found, cls) else None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` when the client reads again, from now on; None: nobody."""
        self._listener = listener

    def write(self, body: bytes) -> None:
        """Send one chunk of a response that has begun; nothing happens once the client has left."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def resume(self) -> None:
        """The client has read what was written."""
        self.paused = False
        if self._listener is not None:
            self._listener()


class _Lingering:
    """``transport``, but that ``close`` waits for a client that still sends: else it would never read its answer."""

    def __init__(self, transport: asyncio.Transport, protocol: "PortProtocol") -> None:
        self._transport, self._protocol = transport, protocol
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is to be written."""
        return self._protocol.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close once what was written is sent, and what comes is read."""
        if self._protocol.conn.their_state is h11.SEND_BODY:
            self._protocol.linger()
        else:
            self._transport.close()


class PortProtocol(H11Protocol):  # type: ignore[misc]
    """HTTP as uvicorn speaks it; a request's ``state`` reaches its :class:`Connection`.

    A request must come within ``request_seconds``, and what was written must be read within ``stalled_seconds``.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self._transport = transport
        self.transport = _Lingering(transport, self)
        self._connection = Connection(transport)
        self.app_state: dict[str, Any] = {**self.app_state, _STATE: self._connection}
        self._options, self._all = _of_application(self.config.app)
        self._asks = False
        """Whether a part of a request has come, but no answer is due."""
        self._since = self.loop.time()
        """When the connection began to be idle, or to ask."""
        self._full_since: float | None = None
        self._last_since: float | None = None
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._all.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        if self.lingers:
            return
        if not self._asks and not self._answers:
            self._asks, self._since = True, self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """The last byte of a response was written."""
        unread = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        self._asks, self._since = unread, self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or more of it than a request may be."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", HTTPStatus.BAD_REQUEST)
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE and b"\n" not in self.conn.trailing_data[0]:
            status = HTTPStatus.REQUEST_URI_TOO_LONG
        self._answer_last(status, f"{msg.rstrip('.')}: {error}." if error is not None else msg)

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        self._connection.paused = True
        self._full_since = self.loop.time()

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().resume_writing()
        self._full_since = None
        self._connection.resume()

    @property
    def rank(self) -> tuple[bool, float] | None:
        """See :class:`Watched`."""
        trusted = self._connection.trusted
        return None if self.lingers or (trusted and self._answers) else (trusted, self._since)

    @property
    def lingers(self) -> bool:
        """See :class:`Watched`."""
        return self._last_since is not None

    def refuse(self) -> None:
        """See :class:`Watched`."""
        message = f"All {self._all.limit} connections are busy; try again later, or serve with more: --max-connections."
        self._answer_last(HTTPStatus.SERVICE_UNAVAILABLE, message)

    def drop(self) -> None:
        """See :class:`Watched`."""
        self._last_since = self._last_since or self.loop.time()
        self._transport.abort()

    def linger(self) -> None:
        """Nothing more is written, and what comes is thrown away."""
        if self._last_since is None and not self._transport.is_closing():
            self._last_since = self.loop.time()
            self._unset_keepalive_if_required()
            self._transport.resume_reading()
            try:
                self._transport.write_eof()
            except OSError:  # the client left just now
                self._transport.abort()

    def check(self, now: float) -> None:
        """See :class:`Watched`."""
        options = self._options
        if self._last_since is not None or self._transport.is_closing():
            self._last_since = self._last_since or now
            most = options.stalled_seconds if self._transport.get_write_buffer_size() else LINGER_SECONDS
            if now - self._last_since > most:
                self._transport.abort()
        elif self._full_since is not None and now - self._full_since > options.stalled_seconds:
            logger.warning("a client that reads nothing was dropped after %.0f s", options.stalled_seconds)
            self.drop()
        elif self._answers:
            return
        elif self._asks and now - self._since > options.request_seconds:
            message = f"The request was not complete after {options.request_seconds:g} seconds."
            self._answer_last(HTTPStatus.REQUEST_TIMEOUT, message)
        elif now - self._since > max(IDLE_SECONDS, options.request_seconds) + 1:
            self._transport.close()

    @property
    def _answers(self) -> bool:
        """Whether an answer is due."""
        return self.cycle is not None and not self.cycle.response_complete

    def _answer_last(self, status: int, message: str) -> None:
        """Answer without the application, unless an answer has begun, and close."""
        if self.lingers or self._transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._transport.write(_whole(status, message))
        else:
            self.drop()
            return
        if self._answers:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.linger()


def _whole(status: int, message: str) -> bytes:
    response = plain_error(status, message, path="", headers={"Connection": "close"})
    head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, HTTPStatus(status).phrase.encode(), head, bytes(response.body))


def _of_application(app: Any) -> tuple[ServerOptions, OpenConnections]:
    options, connections = app.state.port.options, app.state.connections
    assert isinstance(options, ServerOptions)
    assert isinstance(connections, OpenConnections)
    return options, connections
