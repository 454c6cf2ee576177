"""A client's connection as streams write to it: at once, from wherever their text was made, without a task's turn."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

_STATE = "vm_magic.connection"


class Connection:
    """The body of a response in chunks, as HTTP/1.1 frames them. Lives in the server's event loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.paused = False
        """Whether the client reads more slowly than is written: what comes now should wait."""
        self._transport = transport
        self._listener: Callable[[], None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Self | None:
        """The connection of a request; None where another server runs the application, or chunks are not understood."""
        found = scope.get("state", {}).get(_STATE)
        return found if isinstance(found, cls) and scope["http_version"] == "1.1" else None

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


class PortProtocol(H11Protocol):  # type: ignore[misc]
    """HTTP as uvicorn speaks it; a request's ``state`` reaches its :class:`Connection`."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self._connection = Connection(transport)
        self.app_state: dict[str, Any] = {**self.app_state, _STATE: self._connection}

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        self._connection.paused = True

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().resume_writing()
        self._connection.resume()
