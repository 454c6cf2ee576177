"""``/v1/messages``: Anthropic's Messages API, plain and streamed, and its token count."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.openai.http.errors import MESSAGES_PATH, anthropic_error, describe
from engine.openai.http.json_body import JSONRoute
from engine.openai.http.sse import Events, StreamForm, named_event
from engine.openai.routes.messages_output import MessageEvents, ending, message_object, usage
from engine.openai.schema.messages_input import ReadRequest, read_request
from engine.openai.schema.messages_protocol import CountTokensRequest, MessagesRequest
from engine.openai.schema.validation import MESSAGES_REFUSED_FIELDS, refuse_fields
from engine.openai.serving.chat_preparation import prepare_read, start_read
from engine.openai.serving.generation import Job, JobEvents, News, Port, open_request, port_of, stream_job

router = APIRouter(tags=["Anthropic"], route_class=JSONRoute)
_PING = {"type": "ping"}


@router.post(MESSAGES_PATH, response_model=None)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Reply to a conversation in Anthropic's form; with ``stream`` as its named events."""
    port = port_of(request)
    read = _read(body, port)
    job = await start_read(port, request, read, "msg")
    if body.stream:
        form = StreamForm(named_event, _errors, keep_alive=named_event(_PING), end=b"")
        return stream_job(port, request, job, _Events(job), form)
    events = _Events(job)
    async with open_request(port, request, job):
        async for _ in JobEvents(job, events):
            pass
    return JSONResponse(message_object(job, events.blocks) | ending(job.choices[0].reply))


@router.post(f"{MESSAGES_PATH}/count_tokens", response_model=None)
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    port = port_of(request)
    prepared = await prepare_read(port, _read(body, port))
    return JSONResponse({"input_tokens": len(prepared.token_ids)})


def _read(body: CountTokensRequest, port: Port) -> ReadRequest:
    refuse_fields(body, MESSAGES_REFUSED_FIELDS)
    return read_request(body, port.engine.preparer.template.variables)


def _errors(error: Exception) -> list[dict[str, Any]]:
    return [anthropic_error(describe(error))]


class _Events:
    """A message's events, and ``blocks``: its content."""

    def __init__(self, job: Job) -> None:
        self._job, self._content = job, MessageEvents()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return self._content.blocks

    def begin(self) -> Events:
        """See :class:`EventWriter`."""
        return [{"type": "message_start", "message": message_object(self._job, [])}, _PING]

    def of(self, news: News) -> Events:
        """See :class:`EventWriter`."""
        return list(self._content.feed(news.parsed))

    def end(self) -> Events:
        """See :class:`EventWriter`."""
        last = {"type": "message_delta", "delta": ending(self._job.choices[0].reply), "usage": usage(self._job)}
        return [*self._content.close(), last, {"type": "message_stop"}]
