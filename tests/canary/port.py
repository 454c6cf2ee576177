"""Seams of FastAPI, Starlette and uvicorn."""

import asyncio
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI

from tests.canary.probe import Seam, expect, named, takes


def _asked(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", trust_env=False) as client:
            return await client.get(path)

    return asyncio.run(ask())


def _app(watch: Any) -> FastAPI:
    """An application with a router of its own, as ours are."""
    app, router = FastAPI(), APIRouter()

    @router.get("/items/{name:path}")
    async def item(name: str) -> str:
        if name == "fail":
            raise RuntimeError("as wanted")
        return name

    async def on_error(_request: Any, error: Exception) -> Any:
        from fastapi.responses import JSONResponse

        return JSONResponse({"said": str(error)}, status_code=500)

    app.include_router(router)
    app.add_exception_handler(Exception, on_error)
    app.add_middleware(watch)
    return app


def routes_and_middleware() -> None:
    scopes: list[Any] = []

    class Watch:
        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scopes.append(scope)
            await self._app(scope, receive, send)

    app = _app(Watch)
    expect(_asked(app, "/items/a/b").json() == "a/b", "a path in a route is read otherwise")
    route = getattr(scopes[-1].get("route"), "path", "none")
    expect(route == "/items/{name:path}", f"scope['route'] is not the route's pattern but {route}")
    failed = _asked(app, "/items/fail")
    expect((failed.status_code, failed.json()) == (500, {"said": "as wanted"}), "a handler of Exception is not asked")
    expect(_asked(app, "/nowhere").json() == {"detail": "Not Found"}, "a 404 is told in other words")


def protocol() -> None:
    from uvicorn import Config
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import ServerState

    config = Config(FastAPI(), log_config=None, lifespan="off", http=H11Protocol, ws="none")
    config.load()

    async def make() -> Any:
        return H11Protocol(config=config, server_state=ServerState(), app_state={"here": 1})

    made = asyncio.run(make())
    expect(getattr(made, "app_state", None) == {"here": 1}, "a protocol keeps no app_state")
    for name in ("connection_made", "pause_writing", "resume_writing"):
        expect(callable(getattr(made, name, None)), f"a protocol has no {name}")


def server() -> None:
    from uvicorn import Config, Server

    made = Server(Config(FastAPI(), log_config=None))
    for name in ("started", "should_exit", "force_exit"):
        expect(getattr(made, name, None) is False, f"a server has no {name}")
    expect(isinstance(made.server_state.connections, set), "a server does not know its connections")


PORT = (
    Seam("fastapi", "routes, middleware and handlers", "engine/openai/app.py", routes_and_middleware),
    Seam(
        "starlette",
        "headers of messages",
        "engine/openai/http/http_metrics.py",
        named("starlette.datastructures", "MutableHeaders", "Headers"),
    ),
    Seam(
        "starlette",
        "raw headers of responses",
        "engine/openai/http/sse.py",
        named("starlette.responses", "Response.init_headers"),
    ),
    Seam(
        "starlette",
        "CORS",
        "engine/openai/app.py",
        takes(
            "starlette.middleware.cors",
            "CORSMiddleware",
            "app",
            keywords=("allow_origins", "allow_methods", "allow_headers"),
        ),
    ),
    Seam("uvicorn", "H11Protocol", "engine/openai/http/connection.py", protocol),
    Seam("uvicorn", "Server", "engine/openai/server.py", server),
    Seam(
        "uvicorn",
        "Config",
        "engine/openai/server.py",
        takes(
            "uvicorn",
            "Config",
            "app",
            keywords=(
                "log_config",
                "access_log",
                "lifespan",
                "http",
                "ws",
                "loop",
                "server_header",
                "timeout_graceful_shutdown",
                "timeout_keep_alive",
            ),
        ),
    ),
)
