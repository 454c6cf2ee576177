"""Errors as HTTP: vLLM's body and statuses for everything that goes wrong."""

import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from engine.errors import ContextLengthError, EngineClosedError, GenerationError, GrammarError, RequestError
from engine.format.text import one_line
from engine.openai.http.request_id import HEADER, request_id, request_logger

logger = request_logger("engine.openai")
MESSAGES_PATH = "/v1/messages"
"""Below this path errors have Anthropic's form."""
_ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
_LONGEST = 1200
"""Characters of a message."""
_MOST_ERRORS = 8
"""Wrong values that one answer names."""
ABORTED = 499
"""The status of a request that was ended here; proxies log it for one that its client ended. No client repeats it."""
_TOO_DEEP = "The request body is nested too deeply."
_FINAL = {"x-should-retry": "false"}
"""What OpenAI's and Anthropic's clients obey before they look at the status, where they repeat each 5xx twice."""
_SOON = {"Retry-After": "1"}
_UNREADABLE = "There was an error parsing the body"
"""FastAPI's words for it."""
_ANTHROPIC_DETAILS = {"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}
"""By the refused field: what Anthropic's clients read to go on without it."""

_POOLING = "it runs models that generate text, none that embed, rank or classify"
_MEDIA = "it serves text only"
_LORA = "adapters cannot be changed while it runs"
_DEVELOPER = "it has no developer routes"
NOT_OFFERED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/generative_scoring"),
            *("/rerank", "/v1/rerank", "/v2/rerank"),
        ),
        _POOLING,
    ),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"), _MEDIA),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _LORA),
    "/inference/v1/generate": "send token ids as the `prompt` of /v1/completions, with `return_token_ids`",
    "/abort_requests": "close the connection of a request to end it",
    "/invocations": "use /v1/chat/completions or /v1/completions",
    "/tokenizer_info": "serve with --enable-tokenizer-info-endpoint",
    **dict.fromkeys(
        (
            *("/server_info", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc"),
            *("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused"),
            *("/start_profile", "/stop_profile"),
        ),
        _DEVELOPER,
    ),
}
"""Routes that vLLM has and this server does not: why not, or what to use instead."""


class ServerStoppingError(Exception):
    """The port is being closed while a request is under way."""


class QueueFullError(Exception):
    """As much waits already as the port takes."""


class ClientGoneError(Exception):
    """The client closed its connection."""


class RequestAbortedError(Exception):
    """Somebody at this machine ended the request: Cancel in the panel, or ``llm.abort(id)``."""

    def __init__(self) -> None:
        super().__init__("The request was cancelled where the model runs (Cancel in the panel, or llm.abort).")


