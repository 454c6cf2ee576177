"""Models, health, version, load and metrics."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.errors import UnknownModelError
from engine.openai.http.http_metrics import HttpMetrics
from engine.openai.http.json_body import JSONRoute
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.generation import package_version, port_of
from engine.runtime.metrics import CONTENT_TYPE

router = APIRouter(tags=["service"], route_class=JSONRoute)


@router.get("/v1/models", tags=["OpenAI"])
async def list_models(request: Request) -> dict[str, Any]:
    """The served model under each of its names."""
    engine = port_of(request).engine
    return {"object": "list", "data": [model_card(engine, name) for name in engine.args.names]}


@router.get("/v1/models/{name:path}", tags=["OpenAI"])
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    engine = port_of(request).engine
    if name not in engine.args.names:
        raise UnknownModelError(f"The model `{name}` does not exist.", param="model")
    return model_card(engine, name)


def model_card(engine: ServedEngine, name: str) -> dict[str, Any]:
    """vLLM's ModelCard."""
    created = int(engine.created)
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        **dict.fromkeys(("allow_create_engine", "allow_search_indices", "allow_fine_tuning", "is_blocking"), False),
        **dict.fromkeys(("allow_sampling", "allow_logprobs", "allow_view"), True),
        "organization": "*",
        "group": None,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": engine.args.model,
        "parent": None,
        "max_model_len": engine.plan.max_model_len,
        "permission": [permission],
    }


@router.get("/health", response_model=None)
@router.get("/ping", response_model=None)
@router.post("/ping", response_model=None)
async def health(request: Request) -> Response:
    """200 while the engine serves, 503 after it was closed or failed."""
    closed = port_of(request).engine.closed
    return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE if closed else HTTPStatus.OK)


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The package's version."""
    return {"version": package_version()}


@router.get("/load")
async def load(request: Request) -> JSONResponse:
    """How many generation requests are under way over HTTP."""
    return JSONResponse({"server_load": len(port_of(request).open_requests)})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Prometheus text: the engine's metrics, then the port's."""
    http_metrics = request.app.state.http_metrics
    assert isinstance(http_metrics, HttpMetrics)
    content = port_of(request).engine.metrics.render() + http_metrics.render()
    return Response(content, headers={"content-type": CONTENT_TYPE})
