"""Counts and times of HTTP requests, request ids and the access log."""

import time
from http import HTTPMethod

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.openai.http.request_id import HEADER, begin_request, request_id, request_logger

logger = request_logger("engine.openai.access")
_METHODS = frozenset(HTTPMethod)
_LABELS = ("method", "status", "handler")


class HttpMetrics:
    """``http_requests_total`` and ``http_request_duration_seconds`` of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("http_requests", "HTTP requests.", _LABELS, registry=self._registry)
        self._seconds = Histogram(
            "http_request_duration_seconds", "Time to the end of the response.", ("handler",), registry=self._registry
        )

    def observe(self, method: str, status: int, handler: str, seconds: float) -> None:
        """Count one request. ``handler`` is the route's pattern."""
        method = method if method in _METHODS else "other"  # clients invent them, and each would stay for ever
        self._requests.labels(method=method, status=f"{status // 100}xx", handler=handler).inc()
        self._seconds.labels(handler=handler).observe(seconds)

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self._registry)


class AccessMiddleware:
    """Measures each request and gives it its id; adds ``X-Request-Id`` and log lines where they are switched on."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics, request_ids: bool, log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._request_ids = request_ids
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_request(scope)
        begin = time.perf_counter()
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._request_ids:
                    MutableHeaders(scope=message)[HEADER] = request_id()
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            self._observe(scope, status, time.perf_counter() - begin)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        method, handler = scope["method"], getattr(scope.get("route"), "path", "none")
        self._metrics.observe(method, status, handler, seconds)
        if self._log:
            logger.info("%s %s %d %.0f ms", method, scope["path"], status, seconds * 1000)
