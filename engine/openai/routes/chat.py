"""``/v1/chat/completions``, plain and streamed, one conversation or a batch."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.errors import RequestError
from engine.openai.http.sse import EventStream
from engine.openai.http.version import system_fingerprint
from engine.openai.schema.protocol import BatchChatCompletionRequest, ChatCompletionRequest, ChatFields, StreamOptions
from engine.openai.serving.chat_preparation import Messages, finish_chat, start_chat
from engine.openai.serving.generation import open_request, port_of, stream_options
from engine.openai.serving.logprobs import chat_logprobs, prompt_logprobs
from engine.openai.serving.replies import ChatJob, Reply, named_reasoning
from engine.outputs import CompletionDelta
from engine.text.parse.scan.output_sink import ParsedDelta

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Reply to a conversation; with ``stream`` as server-sent events."""
    port = port_of(request)
    chat = await start_chat(port, request, body, [body.messages])
    echo = _echo(body, body.messages)
    if body.stream:
        work = open_request(port, request, chat.job)
        return EventStream(
            _chunks(chat, body, echo, stream_options(port, body)),
            work,
            keep_alive_seconds=port.options.keep_alive_seconds,
        )
    await finish_chat(port, request, chat)
    return JSONResponse(_response(chat, body, [echo]))


@router.post("/v1/chat/completions/batch", response_model=None)
async def create_chat_completions(body: BatchChatCompletionRequest, request: Request) -> Response:
    """Reply to many conversations at once: one choice for each, in order."""
    if body.stream:
        raise RequestError("Batch chat completions do not support streaming.", param="stream")
    if "n" in body.model_fields_set and body.n != 1:
        raise RequestError("Batch chat completions do not support n > 1.", param="n")
    port = port_of(request)
    chat = await start_chat(port, request, body.model_copy(update={"n": 1}), body.messages)
    await finish_chat(port, request, chat)
    return JSONResponse(_response(chat, body, [_echo(body, messages) for messages in body.messages]))


def _echo(body: ChatFields, messages: Messages) -> str:
    """What ``echo`` puts before the reply: the text of the final message, if the reply continues its role."""
    if not body.echo or (body.add_generation_prompt and messages[-1]["role"] != "assistant"):
        return ""
    content = messages[-1].get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def _response(chat: ChatJob, body: ChatFields, echoes: list[str]) -> dict[str, Any]:
    job = chat.job
    response = {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": [
            _choice(chat, body, reply, echoes[reply.choice.index // job.num_per_prompt]) for reply in chat.replies
        ],
        "usage": chat.usage(),
        "system_fingerprint": system_fingerprint(),
        "prompt_logprobs": prompt_logprobs(job.streams[0].prompt_logprobs),
    }
    return response | _prompt_extras(chat, body)


def _prompt_extras(chat: ChatJob, body: ChatFields) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if body.return_token_ids:
        extras["prompt_token_ids"] = chat.job.prompts[0].token_ids
    if body.return_prompt_text:
        extras["prompt_text"] = chat.job.prompts[0].text
    return extras


def _choice(chat: ChatJob, body: ChatFields, reply: Reply, echo: str) -> dict[str, Any]:
    choice, message = reply.choice, reply.message()
    if echo:
        message["content"] = echo + (message["content"] or "")
    result: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "logprobs": None,
        "finish_reason": reply.finish_reason,
        "stop_reason": choice.stop_reason,
        **choice.cut(),
    }
    if body.logprobs:
        num_top = body.top_logprobs or 0
        result["logprobs"] = chat_logprobs(choice.token_ids, choice.logprobs, num_top, chat.job.names)
    if body.return_token_ids:
        result["token_ids"] = choice.token_ids
    return result


async def _chunks(
    chat: ChatJob, body: ChatFields, echo: str, options: StreamOptions
) -> AsyncGenerator[dict[str, Any], None]:
    job = chat.job
    head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model}
    head["system_fingerprint"] = system_fingerprint()
    extras = _prompt_extras(chat, body)
    opened: set[int] = set()
    before = chat.usage()
    async for reply, delta, parsed in chat.deltas():
        counts = chat.usage()
        usage = {"usage": counts} if options.continuous_usage_stats else {}
        index = reply.choice.index
        if index not in opened:
            opened.add(index)
            role = {"index": index, "delta": {"role": "assistant", "content": echo}, "finish_reason": None}
            known = {"usage": before | {"prompt_tokens_details": counts["prompt_tokens_details"]}} if usage else {}
            yield head | {"choices": [role | {"logprobs": None}]} | known | extras
            extras = {}
        before = counts
        chunk = _delta_choice(chat, body, reply, delta, parsed)
        if chunk["delta"] or delta.finish_reason or body.logprobs or body.return_token_ids:
            yield head | {"choices": [chunk]} | usage
    if options.include_usage:
        yield head | {"choices": [], "usage": chat.usage()}


def _delta_choice(
    chat: ChatJob, body: ChatFields, reply: Reply, delta: CompletionDelta, parsed: ParsedDelta
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": reply.choice.index,
        "delta": _delta(parsed),
        "logprobs": None,
        "finish_reason": reply.finish_reason,
    }
    if delta.finish_reason is not None:
        result |= {"stop_reason": delta.stop_reason, **reply.choice.cut()}
    if body.logprobs and delta.token_ids:
        num_top = body.top_logprobs or 0
        result["logprobs"] = chat_logprobs(delta.token_ids, delta.logprobs or [], num_top, chat.job.names)
    if body.return_token_ids:
        result["token_ids"] = delta.token_ids
    return result


def _delta(parsed: ParsedDelta) -> dict[str, Any]:
    delta: dict[str, Any] = dict(named_reasoning(parsed.reasoning))
    if parsed.content:
        delta["content"] = parsed.content
    if parsed.tool_calls:
        delta["tool_calls"] = [
            {
                "index": piece.index,
                **({"id": piece.id, "type": "function"} if piece.id else {}),
                "function": {**({"name": piece.name} if piece.name else {}), "arguments": piece.arguments},
            }
            for piece in parsed.tool_calls
        ]
    return delta
