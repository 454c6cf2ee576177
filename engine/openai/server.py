"""The port as a background thread of this process."""

import asyncio
import atexit
import errno
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import uvicorn
from fastapi import FastAPI

from engine.errors import ConfigError, ServerError
from engine.handover import BackgroundThread, free_logging
from engine.openai.app import create_app
from engine.openai.http.connection import PortProtocol
from engine.openai.http.connections import IDLE_SECONDS
from engine.openai.http.hub import Hub
from engine.openai.http.options import LIMITS, ServerOptions, choose_api_keys
from engine.openai.http.ring_log import RingLog
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.generation import Port

logger = logging.getLogger("engine.openai")
_LOGGERS = ("uvicorn.error", "engine.openai")
_START_SECONDS = 10.0
_GRACE_SECONDS = 1
_NUM_NEXT_PORTS = 100
_BACKLOG = 2048
_AT_ONCE = 16
"""Connections that asyncio takes from the system before it looks at any of them: each is a file already."""


class ServerHandle:
    """A server, running until :meth:`stop`; a stopped one holds no model.

    ``base_url`` ends in ``/v1``; ``hub_url`` is the same through JupyterHub, None outside of one. ``api_key`` is None
    where none is asked for, and never part of the text. ``taken_port`` is the one that was preferred, None if that is
    ``port``; ``wanted`` is what was asked of :func:`start_server`.
    """

    taken_port: int | None = None
    wanted: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, app: FastAPI, listener: socket.socket, options: ServerOptions) -> None:
        self._port: Port | None = app.state.port
        self.model: str = self._port.engine.args.names[0]
        self.max_model_len: int = self._port.engine.plan.max_model_len
        self.host = options.host
        self.port: int = listener.getsockname()[1]
        self.api_key = options.api_keys[0] if options.api_keys else None
        self.base_url = f"http://{_reachable(self.host)}:{self.port}/v1"
        hub = Hub.of_environment()
        self.hub_url = None if hub is None else hub.base_url(self.port)
        self._listener = listener
        self._log = RingLog(_LOGGERS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http=PortProtocol,
                ws="none",
                loop="asyncio",
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                timeout_keep_alive=IDLE_SECONDS,
                backlog=_AT_ONCE,
            )
        )
        self._thread = BackgroundThread(self._run, "openai-port")

    @property
    def running(self) -> bool:
        """Whether the port is open."""
        server = self._server
        return server is not None and self._thread.is_alive() and bool(server.started)

    @property
    def log_lines(self) -> list[str]:
        """The server's latest log lines, oldest first."""
        return self._log.lines

    def stop(self) -> None:
        """End open streams with an error event, close the port and its thread. Safe to repeat."""
        server, port, loop = self._server, self._port, self._loop
        if server is None or port is None:
            return
        server.should_exit = True
        if self._thread.is_alive() and loop is not None:
            _end_requests(port, loop)
            self._thread.join(_GRACE_SECONDS + 2)
        if self._thread.is_alive():
            server.force_exit = True
            self._thread.join(_GRACE_SECONDS + 2)
        self._listener.close()
        self._log.detach()
        atexit.unregister(self.stop)
        self._server = self._port = self._loop = None

    def __repr__(self) -> str:
        if not self.running:
            return f"{self.model} at {self.base_url}, closed"
        place = f"{self.base_url}, through the hub {self.hub_url}" if self.hub_url else self.base_url
        return f"{self.model} at {place} ({'the key is in .api_key' if self.api_key else 'no key'})"

    def _start(self) -> None:
        self._log.attach()
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self.running:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"The server did not start: {'; '.join(self.log_lines[-3:]) or 'no reason given'}")
            free_logging()
            time.sleep(0.002)
        self._listener.listen(_BACKLOG)  # the system's queue, which asyncio made as short as what it takes at once
        atexit.register(self.stop)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException:
            # The thread ends here: nobody else hears of it.
            logger.exception("the server thread failed")
        finally:
            self._listener.close()  # or clients would wait for an answer

    async def _serve(self) -> None:
        server = self._server
        assert server is not None, "a server runs once"
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_loop_error)
        try:
            await server.serve(sockets=[self._listener])
        finally:
            for connection in list(server.server_state.connections):
                # A client that does not read would keep its socket open for ever.
                connection.transport.abort()
            await asyncio.sleep(0)


