"""``/v1/completions``, plain and streamed: one prompt or many, as text or tokens."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.errors import RequestError
from engine.openai.http.sse import EventStream
from engine.openai.http.version import system_fingerprint
from engine.openai.schema.backend import ServedEngine
from engine.openai.schema.protocol import CompletionRequest, StreamOptions
from engine.openai.schema.validation import check_generation
from engine.openai.serving.generation import (
    Choice,
    Job,
    Port,
    Prompt,
    finish_job,
    open_request,
    port_of,
    sampling_params,
    start_job,
    stream_options,
    truncate,
)
from engine.openai.serving.logprobs import completion_logprobs, prompt_logprobs
from engine.outputs import CompletionDelta, LogprobsAtPosition
from engine.params.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams
from engine.params.structured_outputs import Constraints

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or many; with ``stream`` as server-sent events."""
    port = port_of(request)
    port.check_model(body.model)
    check_generation(body)
    job = await _start(port, body, request)
    if body.stream:
        work = open_request(port, request, job)
        return EventStream(
            _chunks(job, body, stream_options(port, body)), work, keep_alive_seconds=port.options.keep_alive_seconds
        )
    await finish_job(port, request, job)
    return JSONResponse(_response(job, body))


def _only_echo(body: CompletionRequest) -> bool:
    return body.echo and body.max_tokens == 0


async def _start(port: Port, body: CompletionRequest, request: Request) -> Job:
    params = completion_params(port.engine, body)
    prompts = await asyncio.to_thread(completion_prompts, port.engine, body, params)
    constraints = Constraints.from_request(
        structured_outputs=body.structured_outputs,
        response_format=body.response_format,
        thinking_token_budget=body.thinking_token_budget,
        repetition_detection=body.repetition_detection,
    )
    return await start_job(port, "cmpl", request, body, prompts, params, constraints)


def completion_params(engine: ServedEngine, body: CompletionRequest) -> SamplingParams:
    """The sampling values in force for ``body``."""
    own: dict[str, Any] = {"max_tokens": body.max_tokens, "logprobs": body.logprobs}
    if _only_echo(body):
        # The engine samples at least one token; it is not shown.
        own["max_tokens"] = 1
    if body.echo and body.prompt_logprobs is None and body.logprobs is not None:
        own["prompt_logprobs"] = body.logprobs
    params = sampling_params(engine, body, **own)
    return params if params.max_tokens is not None else params.replace(max_tokens=DEFAULT_MAX_TOKENS)


def completion_prompts(engine: ServedEngine, body: CompletionRequest, params: SamplingParams) -> list[Prompt]:
    """The prompts of ``body`` as tokens. Raises RequestError if there is none."""
    prompts = [_prompt(engine, body, item, params) for item in _prompt_items(body.prompt)]
    if not prompts:
        raise RequestError("`prompt` must not be an empty list.", param="prompt")
    return prompts


def _prompt_items(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    return [tokens] if tokens else [item for item in prompt if not isinstance(item, int)]


def _prompt(engine: ServedEngine, body: CompletionRequest, item: str | list[int], params: SamplingParams) -> Prompt:
    whole = engine.tokenize(item, add_special_tokens=body.add_special_tokens) if isinstance(item, str) else item
    token_ids = truncate(whole, body, params.max_tokens, engine.plan.max_model_len)
    if isinstance(item, str) and len(token_ids) == len(whole):
        return Prompt(token_ids, item)
    return Prompt(token_ids, engine.tokenizer.decode(token_ids, skip_special_tokens=False) if body.echo else None)


def _response(job: Job, body: CompletionRequest) -> dict[str, Any]:
    if _only_echo(body):
        _drop_output(job)
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": [_choice(job, body, choice) for choice in job.choices],
        "usage": job.usage(),
        "system_fingerprint": system_fingerprint(),
    }


def _drop_output(job: Job) -> None:
    for choice in job.choices:
        choice.parts, choice.token_ids, choice.logprobs = [], [], []
        choice.finish_reason, choice.stop_reason = "length", None


def _choice(job: Job, body: CompletionRequest, choice: Choice) -> dict[str, Any]:
    text, logprobs = choice.text, None
    if body.logprobs is not None:
        logprobs = _logprobs(job, body, choice, choice.token_ids, choice.logprobs, begin=True)
    if body.echo:
        text = (job.prompt_of(choice).text or "") + text
    result = {
        "index": choice.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if body.prompt_logprobs is not None:
        result["prompt_logprobs"] = prompt_logprobs(job.stream_of(choice).prompt_logprobs)
    if body.return_token_ids:
        result |= {"token_ids": choice.token_ids, "prompt_token_ids": job.prompt_of(choice).token_ids}
    return result


def _logprobs(
    job: Job,
    body: CompletionRequest,
    choice: Choice,
    token_ids: list[int],
    positions: list[LogprobsAtPosition],
    *,
    begin: bool,
    text_offset: int = 0,
) -> dict[str, Any]:
    """Logprobs of ``token_ids``; at the ``begin`` of an echoing choice those of the prompt come first."""
    all_positions: list[LogprobsAtPosition | None] = list(positions)
    if begin and body.echo:
        prompt_positions = job.stream_of(choice).prompt_logprobs or []
        token_ids = [*job.prompt_of(choice).token_ids, *token_ids]
        all_positions = [*prompt_positions, *positions]
    return completion_logprobs(token_ids, all_positions, body.logprobs or 0, job.names, text_offset=text_offset)


async def _chunks(job: Job, body: CompletionRequest, options: StreamOptions) -> AsyncGenerator[dict[str, Any], None]:
    head = {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}
    offsets: dict[int, int] = {}
    async for choice, delta in job.deltas():
        if _only_echo(body):
            _drop_output(job)
            delta = CompletionDelta(delta.index, "", [], [], delta.finish_reason and "length")
        begin = choice.index not in offsets
        chunk = _delta_choice(job, body, choice, delta, offset=offsets.get(choice.index, 0), begin=begin)
        offsets[choice.index] = offsets.get(choice.index, 0) + _num_characters(chunk)
        if chunk["text"] or delta.finish_reason or chunk["logprobs"] or body.return_token_ids:
            usage = {"usage": job.usage()} if options.continuous_usage_stats else {}
            yield head | {"choices": [chunk]} | usage
    if options.include_usage:
        yield head | {"choices": [], "usage": job.usage()}


def _num_characters(chunk: dict[str, Any]) -> int:
    return sum(map(len, chunk["logprobs"]["tokens"])) if chunk["logprobs"] else len(chunk["text"])


def _delta_choice(
    job: Job, body: CompletionRequest, choice: Choice, delta: CompletionDelta, *, offset: int, begin: bool
) -> dict[str, Any]:
    text = delta.text
    if begin and body.echo:
        text = (job.prompt_of(choice).text or "") + text
    result: dict[str, Any] = {
        "index": choice.index,
        "text": text,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if body.logprobs is not None and (delta.token_ids or (begin and body.echo)):
        positions = delta.logprobs or []
        result["logprobs"] = _logprobs(job, body, choice, delta.token_ids, positions, begin=begin, text_offset=offset)
    if body.return_token_ids:
        result["token_ids"] = delta.token_ids
        if begin:
            result["prompt_token_ids"] = job.prompt_of(choice).token_ids
    return result
