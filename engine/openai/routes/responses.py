"""``/v1/responses``: create (plain, streamed, in the background), retrieve, cancel, delete."""

import asyncio
import uuid
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from engine.errors import RequestError, UnknownResponseError
from engine.openai.http.errors import ClientGoneError
from engine.openai.http.json_body import JSONRoute
from engine.openai.http.lifetime import OpenRequest
from engine.openai.http.sse import EventStream, StreamForm, named_event
from engine.openai.routes.responses_calls import CallItems
from engine.openai.routes.responses_output import JsonObject, ResponseBuilder
from engine.openai.routes.responses_store import Followed, ResponseCancelledError, ResponseStore, RunningResponse
from engine.openai.schema.left_out import LeftOut
from engine.openai.schema.protocol import ChatCompletionRequest
from engine.openai.schema.responses_input import InputReader, tools_in_input, with_instructions
from engine.openai.schema.responses_protocol import ResponsesRequest, chat_request, check_responses
from engine.openai.schema.responses_tools import GivenTool, read_tools
from engine.openai.schema.validation import RESPONSES_REFUSED_FIELDS, check_extra_fields
from engine.openai.serving.chat_preparation import start_read
from engine.openai.serving.generation import Choice, Job, JobEvents, News, Port, open_request, port_of, stream_job
from engine.openai.serving.logprobs import chat_logprobs
from engine.outputs import CompletionDelta

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Reply to ``input``; with ``stream`` as events, with ``background`` at once while the model works on."""
    port, store = port_of(request), _store(request)
    check_extra_fields(body, RESPONSES_REFUSED_FIELDS)
    check_responses(body)
    read = _read(body, store, port.engine.preparer.template.variables)
    job = await start_read(port, request, read, "resp")
    builder = ResponseBuilder(_response(body, job, read.calls), read.calls, seals_thoughts=body.seals_thoughts)
    running = RunningResponse(builder, job, read.messages, read.brought_tools)
    if body.store:
        store.add(running)
    if body.background:
        return _in_background(port, store, request, body, running)
    if body.stream:
        return _streamed(port, store, request, body, running)
    await _finish(port, store, request, body, running)
    return JSONResponse(running.builder.response)


@router.post("/v1/responses/compact", response_model=None)
async def compact_response() -> Response:
    """Refused by name: OpenAI's compaction needs its own models."""
    raise UnknownResponseError("/v1/responses/compact is not supported by this version of the engine: send the items.")


