"""``/v1/completions``, plain and streamed: one prompt or many, as text or tokens."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.chat.request import PreparedRequest, PromptRequest
from engine.errors import RequestError
from engine.openai.http.json_body import JSONRoute
from engine.openai.http.sse import Events, TextEvent
from engine.openai.schema.protocol import CompletionRequest, StreamOptions
from engine.openai.schema.validation import check_generation
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.generation import (
    Choice,
    Job,
    News,
    Port,
    finish_job,
    make_prompts,
    port_of,
    sampling_params,
    start_job,
    stream_job,
    stream_options,
    system_fingerprint,
    truncation,
)
from engine.openai.serving.logprobs import completion_logprobs, prompt_logprobs, prompt_tokens
from engine.outputs import CompletionDelta, LogprobsAtPosition
from engine.params.sampling_params import SamplingParams

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or many; with ``stream`` as server-sent events."""
    port = port_of(request)
    port.check_model(body.model)
    check_generation(body)
    job = await _start(port, body, request)
    if body.stream:
        return stream_job(port, request, job, _Chunks(job, body, stream_options(port, body)))
    await finish_job(port, request, job)
    return JSONResponse(_response(job, body))


def _only_echo(body: CompletionRequest) -> bool:
    return body.echo and body.max_tokens == 0


async def _start(port: Port, body: CompletionRequest, request: Request) -> Job:
    given = (body.prompt, body.structured_outputs, body.response_format)
    with port.admission.place(len(_prompt_items(body.prompt)), body.n) as place:
        prompts = await make_prompts(partial(completion_prompts, port.engine, body), given)
        return await start_job(port, "cmpl", request, body, prompts, place)


def _params(engine: ServedEngine, body: CompletionRequest) -> SamplingParams:
    own: dict[str, Any] = {"max_tokens": body.max_tokens, "logprobs": body.logprobs}
    if _only_echo(body):
        # The engine samples at least one token; it is not shown.
        own["max_tokens"] = 1
    if body.echo and body.prompt_logprobs is None and body.logprobs is not None:
        own["prompt_logprobs"] = body.logprobs
    return sampling_params(engine, body, **own).with_default_max_tokens()


def completion_prompts(engine: ServedEngine, body: CompletionRequest) -> list[PreparedRequest]:
    """The prompts of ``body``, ready to run. Raises RequestError if there is none."""
    params = _params(engine, body)
    prompts = [engine.prepare(_request(body, item, params)) for item in _prompt_items(body.prompt)]
    if not prompts:
        raise RequestError("`prompt` must not be an empty list.", param="prompt")
    return prompts


def _prompt_items(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    return [tokens] if tokens else [item for item in prompt if not isinstance(item, int)]


def _request(body: CompletionRequest, item: str | list[int], params: SamplingParams) -> PromptRequest:
    return PromptRequest(
        prompt=item,
        add_special_tokens=body.add_special_tokens,
        sampling=params,
        structured_outputs=body.structured_outputs,
        response_format=body.response_format,
        thinking_token_budget=body.thinking_token_budget,
        repetition_detection=body.repetition_detection,
        truncation=truncation(body),
    )


def _response(job: Job, body: CompletionRequest) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": [_choice(job, body, choice) for choice in job.choices],
        "usage": _usage(job, body),
        "system_fingerprint": system_fingerprint(),
    }


def _whole(choice: Choice, body: CompletionRequest) -> CompletionDelta:
    """All of a choice as one delta; without its output where only the prompt is echoed."""
    reply = choice.reply
    return _shown(
        CompletionDelta(
            choice.index, reply.content, reply.token_ids, reply.logprobs, reply.finish_reason, reply.stop_reason
        ),
        body,
    )


def _shown(delta: CompletionDelta, body: CompletionRequest) -> CompletionDelta:
    if not _only_echo(body):
        return delta
    return CompletionDelta(delta.index, "", [], [], delta.finish_reason and "length")


def _usage(job: Job, body: CompletionRequest) -> dict[str, Any]:
    counts = job.usage()
    if _only_echo(body):
        counts |= {"completion_tokens": 0, "total_tokens": counts["prompt_tokens"]}
    return counts