def error_body(message: str, *, type: str, code: int, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``: one line of bounded length, whatever values it quotes.

    What UTF-8 cannot carry becomes ``?``.
    """
    message = one_line(message, _LONGEST).encode(errors="replace").decode()
    param = None if param is None else one_line(param, 100).encode(errors="replace").decode()
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: Exception) -> dict[str, Any]:
    """The body for ``error``. What is not meant for users is logged, and described in general words."""
    if isinstance(error, RequestError):
        return error_body(str(error), type=error.type, code=error.code, param=error.param)
    if isinstance(error, GrammarError):
        return error_body(str(error), type="BadRequestError", code=HTTPStatus.BAD_REQUEST, param="structured_outputs")
    if isinstance(error, RecursionError):
        call = traceback.extract_tb(error.__traceback__)[-1:]
        logger.warning("a request was refused as nested too deeply, in %s", ", ".join(map(str, call)) or "no call")
        return error_body(_TOO_DEEP, type="BadRequestError", code=HTTPStatus.BAD_REQUEST)
    if isinstance(error, ServerStoppingError | QueueFullError):
        message = str(error) or "The server was stopped while this request was running."
        return error_body(message, type="ServiceUnavailableError", code=HTTPStatus.SERVICE_UNAVAILABLE)
    if isinstance(error, RequestAbortedError):
        return error_body(str(error), type="RequestAbortedError", code=ABORTED)
    if isinstance(error, EngineClosedError):
        return error_body(str(error), type="ServiceUnavailableError", code=HTTPStatus.SERVICE_UNAVAILABLE)
    if isinstance(error, GenerationError):
        message = str(error)
    else:
        logger.error("request failed", exc_info=error)
        message = f"Internal error ({type(error).__name__}); the server's log has the details."
    return error_body(message, type="InternalServerError", code=HTTPStatus.INTERNAL_SERVER_ERROR)


def anthropic_error(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same error in the Messages API's form."""
    error = body["error"]
    kind = _ANTHROPIC_TYPES.get(error["code"], "invalid_request_error" if error["code"] < 500 else "api_error")
    details = _ANTHROPIC_DETAILS.get(error["param"] or "")
    told = {"type": kind, "message": error["message"]} | ({"details": details} if details else {})
    return {"type": "error", "error": told, "request_id": None}


def _response(
    body: dict[str, Any], path: str, headers: Mapping[str, str] | None = None, *, lasting: bool = False
) -> JSONResponse:
    """``body`` in the form of the API that ``path`` belongs to; ``lasting``: it will stay so, whatever its status."""
    shown, status = anthropic_error(body) if MESSAGES_PATH in path else body, body["error"]["code"]
    return JSONResponse(shown, status_code=status, headers={**_about_repeating(status, lasting), **(headers or {})})


def _about_repeating(status: int, lasting: bool) -> Mapping[str, str]:
    """Headers that say whether the same request may succeed later.

    While the port closes it may, if another opens in its place. A model that failed, an engine that is gone and a bug
    of ours stay what they are until somebody does something; and who cancelled a request does not want it again.
    """
    return _SOON if status == HTTPStatus.SERVICE_UNAVAILABLE and not lasting else _FINAL


def plain_error(
    status: int, message: str, *, path: str, type: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A response for a status without an exception of ours behind it."""
    kind = type or HTTPStatus(status).phrase
    return _response(error_body(message, type=kind, code=status), path, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every failure of ``app`` in vLLM's form."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, on_exception)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    ours = (RequestError, EngineClosedError, GenerationError)
    for kind in (*ours, RequestAbortedError, ServerStoppingError, QueueFullError):
        app.add_exception_handler(kind, on_exception)


def not_found(path: str, detail: str) -> str:
    """The message of a 404 for ``path``; ``detail`` is what the router says."""
    if path in NOT_OFFERED:
        return f"This server does not offer {path}: {NOT_OFFERED[path]}."
    return f"This server has no route {path}." if detail == "Not Found" else detail


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    # Nobody reads this; 499 is what proxies log for it.
    return Response(status_code=499)


async def on_exception(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    if isinstance(error, ContextLengthError) and error.limit and MESSAGES_PATH in request.url.path:
        error = RequestError(_too_long(error), param=error.param)
    # Where no handler inside the middleware took it, that middleware does not see the response.
    named = {HEADER: request_id()} if request.app.state.port.options.enable_request_id_headers else None
    gone = isinstance(error, EngineClosedError)
    return _response(describe(error), request.url.path, named, lasting=gone)


def _too_long(error: ContextLengthError) -> str:
    """In the words by which Anthropic's clients know that fewer output tokens, or a shorter history, would do."""
    if error.num_prompt < error.limit:
        return (
            f"input length and `max_tokens` exceed context limit: {error.num_prompt} + {error.asked} > {error.limit}, "
            "decrease input length or `max_tokens` and try again"
        )
    return f"prompt is too long: {error.num_prompt} tokens > {error.limit} maximum"


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path, message, kind = request.url.path, str(error.detail), None
    if message == _UNREADABLE:
        message, kind = _why_unreadable(error.__cause__), "BadRequestError"
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = not_found(path.removeprefix(request.scope.get("root_path", "")), message)
        kind = "NotFoundError"
    return plain_error(error.status_code, message, path=path, type=kind, headers=error.headers)


def _why_unreadable(error: BaseException | None) -> str:
    """What FastAPI does not say of a body that is no JSON."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, UnicodeDecodeError):
        return "The request body is not valid UTF-8."
    return f"The request body cannot be read: {error or 'no reason given'}."


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    message = "; ".join(_sentence(item) for item in found[:_MOST_ERRORS])
    if len(found) > _MOST_ERRORS:
        message += f"; and {len(found) - _MOST_ERRORS} more"
    body = error_body(message, type="BadRequestError", code=HTTPStatus.BAD_REQUEST, param=_param(found[0]))
    return _response(body, request.url.path)


def _place(item: Mapping[str, Any]) -> list[str]:
    if item["type"] == "json_invalid":
        return []
    return [str(part) for part in item["loc"] if part != "body"]


def _param(item: Mapping[str, Any]) -> str | None:
    return next(iter(_place(item)), None)


def _sentence(item: Mapping[str, Any]) -> str:
    if item["type"] == "json_invalid":
        return f"The request body is not valid JSON: {item.get('ctx', {}).get('error', item['msg'])}"
    place = ".".join(_place(item))
    if not place:
        return "The request body must be a JSON object sent as application/json."
    return f"{place}: {item['msg']}"
