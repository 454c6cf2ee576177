"""``/v1/chat/completions``, plain and streamed."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.openai.backend import ServedEngine
from engine.openai.generation import (
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
from engine.openai.logprobs import chat_logprobs, prompt_logprobs
from engine.openai.protocol import ChatCompletionRequest
from engine.openai.sse import EventStream
from engine.openai.support import check_chat
from engine.outputs import CompletionDelta
from engine.sampling_params import SamplingParams

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Reply to a conversation; with ``stream`` as server-sent events."""
    port = port_of(request)
    port.check_model(body.model)
    check_chat(body)
    port.check_template(body.chat_template, body.chat_template_kwargs)
    job = await _start(port, body, request)
    if body.stream:
        work = open_request(port, request, job)
        return EventStream(_chunks(job, body), work, keep_alive_seconds=port.options.keep_alive_seconds)
    await finish_job(port, request, job)
    return JSONResponse(_response(job, body))


async def _start(port: Port, body: ChatCompletionRequest, request: Request) -> Job:
    params = _params(port.engine, body)
    prompt = await asyncio.to_thread(_prompt, port.engine, body, params)
    return start_job(port, "chatcmpl", request, body, [prompt], params)


def _params(engine: ServedEngine, body: ChatCompletionRequest) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_params(engine, body, max_tokens=max_tokens, logprobs=logprobs)


def _prompt(engine: ServedEngine, body: ChatCompletionRequest, params: SamplingParams) -> Prompt:
    text = engine.render_chat(
        body.messages,
        tools=body.tools or None,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=_template_kwargs(body),
    )
    token_ids = engine.tokenize(text, add_special_tokens=body.add_special_tokens)
    return Prompt(truncate(token_ids, body, params.max_tokens, engine.plan.max_model_len), text)


def _template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    kwargs = dict(body.chat_template_kwargs)
    if body.documents is not None:
        kwargs["documents"] = body.documents
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        kwargs.setdefault("enable_thinking", body.reasoning_effort != "none")
    return kwargs


def _response(job: Job, body: ChatCompletionRequest) -> dict[str, Any]:
    stream = job.streams[0]
    response = {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": [_choice(job, body, choice) for choice in job.choices],
        "usage": job.usage(),
        "system_fingerprint": None,
        "prompt_logprobs": prompt_logprobs(stream.prompt_logprobs),
    }
    return response | _prompt_extras(job, body)


def _prompt_extras(job: Job, body: ChatCompletionRequest) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if body.return_token_ids:
        extras["prompt_token_ids"] = job.prompts[0].token_ids
    if body.return_prompt_text:
        extras["prompt_text"] = job.prompts[0].text
    return extras


def _choice(job: Job, body: ChatCompletionRequest, choice: Choice) -> dict[str, Any]:
    result = {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if body.logprobs:
        result["logprobs"] = chat_logprobs(choice.token_ids, choice.logprobs, body.top_logprobs or 0, job.names)
    if body.return_token_ids:
        result["token_ids"] = choice.token_ids
    return result


async def _chunks(job: Job, body: ChatCompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    options = stream_options(body)
    head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model}
    extras = _prompt_extras(job, body)
    opened: set[int] = set()
    async for choice, delta in job.deltas():
        usage = {"usage": job.usage()} if options.continuous_usage_stats else {}
        if choice.index not in opened:
            opened.add(choice.index)
            role = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield head | {"choices": [role | {"logprobs": None}]} | usage | extras
            extras = {}
        if delta.text or delta.finish_reason or body.logprobs or body.return_token_ids:
            yield head | {"choices": [_delta_choice(job, body, choice, delta)]} | usage
    if options.include_usage:
        yield head | {"choices": [], "usage": job.usage()}


def _delta_choice(job: Job, body: ChatCompletionRequest, choice: Choice, delta: CompletionDelta) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": choice.index,
        "delta": {"content": delta.text} if delta.text else {},
        "logprobs": None,
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        result["stop_reason"] = delta.stop_reason
    if body.logprobs and delta.token_ids:
        result["logprobs"] = chat_logprobs(delta.token_ids, delta.logprobs or [], body.top_logprobs or 0, job.names)
    if body.return_token_ids:
        result["token_ids"] = delta.token_ids
    return result
