"""The Responses API's request, and how it becomes a chat's fields."""

from typing import Any, Literal

from pydantic import Field

from engine.errors import RequestError
from engine.openai.schema.protocol import (
    ChatCompletionRequest,
    Effort,
    JsonObject,
    ReplyFields,
    RequestBody,
    SamplingFields,
    TemplateFields,
)
from engine.params.tool_choice import refuse_kind

_INCLUDABLE = ("reasoning.encrypted_content", "message.output_text.logprobs")
_OWN_NAMES = {"tools", "tool_choice", "stream", "top_logprobs", "reasoning_effort"}


class ReasoningOptions(RequestBody):
    """How much to think. ``summary`` is accepted and ignored: the thought itself is sent in full."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextOptions(RequestBody):
    """The form of the answer."""

    format: JsonObject = Field(default_factory=lambda: {"type": "text"})
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(SamplingFields, TemplateFields, ReplyFields):
    """``POST /v1/responses``: OpenAI's fields, vLLM's, and the chat template's."""

    input: str | list[JsonObject]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    reasoning: ReasoningOptions = Field(default_factory=ReasoningOptions)
    text: TextOptions = Field(default_factory=TextOptions)
    tool_choice: str | JsonObject = "auto"
    top_logprobs: int = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    include: list[str] = Field(default_factory=list)
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer's tokens come with their log-probabilities."""
        return "message.output_text.logprobs" in self.include


def check_responses(body: ResponsesRequest) -> None:
    """The rules between a response's fields. Raises RequestError."""
    if body.background and not body.store:
        raise RequestError("`background` can only be used when `store` is true.", param="background")
    for name in body.include:
        if name not in _INCLUDABLE:
            raise RequestError(
                f"include cannot name {name!r}: this server knows {' and '.join(_INCLUDABLE)}.", param="include"
            )
    if body.top_logprobs and not body.with_logprobs:
        raise RequestError("`top_logprobs` needs 'message.output_text.logprobs' in `include`.", param="top_logprobs")


def chat_request(body: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
    """The chat that ``body`` asks for: fields that both APIs share keep their names."""
    shared = (
        body.model_fields_set & type(body).model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    ) - _OWN_NAMES
    fields: dict[str, Any] = {name: getattr(body, name) for name in shared}
    fields |= {
        "messages": messages,
        "n": 1,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.tools)],
        "tool_choice": _chat_tool_choice(body.tool_choice) if body.tools else None,
        "reasoning_effort": body.reasoning.effort or body.reasoning_effort,
    }
    if body.with_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.truncation == "auto":
        fields.setdefault("truncate_prompt_tokens", -1)
    if response_format := _response_format(body.text.format):
        fields["response_format"] = response_format
    return ChatCompletionRequest.model_validate(fields)


def _chat_tool(tool: JsonObject, where: str) -> JsonObject:
    if tool.get("type") != "function":
        raise refuse_kind(where, tool.get("type"), "tools")
    function = tool.get("function", {key: value for key, value in tool.items() if key != "type" and value is not None})
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: str | JsonObject) -> str | JsonObject:
    if isinstance(choice, str) or "function" in choice:
        return choice
    if choice.get("type") != "function":
        raise refuse_kind("tool_choice", choice.get("type"), "tool_choice")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(format: JsonObject) -> JsonObject | None:
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        return {"type": kind, kind: {name: value for name, value in format.items() if name != "type"}}
    return format
