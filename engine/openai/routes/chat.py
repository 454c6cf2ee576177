"""``/v1/chat/completions``, plain and streamed, one conversation or a batch."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.errors import RequestError
from engine.openai.http.json_body import JSONRoute
from engine.openai.http.sse import Events, TextEvent
from engine.openai.schema.protocol import BatchChatCompletionRequest, ChatCompletionRequest, ChatFields, StreamOptions
from engine.openai.serving.chat_preparation import Messages, start_chat
from engine.openai.serving.generation import (
    Choice,
    Job,
    News,
    finish_job,
    named_reasoning,
    port_of,
    stream_job,
    stream_options,
    system_fingerprint,
)
from engine.openai.serving.logprobs import chat_logprobs, prompt_logprobs
from engine.outputs import CompletionDelta
from engine.text.parse.scan.output_sink import ContentDelta, ParsedDelta, ParsedEvent, ReasoningDelta, ToolCallDelta

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Reply to a conversation; with ``stream`` as server-sent events."""
    port = port_of(request)
    job = await start_chat(port, request, body, [body.messages])
    echo = _echo(body, body.messages)
    if body.stream:
        return stream_job(port, request, job, _Chunks(job, body, echo, stream_options(port, body)))
    await finish_job(port, request, job)
    return JSONResponse(_response(job, body, [echo]))


@router.post("/v1/chat/completions/batch", response_model=None)
async def create_chat_completions(body: BatchChatCompletionRequest, request: Request) -> Response:
    """Reply to many conversations at once: one choice for each, in order."""
    if body.stream:
        raise RequestError("Batch chat completions do not support streaming.", param="stream")
    if "n" in body.model_fields_set and body.n != 1:
        raise RequestError("Batch chat completions do not support n > 1.", param="n")
    port = port_of(request)
    job = await start_chat(port, request, body.model_copy(update={"n": 1}), body.messages)
    await finish_job(port, request, job)
    return JSONResponse(_response(job, body, [_echo(body, messages) for messages in body.messages]))


def _echo(body: ChatFields, messages: Messages) -> str:
    """What ``echo`` puts before the reply: the text of the final message, if the reply continues its role."""
    if not body.echo or (body.add_generation_prompt and messages[-1]["role"] != "assistant"):
        return ""
    content = messages[-1].get("content") or ""
    texts = [content] if isinstance(content, str) else content
    return "\n".join(text if isinstance(text, str) else text.get("text") or "" for text in texts)


def _response(job: Job, body: ChatFields, echoes: list[str]) -> dict[str, Any]:
    response = {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": [_choice(job, body, choice, echoes[choice.index // job.num_per_prompt]) for choice in job.choices],
        "usage": job.chat_usage(),
        "system_fingerprint": system_fingerprint(),
        "prompt_logprobs": prompt_logprobs(job.streams[0].prompt_logprobs),
    }
    return response | _prompt_extras(job, body)


def _prompt_extras(job: Job, body: ChatFields) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if body.return_token_ids:
        extras["prompt_token_ids"] = job.prompts[0].token_ids
    if body.return_prompt_text:
        extras["prompt_text"] = job.prompts[0].prompt
    return extras


def _choice(job: Job, body: ChatFields, choice: Choice, echo: str) -> dict[str, Any]:
    reply, message = choice.reply, choice.message()
    if echo:
        message["content"] = echo + (message["content"] or "")
    result: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "logprobs": None,
        "finish_reason": reply.finish_reason,
        "stop_reason": reply.stop_reason,
        **choice.cut(),
    }
    if body.logprobs:
        num_top = body.top_logprobs or 0
        result["logprobs"] = chat_logprobs(
            job.place(choice, reply.token_ids, last=True), reply.logprobs, num_top, job.names
        )
    if body.return_token_ids:
        result["token_ids"] = reply.token_ids
    return result


