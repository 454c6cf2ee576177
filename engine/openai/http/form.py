"""Requests whose form no route can read, and failures that none foresaw: one clear answer each, and logged."""

import logging
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.openai.http.errors import on_exception, plain_error

logger = logging.getLogger("engine.openai")
MAX_TARGET = 8192
"""Bytes of a path with its query."""
MAX_HEADERS = 256
"""vLLM's ``--h11-max-header-count``."""


class FormMiddleware:
    """Refuses paths and headers that are too long, and bodies that are packed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        found = _refusal(scope) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        status, message = found
        response = plain_error(status, message, path=scope["path"], headers={"Connection": "close"})
        await response(scope, receive, send)


def _refusal(scope: Scope) -> tuple[HTTPStatus, str] | None:
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET:
        return HTTPStatus.REQUEST_URI_TOO_LONG, f"The path is longer than {MAX_TARGET} bytes."
    if len(scope["headers"]) > MAX_HEADERS:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"There are more than {MAX_HEADERS} headers."
    coding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        message = f"Content-Encoding {coding[:40]!r} is not supported: send the body as it is."
        return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message
    return None


class FailureMiddleware:
    """Answers what went wrong inside. The connection goes on: Starlette's own would have it cut after its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            response = await on_exception(Request(scope), error)
            await response(scope, receive, send)
