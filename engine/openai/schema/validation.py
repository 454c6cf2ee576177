"""Fields that this engine cannot honour are refused by name; unknown ones are logged, as vLLM does."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.errors import RequestError
from engine.openai.http.request_id import request_logger
from engine.openai.schema.protocol import ChatFields, GenerationFields, RequestBody
from engine.params.sampling_params import MAX_LOGPROBS
from engine.params.tool_choice import demanded_names, refuse_kind
from engine.text.guide.tool_grammar import check_callable

logger = request_logger("engine.openai")


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused; ``neutral`` values ask for nothing and pass."""

    why: str
    neutral: tuple[Any, ...] = ()


_MOST_NAMED = 20
_NOT_YET = "is not supported by this version of the engine"
_GUIDED = Refusal(f"{_NOT_YET}: it is the old name, use `structured_outputs`", ({}, []))
_MEDIA = Refusal(f"{_NOT_YET}: it serves text only", ({},))
_BEAM = Refusal(f"{_NOT_YET}: there is no beam search, leave the field out")
_OTHER = Refusal(f"{_NOT_YET}: leave the field out", ({}, []))

REFUSED_FIELDS: dict[str, Refusal] = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _GUIDED),
    "use_beam_search": Refusal(_BEAM.why, (False,)),
    "length_penalty": Refusal(_BEAM.why, (1.0, 1)),
    "best_of": Refusal(f"{_NOT_YET}: ask for n completions and choose yourself", (1,)),
    "suffix": Refusal(f"{_NOT_YET}: there is no fill-in-the-middle", ("",)),
    "prompt_embeds": Refusal(f"{_NOT_YET}: send a prompt"),
    "functions": Refusal(f"{_NOT_YET}: it is deprecated, use `tools`", ([],)),
    "function_call": Refusal(f"{_NOT_YET}: it is deprecated, use `tool_choice`", ("none", "auto")),
    "modalities": Refusal(_MEDIA.why, (["text"], [])),
    "audio": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
    "logprob_token_ids": _OTHER,
    "kv_transfer_params": _OTHER,
    "ec_transfer_params": _OTHER,
    "vllm_xargs": _OTHER,
    "stream_interval": Refusal(f"{_NOT_YET}: every token is sent at once, leave the field out", (1,)),
}
"""Fields of OpenAI's and vLLM's APIs whose meaning would be lost if they were ignored."""


RESPONSES_REFUSED_FIELDS: dict[str, Refusal] = {
    "prompt": Refusal(f"{_NOT_YET}: stored prompt templates are OpenAI's, send `input` and `instructions`"),
    "conversation": Refusal(f"{_NOT_YET}: use `previous_response_id`"),
    "enable_response_messages": Refusal(_OTHER.why, (False,)),
    "previous_input_messages": Refusal(f"{_NOT_YET}: use `previous_response_id` or send the items as `input`", ([],)),
    "context_management": _OTHER,
}
"""More of them, for the Responses API."""

MESSAGES_REFUSED_FIELDS: dict[str, Refusal] = {
    "compaction": Refusal(f"{_NOT_YET}: ask for a summary in a message"),
    "thread": Refusal(f"{_NOT_YET}: it keeps no conversations, send all messages"),
    "response_format": Refusal("is a field of chat completions: send `output_config.format`", ({"type": "text"},)),
}
"""More of them, for the Messages API; its other unknown fields are left out, and ``explain`` says so."""


def check_extra_fields(request: RequestBody, also: Mapping[str, Refusal] = MappingProxyType({})) -> None:
    """Refuse by name what cannot be honoured; log the rest of the unknown fields."""
    ignored = refuse_fields(request, also)
    if ignored:
        logger.warning("The following fields were present in the request but ignored: %s", set(ignored[:_MOST_NAMED]))


def refuse_fields(request: RequestBody, also: Mapping[str, Refusal]) -> list[str]:
    """Refuse by name what cannot be honoured; gives the names of the rest of the unknown fields."""
    ignored = []
    for name, value in (request.model_extra or {}).items():
        refusal = REFUSED_FIELDS.get(name) or also.get(name)
        if refusal is None:
            ignored.append(name)
        elif value not in refusal.neutral:
            raise RequestError(f"`{name}` {refusal.why}.", param=name)
    return ignored


def check_generation(request: GenerationFields) -> None:
    """The rules between fields that both completions share."""
    check_extra_fields(request)
    if request.stream_options is not None and not request.stream:
        raise RequestError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")


def check_chat(request: ChatFields, tool_call_parser: str | None) -> None:
    """The rules between a chat's fields; ``tool_call_parser`` is the engine's, None where there is none."""
    check_generation(request)
    if request.top_logprobs is not None:
        if request.top_logprobs < -1:
            raise RequestError("`top_logprobs` must be a positive value or -1.", param="top_logprobs")
        if request.top_logprobs != 0 and not request.logprobs:
            raise RequestError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
        if request.top_logprobs > MAX_LOGPROBS:
            raise RequestError(
                f"Requested sample logprobs of {request.top_logprobs}, "
                f"which is greater than max allowed: {MAX_LOGPROBS}",
                param="top_logprobs",
            )
    for position, tool in enumerate(request.tools):
        _check_tool(tool, position)
    demanded_names(request.tool_choice, request.tools)
    if request.tools and request.tool_choice in (None, "auto") and tool_call_parser is None:
        raise RequestError(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set: how this model '
            "writes calls cannot be recognised from its chat template. Name a parser, or send tool_choice 'required' "
            "or 'none'.",
            param="tools",
        )


def _check_tool(tool: dict[str, Any], position: int) -> None:
    function = tool.get("function")
    if tool.get("type", "function") != "function":
        raise refuse_kind(f"tools[{position}]", tool["type"], "tools")
    if not isinstance(function, dict):
        raise RequestError(
            f"tools[{position}] must read {{'type': 'function', 'function': {{…}}}}: only functions can be called.",
            param="tools",
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError(f"tools[{position}].function.name must be a non-empty string.", param="tools")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"tools[{position}].function.parameters must be a JSON schema.", param="tools")
    check_callable(function)
