"""From a chat's fields to a prompt and its parsers. Every route that takes messages comes through here."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from engine.openai.schema.backend import ServedEngine, ServedParser
from engine.openai.schema.protocol import ChatFields, TemplateFields
from engine.openai.schema.validation import check_chat
from engine.openai.serving.generation import Port, Prompt, open_request, sampling_params, start_job, truncate
from engine.openai.serving.replies import ChatJob, Reply
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PreparedChat:
    """Conversations ready to run: a prompt each; sampling values and constraints of all."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    constraints: Constraints | None


async def prepare_chat(port: Port, body: ChatFields, conversations: Sequence[Messages]) -> PreparedChat:
    """Check ``body`` and render its conversations. Raises RequestError."""
    port.check_model(body.model)
    check_chat(body, port.engine)
    port.check_template(body.chat_template, body.chat_template_kwargs)
    params = _params(port.engine, body)

    hides_tools = port.options.exclude_tools_when_tool_choice_none and body.tool_choice == "none"
    shown = body.model_copy(update={"tools": []}) if hides_tools else body

    def render() -> list[Prompt]:
        return [_prompt(port.engine, shown, messages, params) for messages in conversations]

    return PreparedChat(await asyncio.to_thread(render), params, _constraints(body))


async def start_chat(
    port: Port, http: Request, body: ChatFields, conversations: Sequence[Messages], *, prefix: str = "chatcmpl"
) -> ChatJob:
    """Submit a chat's conversations; each choice gets its own parser. Raises RequestError."""
    prepared = await prepare_chat(port, body, conversations)
    parsers = [[_parser(port.engine, body, prompt) for _ in range(prepared.params.n)] for prompt in prepared.prompts]
    flat = [parser for group in parsers for parser in group]
    params = prepared.params
    if any(parser.needs_special_tokens for parser in flat):
        params = params.replace(skip_special_tokens=False)
    job = await start_job(port, prefix, http, body, prepared.prompts, params, prepared.constraints)
    for stream, prompt in zip(job.streams, prepared.prompts, strict=True):
        stream.parsing, stream.template_kwargs = _parsing(body, prompt), template_kwargs(body)
    replies = [Reply(choice, parser, body.include_reasoning) for choice, parser in zip(job.choices, flat, strict=True)]
    return ChatJob(job, replies)


async def finish_chat(port: Port, http: Request, chat: ChatJob) -> None:
    """Run ``chat`` to its end, or until the client leaves or the port closes."""
    async with open_request(port, http, chat.job):
        async for _ in chat.deltas():
            pass


def render_prompt(engine: ServedEngine, body: TemplateFields, messages: Messages) -> str:
    """The prompt text of ``messages``: the one place where a request's fields meet the template."""
    return engine.render_chat(
        [_known_role(message) for message in messages],
        tools=body.tools or None,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=template_kwargs(body),
    )


def template_kwargs(body: TemplateFields) -> dict[str, Any]:
    """The template's variables: ``chat_template_kwargs``, then what other fields mean to templates."""
    kwargs = dict(body.chat_template_kwargs)
    if body.documents is not None:
        kwargs["documents"] = body.documents
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        kwargs.setdefault("enable_thinking", body.reasoning_effort != "none")
    return kwargs


def _known_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """``developer`` is OpenAI's newer word for ``system``; most templates know only the older one."""
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


def _params(engine: ServedEngine, body: ChatFields) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_params(engine, body, max_tokens=max_tokens, logprobs=logprobs)


def _constraints(body: ChatFields) -> Constraints | None:
    return Constraints.from_request(
        structured_outputs=body.structured_outputs,
        response_format=body.response_format,
        tools=body.tools or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        thinking_token_budget=body.thinking_token_budget,
        repetition_detection=body.repetition_detection,
    )


def _prompt(engine: ServedEngine, body: ChatFields, messages: Messages, params: SamplingParams) -> Prompt:
    text = render_prompt(engine, body, messages)
    token_ids = engine.tokenize(text, add_special_tokens=body.add_special_tokens)
    return Prompt(truncate(token_ids, body, params.max_tokens, engine.plan.max_model_len), text)


def _parser(engine: ServedEngine, body: ChatFields, prompt: Prompt) -> ServedParser:
    return engine.output_parser(**_parsing(body, prompt))


def _parsing(body: ChatFields, prompt: Prompt) -> dict[str, Any]:
    return {
        "tools": body.tools or None,
        "tool_choice": body.tool_choice,
        "prompt": prompt.text or "",
        "parallel_tool_calls": body.parallel_tool_calls,
    }
