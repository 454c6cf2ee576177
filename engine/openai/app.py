"""The ASGI application: routes, checks and errors put together."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.openai.http.connections import OpenConnections, default_max_connections
from engine.openai.http.errors import install_error_handlers
from engine.openai.http.form import FailureMiddleware, FormMiddleware
from engine.openai.http.http_metrics import AccessMiddleware, HttpMetrics
from engine.openai.http.lifetime import OpenRequests
from engine.openai.http.options import ServerOptions
from engine.openai.http.security import BodyLimitMiddleware, HostOriginMiddleware, KeyMiddleware
from engine.openai.routes import chat, completions, messages, render, responses, service, tokens
from engine.openai.routes.responses_store import ResponseStore
from engine.openai.serving.admission import Admission
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.generation import Port


class RootPathMiddleware:
    """Tells the routes which prefix a proxy adds; requests with and without it are both served."""

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        await self._app({**scope, "root_path": self._root_path}, receive, send)


def create_app(llm: ServedEngine, options: ServerOptions) -> FastAPI:
    """The port of ``llm`` as an ASGI application; its ``state.port`` reaches the requests under way."""
    app = FastAPI(title="vm-magic", redoc_url=None)
    app.state.port = Port(llm, options, OpenRequests(), _admission(options))
    app.state.connections = OpenConnections(options.max_connections or default_max_connections())
    app.state.http_metrics = HttpMetrics()
    app.state.responses = ResponseStore()
    for module in (chat, completions, responses, messages, render, tokens, service):
        app.include_router(module.router)
    if options.enable_tokenizer_info_endpoint:
        app.include_router(tokens.info_router)
    install_error_handlers(app)
    _add_middleware(app, options)
    return app


def _admission(options: ServerOptions) -> Admission:
    return Admission(options.max_num_queued_reqs, options.max_num_queued_tokens)


def _add_middleware(app: FastAPI, options: ServerOptions) -> None:
    """From the innermost to the outermost: preflights pass before the key is asked for."""
    app.add_middleware(FailureMiddleware)
    if options.root_path:
        app.add_middleware(RootPathMiddleware, root_path=options.root_path)
    app.add_middleware(BodyLimitMiddleware, options=options)
    app.add_middleware(FormMiddleware)
    app.add_middleware(KeyMiddleware, options=options)
    if options.allowed_origins:
        anything: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(options.allowed_origins), **anything)
    app.add_middleware(HostOriginMiddleware, options=options)
    app.add_middleware(
        AccessMiddleware,
        metrics=app.state.http_metrics,
        request_ids=options.enable_request_id_headers,
        log=options.enable_log_requests,
    )
