"""What ``LLM.generate``, ``chat`` and ``stream`` are given, as requests; and waiting for a list of them."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from engine.chat.request import ChatRequest, Message, PromptRequest, TemplateOptions
from engine.errors import RequestError
from engine.handover import interruptible
from engine.outputs import RequestOutput
from engine.params.sampling_params import PARAMETERS, SamplingParams
from engine.runtime.stream import RequestStream

_TEMPLATE_OPTIONS = {
    "add_generation_prompt": "add_generation_prompt",
    "continue_final_message": "continue_final_message",
    "chat_template": "chat_template",
    "chat_template_kwargs": "kwargs",
    "reasoning_effort": "reasoning_effort",
    "documents": "documents",
}
"""Keywords of a chat, and what :class:`TemplateOptions` calls them."""
CHAT_OPTIONS = ("tools", "tool_choice", *_TEMPLATE_OPTIONS)
"""Keywords of a chat: its tools, and how messages become a prompt."""
_REFUSED = {
    "lora_request": "LoRA adapters are not in this version; leave it out",
    "mm_processor_kwargs": "this engine serves text only; leave it out",
    "chat_template_content_format": "LLM(model, chat_template_content_format=…) takes it",
    "tokenization_kwargs": "leave it out, or tokenize yourself and give token ids to generate()",
    "priority": "llm.submit_prompt(prompt, params, priority=…) takes it",
}
"""Keywords of vLLM's ``LLM.chat`` that are refused, with what to do instead."""
Request = ChatRequest | PromptRequest
Default = Callable[[], SamplingParams]
"""The sampling values of a request that gives none."""


def prompt_requests(
    prompts: Any, given: SamplingParams | Sequence[SamplingParams] | None, default: Default
) -> list[Request]:
    """What ``LLM.generate`` submits. Raises RequestError."""
    wanted = prompt_list(prompts)
    each = params_of_each(given, len(wanted), default)
    return [
        PromptRequest(prompt=one_prompt(prompt), sampling=params) for prompt, params in zip(wanted, each, strict=True)
    ]


def chat_requests(
    messages: Any,
    given: SamplingParams | Sequence[SamplingParams] | None,
    default: Default,
    keywords: Mapping[str, Any],
) -> list[Request]:
    """What ``LLM.chat`` submits; ``keywords`` are those of :data:`CHAT_OPTIONS`. Raises RequestError."""
    options = chat_options(keywords)
    conversations = conversation_list(messages)
    each = params_of_each(given, len(conversations), default)
    return [chat_request(one, params, options) for one, params in zip(conversations, each, strict=True)]


def one_request(
    prompt: str | Sequence[int] | Sequence[Message], params: SamplingParams, keywords: Mapping[str, Any]
) -> Request:
    """What ``LLM.stream`` submits: a conversation (messages) with its ``keywords``, or a raw prompt."""
    options = chat_options(keywords)
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return chat_request(prompt, params, options)  # type: ignore[arg-type]
    if options:
        raise RequestError(f"{', '.join(options)}: only for a conversation (a list of messages)")
    return PromptRequest(prompt=prompt, sampling=params)  # type: ignore[arg-type]


def one_conversation(messages: Sequence[Message], params: SamplingParams, keywords: Mapping[str, Any]) -> Request:
    """What ``LLM.achat`` submits. Raises RequestError for a text, as ``LLM.chat``: no raw prompt."""
    conversations = conversation_list(messages)
    if len(conversations) != 1:
        raise RequestError(f"messages must be one conversation, got {len(conversations)}", param="messages")
    return one_request(conversations[0], params, keywords)


def chat_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without what is None. Raises RequestError, with the place where it belongs, for what no chat takes."""
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in CHAT_OPTIONS:
            raise RequestError(f"{name}: {_REFUSED.get(name) or _belongs(name)}", param=name)
    return options


def template_options(options: Mapping[str, Any]) -> TemplateOptions:
    """How messages become a prompt, from the keywords of a chat."""
    given = {ours: options[name] for name, ours in _TEMPLATE_OPTIONS.items() if options.get(name) is not None}
    return TemplateOptions(**given)


def chat_request(messages: Sequence[Message], params: SamplingParams, options: Mapping[str, Any]) -> ChatRequest:
    """The request for one conversation; ``options`` as :func:`chat_options` gives them."""
    return ChatRequest(
        messages=messages,
        sampling=params,
        tools=options.get("tools"),
        tool_choice=options.get("tool_choice"),
        template=template_options(options),
    )


def _belongs(name: str) -> str:
    if name in PARAMETERS:
        return f"give it as SamplingParams({name}=…)"
    return f"not known here; a chat takes sampling_params, {', '.join(CHAT_OPTIONS)}"


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or many as a list. Raises RequestError for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    try:
        many = list(prompts)
    except TypeError:
        raise _no_prompt(prompts) from None
    return [many] if many and isinstance(many[0], Integral) else many


def conversation_list(messages: Any) -> list[Any]:
    """One conversation or many as a list. Raises RequestError for what is neither."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise RequestError(
            f"messages must be a list such as [{{'role': 'user', 'content': …}}], or a list of such lists, "
            f"got {messages!r:.100}",
            param="messages",
        )
    many = list(messages)
    return [many] if many and isinstance(many[0], Mapping) else many


def one_prompt(prompt: Any) -> str | list[int]:
    """A prompt as text or token ids: vLLM also takes ``{"prompt": …}`` and ``{"prompt_token_ids": …}``."""
    if isinstance(prompt, Mapping):
        if not prompt.keys() & {"prompt_token_ids", "prompt"}:
            raise _no_prompt(prompt)
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray) or (isinstance(prompt, Sequence) and bool in map(type, prompt)):
        raise _no_prompt(prompt)
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise _no_prompt(prompt) from None


def _no_prompt(given: Any) -> RequestError:
    must = "a prompt is a string, a list of token ids, or {'prompt': …} or {'prompt_token_ids': …}"
    return RequestError(f"{must}, not {given!r:.100}", param="prompt")


def params_of_each(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int, default: Default
) -> Sequence[SamplingParams]:
    """Sampling values of each of ``count`` requests."""
    if given is None:
        given = default().with_default_max_tokens()
    if isinstance(given, SamplingParams):
        return [given] * count
    if len(given) != count:
        raise RequestError("The lengths of prompts and params must be the same.", param="sampling_params")
    return given


def run_all(
    submit: Callable[[Request], RequestStream], requests: Iterable[Request], *, use_tqdm: bool
) -> list[RequestOutput]:
    """Submit all, wait for all; if anything raises, abort the rest."""
    streams: list[RequestStream] = []
    try:
        for request in requests:
            streams.append(submit(request))
        waited: Iterable[RequestStream] = streams
        if use_tqdm and len(streams) > 1:
            from tqdm.auto import tqdm

            waited = interruptible(tqdm)(streams, desc="Processed prompts")
        return [stream.result() for stream in waited]
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
