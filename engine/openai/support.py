"""Fields that this engine cannot honour are refused by name; unknown ones are logged, as vLLM does."""

import logging
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.openai.protocol import ChatCompletionRequest, GenerationFields, RequestBody

logger = logging.getLogger("engine.openai")


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused; ``neutral`` values ask for nothing and pass."""

    why: str
    neutral: tuple[Any, ...] = ()


_NOT_YET = "is not supported by this version of the engine"
_STRUCTURED = Refusal(f"{_NOT_YET}: structured output is not built in yet, leave the field out", ({}, []))
_MEDIA = Refusal(f"{_NOT_YET}: it serves text only", ({},))
_BEAM = Refusal(f"{_NOT_YET}: there is no beam search, leave the field out")
_OTHER = Refusal(f"{_NOT_YET}: leave the field out", ({}, []))

REFUSED_FIELDS: dict[str, Refusal] = {
    "response_format": Refusal(
        f"{_NOT_YET} for JSON output; use {{'type': 'text'}} or leave it out", ({"type": "text"}, {})
    ),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"), _STRUCTURED
    ),
    "use_beam_search": Refusal(_BEAM.why, (False,)),
    "length_penalty": Refusal(_BEAM.why, (1.0, 1)),
    "best_of": Refusal(f"{_NOT_YET}: ask for n completions and choose yourself", (1,)),
    "suffix": Refusal(f"{_NOT_YET}: there is no fill-in-the-middle", ("",)),
    "prompt_embeds": Refusal(f"{_NOT_YET}: send a prompt"),
    "functions": Refusal(f"{_NOT_YET}: it is deprecated, and tools are not built in yet", ([],)),
    "function_call": Refusal(f"{_NOT_YET}: it is deprecated, and tools are not built in yet", ("none",)),
    "thinking_token_budget": Refusal(f"{_NOT_YET}: there is no thinking budget yet", (-1,)),
    "thinking_budget": Refusal(f"{_NOT_YET}: there is no thinking budget yet", (-1,)),
    "include_reasoning": Refusal(f"{_NOT_YET}: reasoning is not separated from the text yet", (True,)),
    "echo": Refusal(f"{_NOT_YET} in chats: use /v1/completions for it", (False,)),
    "modalities": Refusal(_MEDIA.why, (["text"], [])),
    "audio": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
    "logprob_token_ids": _OTHER,
    "repetition_detection": _OTHER,
    "kv_transfer_params": _OTHER,
    "ec_transfer_params": _OTHER,
    "vllm_xargs": _OTHER,
}
"""Fields of OpenAI's and vLLM's APIs whose meaning would be lost if they were ignored."""


def check_extra_fields(request: RequestBody) -> None:
    """Refuse by name what cannot be honoured; log the rest of the unknown fields."""
    ignored = []
    for name, value in (request.model_extra or {}).items():
        refusal = REFUSED_FIELDS.get(name)
        if refusal is None:
            ignored.append(name)
        elif value not in refusal.neutral:
            raise RequestError(f"`{name}` {refusal.why}.", param=name)
    if ignored:
        logger.warning("The following fields were present in the request but ignored: %s", set(ignored))


def check_generation(request: GenerationFields) -> None:
    """The rules between fields that both completions share."""
    check_extra_fields(request)
    if request.stream_options is not None and not request.stream:
        raise RequestError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")


def check_chat(request: ChatCompletionRequest) -> None:
    """The rules between a chat's fields."""
    check_generation(request)
    if request.top_logprobs is not None:
        if request.top_logprobs < -1:
            raise RequestError("`top_logprobs` must be a positive value or -1.", param="top_logprobs")
        if request.top_logprobs != 0 and not request.logprobs:
            raise RequestError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    if request.tools and request.tool_choice != "none":
        raise RequestError(
            f"`tools` with tool_choice {request.tool_choice or 'auto'!r} {_NOT_YET}: tool calls are not parsed "
            "yet; send tool_choice 'none' or leave the tools out.",
            param="tools",
        )
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise RequestError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