def _choice(job: Job, body: CompletionRequest, choice: Choice) -> dict[str, Any]:
    whole = _whole(choice, body)
    logprobs = None
    if body.logprobs is not None:
        logprobs = _logprobs(job, body, choice, whole, begin=True)
    result = {
        "index": choice.index,
        "text": (_echo(job, choice) if body.echo else "") + whole.text,
        "logprobs": logprobs,
        "finish_reason": whole.finish_reason,
        "stop_reason": whole.stop_reason,
    }
    if body.prompt_logprobs is not None:
        result["prompt_logprobs"] = prompt_logprobs(job.stream_of(choice).prompt_logprobs)
    if body.return_token_ids:
        result |= {"token_ids": whole.token_ids, "prompt_token_ids": job.prompt_of(choice).token_ids}
    return result


def _echo(job: Job, choice: Choice) -> str:
    """The prompt's text; where it came as tokens, or was cut, the text of its tokens."""
    prompt = job.prompt_of(choice)
    return job.decode(prompt.token_ids) if prompt.prompt is None else prompt.prompt


def _logprobs(
    job: Job, body: CompletionRequest, choice: Choice, delta: CompletionDelta, *, begin: bool
) -> dict[str, Any]:
    """Logprobs of ``delta``; at the ``begin`` of an echoing choice those of the prompt come first."""
    positions: list[LogprobsAtPosition | None] = list(delta.logprobs or ())
    tokens = []
    echo = _echo(job, choice) if begin and body.echo else ""
    if begin and body.echo:
        tokens = prompt_tokens(job.names, job.prompt_of(choice).token_ids, echo)
        positions = [*(job.stream_of(choice).prompt_logprobs or []), *positions]
    over = delta.finish_reason is not None
    tokens += job.place(choice, delta.token_ids, last=over, text_offset=len(echo))
    return completion_logprobs(tokens, positions, body.logprobs or 0, job.names)


class _Chunks:
    """The chunks of a stream. Of most only the text is new: those are not encoded anew."""

    def __init__(self, job: Job, body: CompletionRequest, options: StreamOptions) -> None:
        self._head = {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}
        self._job, self._body = job, body
        self._counts, self._says_usage = options.continuous_usage_stats, options.include_usage
        self._plain = body.logprobs is None and not (body.return_token_ids or self._counts or _only_echo(body))
        self._texts: dict[int, TextEvent] = {}
        """By the number of a choice that has begun."""

    def begin(self) -> Events:
        """See :class:`EventWriter`."""
        return ()

    def end(self) -> Events:
        """See :class:`EventWriter`."""
        usage = _usage(self._job, self._body)
        return [self._head | {"choices": [], "usage": usage}] if self._says_usage else ()

    def of(self, news: News) -> Events:
        """The chunk of one delta; none where it shows nothing."""
        job, body, choice, delta = self._job, self._body, news.choice, news.delta
        texts = self._texts.get(choice.index)
        if texts is not None and self._plain and delta.finish_reason is None:
            return (texts.of(delta.text),) if delta.text else ()
        if texts is None:
            self._texts[choice.index] = TextEvent(partial(self._text, choice.index))
        shown = _delta_choice(job, body, choice, _shown(delta, body), begin=texts is None)
        if not (shown["text"] or delta.finish_reason or shown["logprobs"] or body.return_token_ids):
            return ()
        usage = {"usage": _usage(job, body)} if self._counts else {}
        return (self._head | {"choices": [shown]} | usage,)

    def _text(self, index: int, text: str) -> dict[str, Any]:
        return self._head | {"choices": [_piece(index, CompletionDelta(index, text, []))]}


def _delta_choice(
    job: Job, body: CompletionRequest, choice: Choice, delta: CompletionDelta, *, begin: bool
) -> dict[str, Any]:
    text = delta.text
    if begin and body.echo:
        text = _echo(job, choice) + text
    result = _piece(choice.index, delta) | {"text": text}
    if body.logprobs is not None and (delta.token_ids or (begin and body.echo)):
        result["logprobs"] = _logprobs(job, body, choice, delta, begin=begin)
    if body.return_token_ids:
        result["token_ids"] = delta.token_ids
        if begin:
            result["prompt_token_ids"] = job.prompt_of(choice).token_ids
    return result


def _piece(index: int, delta: CompletionDelta) -> dict[str, Any]:
    return {
        "index": index,
        "text": delta.text,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
