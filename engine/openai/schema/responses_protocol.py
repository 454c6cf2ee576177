"""The Responses API's request, and how it becomes a chat's fields."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from engine.errors import RequestError
from engine.openai.schema.left_out import LeftOut
from engine.openai.schema.protocol import (
    KEEPS_THOUGHTS,
    ChatCompletionRequest,
    Effort,
    JsonObject,
    ReplyFields,
    RequestBody,
    SamplingFields,
    TemplateFields,
)
from engine.openai.schema.responses_tools import ClientTool, Toolbox
from engine.params.tool_choice import refuse_kind

_THOUGHT, _LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
_OF_HOSTED_TOOLS = ("web_search_call.", "file_search_call.", "code_interpreter_call.", "computer_call_output.")
"""Beginnings of what `include` asks about tools that are left out: there is nothing to include."""
_OWN_NAMES = {"chat_template_kwargs", "tools", "tool_choice", "stream", "top_logprobs", "reasoning_effort"}


class ReasoningOptions(RequestBody):
    """How much to think. There is no ``summary``: the thought itself is sent in full."""

    effort: Effort | None = None
    context: str | None = None
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
    client_metadata: JsonObject = Field(default_factory=dict)

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer's tokens come with their log-probabilities."""
        return _LOGPROBS in self.include

    @property
    def seals_thoughts(self) -> bool:
        """Whether thoughts come with an ``encrypted_content`` that can be sent back."""
        return _THOUGHT in self.include


def check_responses(body: ResponsesRequest) -> None:
    """The rules between a response's fields. Raises RequestError."""
    if body.background and not body.store:
        raise RequestError("`background` can only be used when `store` is true.", param="background")
    for name in body.include:
        if name not in (_THOUGHT, _LOGPROBS) and not name.startswith(_OF_HOSTED_TOOLS):
            raise RequestError(
                f"include cannot name {name!r}: this server knows {_THOUGHT} and {_LOGPROBS}.", param="include"
            )
    if body.top_logprobs and not body.with_logprobs:
        raise RequestError("`top_logprobs` needs 'message.output_text.logprobs' in `include`.", param="top_logprobs")


@dataclass(frozen=True)
class ChatOfRequest:
    """A request as a chat. ``written`` is the custom tool whose input is the whole answer: its grammar was demanded."""

    chat: ChatCompletionRequest
    written: ClientTool | None


def chat_request(
    body: ResponsesRequest,
    messages: list[dict[str, Any]],
    toolbox: Toolbox,
    left_out: LeftOut,
    variables: Set[str] = frozenset(),
) -> ChatOfRequest:
    """The chat that ``body`` asks for: fields that both APIs share keep their names. Raises RequestError.

    ``variables`` are those that the chat template reads.
    """
    shared = (
        body.model_fields_set & type(body).model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    ) - _OWN_NAMES
    fields: dict[str, Any] = {name: getattr(body, name) for name in shared}
    fields |= {
        "messages": messages,
        "n": 1,
        "max_completion_tokens": body.max_output_tokens,
        "tools": toolbox.functions(),
        "reasoning_effort": body.reasoning.effort or body.reasoning_effort,
        "chat_template_kwargs": _template_kwargs(body, left_out, variables),
    }
    if body.with_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.truncation == "auto":
        fields.setdefault("truncate_prompt_tokens", -1)
    if response_format := _response_format(body.text.format):
        fields["response_format"] = response_format
    if body.text.verbosity is not None:
        left_out.add("text.verbosity", "chat templates have no place for it")
    written = _written_tool(body, toolbox)
    if written is not None:
        fields |= _free_text(body, written)
    elif body.tools or toolbox.tools:
        fields["tool_choice"] = _chat_tool_choice(body.tool_choice, toolbox)
    for tool in toolbox.tools:
        if tool.grammar is not None and tool is not written:
            why = "it is shown to the model, and enforced only where tool_choice names the tool"
            left_out.add(f"the grammar of the tool {tool.name}", why)
    return ChatOfRequest(ChatCompletionRequest.model_validate(fields), written)


def _template_kwargs(body: ResponsesRequest, left_out: LeftOut, variables: Set[str]) -> dict[str, Any]:
    """The request's own, and what keeps the thoughts of earlier turns in the prompt, where that is asked for."""
    if body.reasoning.context != "all_turns":
        return body.chat_template_kwargs
    keeping = {name: value for name, value in KEEPS_THOUGHTS.items() if name in variables}
    if not keeping:
        left_out.add("reasoning.context", "the chat template alone says which thoughts it shows")
    return keeping | body.chat_template_kwargs


def _written_tool(body: ResponsesRequest, toolbox: Toolbox) -> ClientTool | None:
    """The custom tool with a grammar that ``tool_choice`` names: a grammar cannot reach into a call's JSON."""
    tool = toolbox.find(body.tool_choice) if isinstance(body.tool_choice, dict) else None
    return tool if tool is not None and tool.grammar is not None else None


def _free_text(body: ResponsesRequest, tool: ClientTool) -> dict[str, Any]:
    if body.structured_outputs:
        raise RequestError(
            f"`tool_choice` demands the grammar of {tool.name!r}: leave `structured_outputs` out.",
            param="structured_outputs",
        )
    assert tool.grammar is not None, "only a tool with a grammar is written as free text"
    name = "grammar" if tool.grammar["syntax"] == "lark" else "regex"
    text = {"structured_outputs": {name: tool.grammar["definition"]}}
    return {"tool_choice": "none", "response_format": None, **text}


def _chat_tool_choice(choice: str | JsonObject, toolbox: Toolbox) -> str | JsonObject | None:
    if isinstance(choice, str):
        return choice if toolbox.tools or choice not in ("auto", "none") else None
    if "function" in choice:
        return choice
    if choice.get("type") not in ("function", "custom", "tool_search"):
        raise refuse_kind("tool_choice", choice.get("type"), "tool_choice")
    tool = toolbox.find(choice)
    name = choice.get("name") if tool is None else tool.model_name
    return {"type": "function", "function": {"name": name}}


def _response_format(format: JsonObject) -> JsonObject | None:
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        return {"type": kind, kind: {name: value for name, value in format.items() if name != "type"}}
    return format
