"""Who may talk to the port: Host, Origin, key and body size, checked before any route runs."""

import asyncio
import hmac
import ipaddress
import secrets
import socket
from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.openai.http.connection import Connection
from engine.openai.http.errors import plain_error
from engine.openai.http.hub import Hub
from engine.openai.http.options import ServerOptions, is_loopback

OPEN_PATHS = ("/health",)
"""Paths that need no key."""
_WILDCARD_HOSTS = ("0.0.0.0", "::", "")
_CLOSE = {"Connection": "close"}
_BYTES_PER_SECOND = 8192
"""How fast a long body must come, at least."""
_BODIES = 8


class HostOriginMiddleware:
    """Refuses requests under a foreign name (DNS rebinding) and from foreign web pages.

    Behind JupyterHub its name is served. Where the hub does not tell it, any name is that comes with the path of this
    port there, which jupyter-server-proxy sends along: a page could send it too, so only where a key is asked for.
    """

    def __init__(self, app: ASGIApp, *, options: ServerOptions) -> None:
        self._app = app
        self._options = options
        self._any_address = options.host in _WILDCARD_HOSTS
        self._names = {options.host.lower(), "localhost", *(host.lower() for host in options.allowed_hosts)}
        if self._any_address:
            self._names.add(socket.gethostname().lower())
        hub = Hub.of_environment()
        if hub is not None and hub.name:
            self._names.add(hub.name)
        self._nameless_hub = hub if hub is not None and not hub.name and options.api_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._host_allowed(_host_name(host)) and not self._proxied(scope, headers):
            message = f"Host {host!r} is not served here; --allowed-hosts adds names."
            response = plain_error(HTTPStatus.BAD_REQUEST, message, path=scope["path"], type="BadRequestError")
            await response(scope, receive, send)
        elif not self._page_allowed(headers, host):
            page = "A page of another site" if origin is None else f"Origin {origin!r}"
            message = f"{page} is not allowed; --allowed-origins adds web pages."
            await plain_error(HTTPStatus.FORBIDDEN, message, path=scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _host_allowed(self, name: str) -> bool:
        if name in self._names or "*" in self._names or is_loopback(name):
            return True
        if any(allowed.startswith("*.") and name.endswith(allowed[1:]) for allowed in self._names):
            return True
        # Rebinding needs a name: a bare address cannot be rebound.
        return self._any_address and _is_address(name)

    def _proxied(self, scope: Scope, headers: Headers) -> bool:
        """Whether the request came through the proxy of a hub whose name is not known."""
        server = scope.get("server")
        if self._nameless_hub is None or server is None:
            return False
        return headers.get("x-forwarded-context", "").rstrip("/") == self._nameless_hub.path(server[1])

    def _page_allowed(self, headers: Headers, host: str) -> bool:
        """Whether no web page asks, or one that may.

        Of an image or a script that a page names, browsers tell no origin, but that it is another site's; a link that
        a person follows opens a page of its own.
        """
        allowed, origin = self._options.allowed_origins, headers.get("origin")
        if origin is None:
            foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            return not foreign or "*" in allowed or headers.get("sec-fetch-dest") == "document"
        return "*" in allowed or origin in allowed or origin.lower().partition("://")[2] == host.lower()


class KeyMiddleware:
    """Asks for a key (``Authorization: Bearer`` or ``x-api-key``) everywhere but on :data:`OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions) -> None:
        self._app = app
        self._root_path = options.root_path.rstrip("/")
        self._secret = secrets.token_bytes(32)
        self._keys = tuple(self._digest(key) for key in options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and (not self._keys or self._has_key(Headers(scope=scope))):
            Connection.trust(scope)
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        response = plain_error(
            HTTPStatus.UNAUTHORIZED,
            "Unauthorized: send the server's API key as `Authorization: Bearer KEY`.",
            path=scope["path"],
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(self._root_path) in OPEN_PATHS

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            offered.append(bearer.strip())
        found = False
        for digest in map(self._digest, offered):
            for key in self._keys:
                found |= hmac.compare_digest(digest, key)
        return found

    def _digest(self, key: str) -> bytes:
        """Of one length for every key, and nobody can say what it begins with: comparing tells nothing by its time."""
        return hmac.digest(self._secret, key.encode(), "sha256")


class BodyLimitMiddleware:
    """Answers 413 to bodies longer than ``max_bytes``, announced or not, and 408 to those that come too slowly.

    The bodies of all requests under way come to :data:`_BODIES` of the longest: what is more is answered 503.
    """

    def __init__(self, app: ASGIApp, *, options: ServerOptions) -> None:
        self._app = app
        self._max_bytes = options.max_body_bytes
        self._seconds = options.request_seconds
        self._num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            response = plain_error(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                self._message(),
                path=scope["path"],
                headers=_CLOSE,
            )
            await response(scope, receive, send)
            return
        num_received, whole = 0, False
        began = asyncio.get_running_loop().time()

        async def counted_receive() -> Message:
            nonlocal num_received, whole
            if whole:
                return await receive()
            message = await self._receive_until(began + self._seconds + num_received / _BYTES_PER_SECOND, receive)
            size = len(message.get("body", b""))
            num_received, whole = num_received + size, not message.get("more_body", False)
            self._num_held += size
            self._check(num_received)
            return message

        try:
            await self._app(scope, counted_receive, send)
        finally:
            self._num_held -= num_received

    async def _receive_until(self, deadline: float, receive: Receive) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            message = "The request body did not come in time."
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, message, _CLOSE) from None

    def _check(self, num_received: int) -> None:
        if num_received > self._max_bytes:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._message(), _CLOSE)
        if self._num_held > _BODIES * self._max_bytes:
            message = "The bodies of the requests under way are too large together; try again later."
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, message, _CLOSE)

    def _message(self) -> str:
        return f"The request body is longer than {self._max_bytes} bytes."


def _host_name(header: str) -> str:
    """The name in a Host header, without port, brackets or a final dot."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
