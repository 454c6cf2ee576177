"""A chat's fields as the engine's requests. Every route that takes messages comes through here."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import Request

from engine.chat.request import ChatRequest, Message, PreparedRequest, TemplateOptions
from engine.openai.schema.protocol import ChatCompletionRequest, ChatFields, TemplateFields
from engine.openai.schema.validation import check_chat
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.generation import Job, Port, make_prompts, sampling_params, start_job, truncation
from engine.params.sampling_params import SamplingParams

Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]


async def prepare_chat(
    port: Port,
    body: ChatFields,
    conversations: Sequence[Messages],
    *,
    shown_tools: Tools | None = None,
    notes: Sequence[str] = (),
    folds_system: bool = False,
) -> list[PreparedRequest]:
    """Check ``body`` and prepare its conversations. Raises RequestError.

    ``shown_tools`` are those of the prompt, None: all of ``body``. ``notes`` are lines for ``explain``.
    ``folds_system``: see :class:`TemplateOptions`.
    """
    port.check_model(body.model)
    check_chat(body, port.engine.preparer.parsers.tool_call_parser)
    port.check_template(body.chat_template, body.chat_template_kwargs)
    params = _params(port.engine, body)
    if port.options.exclude_tools_when_tool_choice_none and body.tool_choice == "none":
        shown_tools = ()

    def prepare() -> list[PreparedRequest]:
        requests = (
            chat_request(body, messages, params, shown_tools, notes, folds_system) for messages in conversations
        )
        return [port.engine.prepare(request) for request in requests]

    own_template = body.chat_template is not None and body.chat_template not in port.engine.preparer.template.named
    if body.tools or body.documents or own_template:
        return await asyncio.to_thread(prepare)
    asked = (body.structured_outputs, body.response_format, body.chat_template_kwargs)
    return await make_prompts(prepare, (conversations, asked))


async def start_chat(
    port: Port,
    http: Request,
    body: ChatFields,
    conversations: Sequence[Messages],
) -> Job:
    """Submit a chat's conversations; each choice gets its own parser. Raises RequestError."""
    with port.admission.place(len(conversations), body.n) as place:
        prepared = await prepare_chat(port, body, conversations)
        return await start_job(port, "chatcmpl", http, body, prepared, place, keeps_reasoning=body.include_reasoning)


class ReadChat(Protocol):
    """A request of another API as a chat."""

    @property
    def chat(self) -> ChatCompletionRequest:
        """Its one conversation, and what is asked of the reply."""

    @property
    def shown_tools(self) -> Tools:
        """The tools that the prompt lists."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for ``explain``."""


async def prepare_read(port: Port, read: ReadChat) -> PreparedRequest:
    """Check and prepare what was read; system messages are folded. Raises RequestError."""
    found = await prepare_chat(
        port, read.chat, [read.chat.messages], shown_tools=read.shown_tools, notes=read.notes, folds_system=True
    )
    return found[0]


async def start_read(port: Port, http: Request, read: ReadChat, prefix: str) -> Job:
    """Submit what was read. Raises RequestError."""
    with port.admission.place(1, read.chat.n) as place:
        prepared = await prepare_read(port, read)
        keeps_reasoning = read.chat.include_reasoning
        return await start_job(port, prefix, http, read.chat, [prepared], place, keeps_reasoning=keeps_reasoning)


def chat_request(
    body: ChatFields,
    messages: Messages,
    params: SamplingParams,
    shown_tools: Tools | None = None,
    notes: Sequence[str] = (),
    folds_system: bool = False,
) -> ChatRequest:
    """What ``body`` asks for one of its conversations."""
    return ChatRequest(
        messages=messages,
        sampling=params,
        tools=body.tools or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        structured_outputs=body.structured_outputs,
        response_format=body.response_format,
        thinking_token_budget=body.thinking_token_budget,
        repetition_detection=body.repetition_detection,
        truncation=truncation(body),
        template=template_options(body, shown_tools, folds_system),
        notes=notes,
    )


def template_options(
    body: TemplateFields, shown_tools: Tools | None = None, folds_system: bool = False
) -> TemplateOptions:
    """How the messages of ``body`` become a prompt."""
    return TemplateOptions(
        chat_template=body.chat_template,
        kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        shown_tools=shown_tools,
        folds_system=folds_system,
    )


def _params(engine: ServedEngine, body: ChatFields) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_params(engine, body, max_tokens=max_tokens, logprobs=logprobs)