@router.get("/v1/responses/{response_id}", response_model=None)
async def retrieve_response(
    response_id: str,
    request: Request,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """A stored response as it stands; with ``stream`` a background one's events after ``starting_after``."""
    running = _store(request).get(response_id, param="response_id")
    if not stream:
        return JSONResponse(running.builder.response)
    if not running.builder.response["background"]:
        raise RequestError("Only background responses can be streamed again.", param="stream")
    return _followed(port_of(request), request, running, starting_after)


@router.post("/v1/responses/{response_id}/cancel", response_model=None)
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a background response; one that is over stays as it is."""
    running = _store(request).get(response_id, param="response_id")
    if not running.builder.response["background"]:
        raise RequestError("Cannot cancel a synchronous response.", param="response_id")
    await running.cancel()
    return JSONResponse(running.builder.response)


@router.delete("/v1/responses/{response_id}", response_model=None)
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a stored response; a background one is ended first."""
    running = _store(request).get(response_id, param="response_id")
    await running.cancel()
    _store(request).remove(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _store(request: Request) -> ResponseStore:
    store = request.app.state.responses
    assert isinstance(store, ResponseStore)
    return store


@dataclass(frozen=True)
class _ReadRequest:
    """A request as a chat. ``messages`` are without instructions, ``brought_tools`` came with items among them."""

    chat: ChatCompletionRequest
    calls: CallItems
    messages: list[JsonObject]
    brought_tools: Sequence[GivenTool]
    notes: Sequence[str]

    @property
    def shown_tools(self) -> list[JsonObject]:
        """Those that the prompt lists."""
        return self.calls.toolbox.shown_functions()


def _read(body: ResponsesRequest, store: ResponseStore, variables: Set[str]) -> _ReadRequest:
    left_out = LeftOut()
    history, known = _history(store, body)
    brought = [*known, *tools_in_input(body.input)]
    own = [GivenTool(f"tools[{position}]", tool) for position, tool in enumerate(body.tools)]
    toolbox = read_tools([*own, *brought], left_out)
    reader = InputReader(history, toolbox, left_out, store.output_item)
    reader.read(body.input)
    messages = with_instructions(body.instructions, reader.messages)
    read = chat_request(body, messages, toolbox, left_out, variables)
    return _ReadRequest(read.chat, CallItems(toolbox, read.written), reader.messages, brought, left_out.lines())


def _history(store: ResponseStore, body: ResponsesRequest) -> tuple[list[dict[str, Any]], Sequence[GivenTool]]:
    """The messages before ``body``'s own, and the tools that items among them brought."""
    if body.previous_response_id is None:
        return [], []
    previous = store.get(body.previous_response_id, param="previous_response_id")
    if not previous.builder.over:
        raise RequestError(
            f"Response '{previous.id}' is still in progress: wait for its end before going on from it.",
            param="previous_response_id",
        )
    return previous.conversation(), previous.brought_tools


def _response(body: ResponsesRequest, job: Job, calls: CallItems) -> JsonObject:
    """The object before any output: OpenAI's fields, with the values that apply."""
    params = job.params
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": job.created,
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": body.background,
        "error": None,
        "frequency_penalty": params.frequency_penalty,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "model": job.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "presence_penalty": params.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort or body.reasoning_effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store,
        "temperature": params.temperature,
        "text": {"format": body.text.format},
        "tool_choice": body.tool_choice,
        "tools": [_shown_tool(tool) for tool in calls.toolbox.shown],
        "top_logprobs": body.top_logprobs,
        "top_p": params.top_p,
        "truncation": body.truncation,
        "usage": None,
        "user": body.user,
    }


def _shown_tool(tool: JsonObject) -> JsonObject:
    if tool["type"] != "function":
        return {"description": "", **tool}
    flat = {**tool, **tool.get("function", {})}
    flat.pop("function", None)
    return {"parameters": None, "strict": None, **flat}


async def _finish(
    port: Port, store: ResponseStore, request: Request, body: ResponsesRequest, running: RunningResponse
) -> None:
    """Run to the end for a client that waits."""
    try:
        async with open_request(port, request, running.job):
            async for _ in JobEvents(running.job, _Events(body, running)):
                pass
    except ClientGoneError:
        running.builder.cancelled(running.job)
        raise
    except Exception as error:
        _drain(running.builder.failed(error, running.job))
        raise
    finally:
        store.settle(running)


def _streamed(
    port: Port, store: ResponseStore, request: Request, body: ResponsesRequest, running: RunningResponse
) -> EventStream:
    def errors(error: Exception) -> Iterator[JsonObject]:
        yield from running.builder.failed(error, running.job)
        store.settle(running)

    def left() -> None:
        running.builder.cancelled(running.job)
        store.settle(running)

    form = StreamForm(named_event, errors, left, end=b"")
    return stream_job(port, request, running.job, _Events(body, running, lambda: store.settle(running)), form)


def _in_background(
    port: Port, store: ResponseStore, request: Request, body: ResponsesRequest, running: RunningResponse
) -> Response:
    running.work = OpenRequest(port.open_requests, _never, running.job.streams)
    queued = JSONResponse(running.builder.response)
    running.task = asyncio.create_task(_run_in_background(store, body, running, running.work))
    return _followed(port, request, running, -1) if body.stream else queued


async def _run_in_background(
    store: ResponseStore, body: ResponsesRequest, running: RunningResponse, work: OpenRequest
) -> None:
    try:
        async with work:
            events = _Events(body, running)
            running.publish(*events.begin())
            async for some in running.job.news():
                running.publish(*(event for news in some for event in events.of(news)))
            running.publish(*events.end())
    except ResponseCancelledError:
        running.builder.cancelled(running.job)
    except Exception as error:  # noqa: BLE001 - nobody awaits this: whoever asks for the response gets the error
        for event in running.builder.failed(error, running.job):
            running.publish(event)
    running.publish()
    store.settle(running)


def _followed(port: Port, request: Request, running: RunningResponse, after: int) -> EventStream:
    """The events of a background response; a client that leaves does not end it."""

    def errors(error: Exception) -> Iterator[JsonObject]:
        if running.builder.over:
            yield running.events[-1]
        else:
            yield from running.builder.failed(error, running.job)

    work = OpenRequest(port.open_requests, request.receive, ())
    form = StreamForm(named_event, errors, end=b"")
    return EventStream(Followed(running, after), work, keep_alive_seconds=port.options.keep_alive_seconds, form=form)


class _Events:
    """A response's events; ``over`` is called with the last ones."""

    def __init__(
        self, body: ResponsesRequest, running: RunningResponse, over: Callable[[], None] = lambda: None
    ) -> None:
        self._body, self._job, self._builder, self._over = body, running.job, running.builder, over
        self._logprobs: list[JsonObject] = []

    def begin(self) -> Sequence[JsonObject]:
        """See :class:`EventWriter`."""
        return list(self._builder.queued() if self._body.background else self._builder.started())

    def of(self, news: News) -> Sequence[JsonObject]:
        """See :class:`EventWriter`."""
        self._logprobs += _logprobs(self._body, self._job, news.choice, news.delta)
        events = list(self._builder.feed(news.parsed, self._logprobs))
        if news.parsed:
            self._logprobs = []
        return events

    def end(self) -> Sequence[JsonObject]:
        """See :class:`EventWriter`."""
        events = list(self._builder.finished(self._job))
        self._over()
        return events


def _logprobs(body: ResponsesRequest, job: Job, choice: Choice, delta: CompletionDelta) -> list[JsonObject]:
    if not body.with_logprobs or not delta.token_ids:
        return []
    tokens = job.place(choice, delta.token_ids, last=delta.finish_reason is not None)
    content = chat_logprobs(tokens, delta.logprobs or [], body.top_logprobs, job.names)["content"]
    assert isinstance(content, list)
    return content


def _drain(events: Iterator[JsonObject]) -> None:
    for _ in events:
        pass


async def _never() -> NoReturn:
    """Stands for a client that cannot leave."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")