class _Chunks:
    """The chunks of a stream. Of most only the text is new: those are not encoded anew."""

    def __init__(self, job: Job, body: ChatFields, echo: str, options: StreamOptions) -> None:
        self._head: dict[str, Any] = {
            "id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model,
            "system_fingerprint": system_fingerprint(),
        }  # fmt: skip
        self._job, self._body, self._echo = job, body, echo
        self._counts, self._says_usage = options.continuous_usage_stats, options.include_usage
        self._plain = not (body.logprobs or body.return_token_ids or self._counts)
        self._extras = _prompt_extras(job, body)
        self._opened: set[int] = set()
        self._texts: dict[tuple[int, type[ParsedEvent]], TextEvent] = {}
        self._usage = job.chat_usage()
        """Up to the last delta, where chunks say it."""

    def begin(self) -> Events:
        """See :class:`EventWriter`."""
        return ()

    def end(self) -> Events:
        """See :class:`EventWriter`."""
        usage = self._job.chat_usage()
        return [self._head | {"choices": [], "usage": usage}] if self._says_usage else ()

    def of(self, news: News) -> Events:
        """The chunks of one delta, and before a choice's first the one that opens it."""
        index, delta, events = news.choice.index, news.delta, news.parsed.events
        if self._plain and delta.finish_reason is None and index in self._opened:
            if not events:
                return ()
            if len(events) == 1 and not isinstance(events[0], ToolCallDelta):
                return (self._text_event(index, events[0]),)
        job, body = self._job, self._body
        counts = job.chat_usage() if self._counts else {}
        usage = {"usage": counts} if self._counts else {}
        chunks = [] if index in self._opened else [self._opening(index, counts)]
        *earlier, last = _in_order(news.parsed)
        chunks += [self._head | {"choices": [_piece(index, piece)]} | usage for piece in earlier]
        chunk = _last_piece(job, body, news.choice, delta, last)
        if chunk["delta"] or delta.finish_reason or body.logprobs or body.return_token_ids:
            chunks.append(self._head | {"choices": [chunk]} | usage)
        self._usage = counts
        return chunks

    def _opening(self, index: int, counts: dict[str, Any]) -> dict[str, Any]:
        self._opened.add(index)
        extras, self._extras = self._extras, {}
        role = {"index": index, "delta": {"role": "assistant", "content": self._echo}, "finish_reason": None}
        known = {}
        if self._counts:
            known["usage"] = self._usage | {"prompt_tokens_details": counts["prompt_tokens_details"]}
        return self._head | {"choices": [role | {"logprobs": None}]} | known | extras

    def _text_event(self, index: int, event: ReasoningDelta | ContentDelta) -> bytes:
        kind = type(event)
        texts = self._texts.get((index, kind))
        if texts is None:

            def make(text: str) -> dict[str, Any]:
                return self._head | {"choices": [_piece(index, ParsedDelta([kind(text)]))]}

            texts = self._texts[index, kind] = TextEvent(make)
        return texts.of(event.text)


def _in_order(parsed: ParsedDelta) -> list[ParsedDelta]:
    """``parsed`` cut where one chunk could not show its order: clients read reasoning, content, then calls."""
    pieces, rank = [ParsedDelta()], 0
    for event in parsed.events:
        own = _RANKS[type(event)]
        if own < rank:
            pieces.append(ParsedDelta())
        rank = own
        pieces[-1].events.append(event)
    return pieces


_RANKS: dict[type[ParsedEvent], int] = {ReasoningDelta: 0, ContentDelta: 1, ToolCallDelta: 2}


def _piece(index: int, parsed: ParsedDelta) -> dict[str, Any]:
    return {"index": index, "delta": _delta(parsed), "logprobs": None, "finish_reason": None}


def _last_piece(
    job: Job, body: ChatFields, choice: Choice, delta: CompletionDelta, parsed: ParsedDelta
) -> dict[str, Any]:
    """The choice of a chunk that carries all of ``delta``'s tokens, and the end."""
    result = _piece(choice.index, parsed)
    if delta.finish_reason is not None:
        reason = choice.reply.finish_reason  # of all that has come, also where more than this delta came at once
        result |= {"finish_reason": reason, "stop_reason": delta.stop_reason, **choice.cut()}
    if body.logprobs and delta.token_ids:
        num_top = body.top_logprobs or 0
        tokens = job.place(choice, delta.token_ids, last=delta.finish_reason is not None)
        result["logprobs"] = chat_logprobs(tokens, delta.logprobs or [], num_top, job.names)
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