@dataclass(frozen=True)
class WantedServer:
    """A port that may be opened: its options, and the numbers that will do, the first free one of them."""

    options: ServerOptions
    ports: range

    def bind(self, replaced: ServerHandle | None) -> socket.socket:
        """A listening socket; ``replaced`` closes first where it has one of these ports and the host is right."""
        if replaced is not None and replaced.port in self.ports:
            self.check(replaced)
            replaced.stop()
        return _listen(self.options.host, self.ports)

    def check(self, replaced: ServerHandle | None) -> None:
        """Raise what :meth:`bind` would; keeps nothing and closes nothing."""
        takes_over = replaced is not None and replaced.port in self.ports
        _listen(self.options.host, range(1) if takes_over else self.ports).close()


def start_server(llm: ServedEngine, *, replaced: ServerHandle | None = None, **wanted: Any) -> ServerHandle:
    """Serve ``llm`` as ``wanted`` (see :func:`want_server`) until ``stop()``.

    ``replaced``, a server that runs now, closes as soon as the new one can open. Raises ConfigError for bad
    options, ServerError for a port that cannot be opened; both leave it alone.
    """
    port = want_server(**wanted)
    listener = port.bind(replaced)
    handle = None
    try:
        handle = ServerHandle(create_app(llm, port.options), listener, port.options)
        handle.wanted = MappingProxyType(wanted)
        handle.taken_port = port.ports[0] if port.ports[0] not in (0, handle.port) else None
        handle._start()
        if replaced is not None:
            replaced.stop()
    except BaseException:  # an interrupt too: whoever meets it has no handle to stop
        if handle is not None:
            handle.stop()
        listener.close()
        raise
    return handle


def want_server(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | Sequence[str] | None = None,
    no_api_key: bool = False,
    port_is_default: bool = False,
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    root_path: str = "",
    enable_request_id_headers: bool = False,
    enable_log_requests: bool = False,
    trust_request_chat_template: bool = False,
    enable_force_include_usage: bool = False,
    exclude_tools_when_tool_choice_none: bool = False,
    enable_tokenizer_info_endpoint: bool = False,
    **limits: Any,
) -> WantedServer:
    """Check the options of a server on ``host:port`` (0: a free one). Raises ConfigError for bad ones.

    Without ``api_key`` the key is ``VLLM_API_KEY`` or a random one; ``no_api_key`` opens the port,
    on loopback only. ``port_is_default`` says that the user did not choose the port: the next free
    one is taken. ``limits``: the other fields of :class:`ServerOptions`, in seconds, bytes and counts.
    """
    unknown = limits.keys() - LIMITS
    if unknown:
        raise TypeError(f"no such option of the port: {', '.join(sorted(unknown))}")
    options = ServerOptions(
        host=host,
        api_keys=choose_api_keys(api_key, no_api_key=no_api_key),
        allowed_origins=tuple(allowed_origins),
        allowed_hosts=tuple(allowed_hosts),
        root_path=root_path,
        enable_request_id_headers=enable_request_id_headers,
        enable_log_requests=enable_log_requests,
        trust_request_chat_template=trust_request_chat_template,
        enable_force_include_usage=enable_force_include_usage,
        exclude_tools_when_tool_choice_none=exclude_tools_when_tool_choice_none,
        enable_tokenizer_info_endpoint=enable_tokenizer_info_endpoint,
        **limits,
    )
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must be from 0 to 65535", flag="port", value=port, allowed="0 to 65535")
    last = min(port + _NUM_NEXT_PORTS, 65535) if port_is_default and port else port
    return WantedServer(options, range(port, last + 1))


def _end_requests(port: Port, loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.call_soon_threadsafe(port.open_requests.close)
    except RuntimeError:  # the loop closed just now, so nothing is open any more
        logger.debug("the server's loop was closed already")


def _listen(host: str, ports: range) -> socket.socket:
    """A listening socket, made here so that a taken port is one clear error."""
    for port in ports:
        try:
            return _bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise _port_error(host, port, error) from None
    raise AssertionError("the last port returns or raises")


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    # With the protocol named, asyncio switches Nagle's delay off: 0.5 instead of 44 ms per request.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _port_error(host: str, port: int, error: OSError) -> ServerError:
    if error.errno == errno.EADDRINUSE:
        return ServerError(
            f"Port {port} on {host} is in use: choose another with --port N, or --port 0 for a free one."
        )
    reason = error.strerror or str(error)
    return ServerError(f"Cannot listen on {host}:{port}: {reason}; choose another with --host and --port.")


def _reachable(host: str) -> str:
    """``host`` as a client on this machine writes it."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    logger.error("%s", context.get("message"), exc_info=context.get("exception"))
