"""A request of Anthropic's Messages API as a chat: its messages, tools and thinking in OpenAI's form."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, get_args

from engine.errors import RequestError
from engine.openai.schema.left_out import HOSTED, LeftOut
from engine.openai.schema.messages_content import MessageReader
from engine.openai.schema.messages_protocol import CountTokensRequest, MessagesRequest
from engine.openai.schema.messages_tools import OfferedTools
from engine.openai.schema.protocol import KEEPS_THOUGHTS, ChatCompletionRequest, Effort, JsonObject

_OWN_NAMES = {"messages", "tools", "tool_choice", "max_tokens", "stream", "reasoning_effort"}
_ON, _OFF = ("enabled", "adaptive", "between_tools"), ("disabled",)
_UNKNOWN = "this server does not know it"
_FIELDS = {
    "container": HOSTED,
    "fallbacks": "one model is served here",
    "mcp_servers": HOSTED,
    "metadata": "nothing is kept of who asks",
    "service_tier": "all requests are served alike",
    "speed": "there is one speed",
    "thinking.display": "thoughts are sent as the model writes them",
}
"""Fields that change nothing here, and why not."""
_QUIET = frozenset(("betas", "cache_control", "context_management"))
"""Fields without a note: prefixes are cached without being asked, nothing is beta, edits have notes of their own."""


@dataclass(frozen=True)
class ReadRequest:
    """A request as a chat. ``shown_tools`` are those that its prompt lists, ``notes`` lines for ``explain``."""

    chat: ChatCompletionRequest
    shown_tools: list[JsonObject]
    notes: tuple[str, ...]


def read_request(body: CountTokensRequest, variables: Set[str] = frozenset()) -> ReadRequest:
    """The chat that ``body`` asks for: fields that both APIs share keep their names. Raises RequestError.

    ``variables`` are those that the chat template reads.
    """
    left_out = LeftOut()
    tools = OfferedTools(body.tools, left_out)
    reader = MessageReader(tools, left_out)
    messages = [*reader.system(body.system), *reader.messages(body.messages)]
    shared = (
        body.model_fields_set & type(body).model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    ) - _OWN_NAMES
    fields: dict[str, Any] = {name: getattr(body, name) for name in shared}
    fields |= {
        "n": 1,
        "messages": messages,
        "tools": tools.callable,
        "chat_template_kwargs": _edits(body, variables, left_out) | _template_kwargs(body, left_out),
        "reasoning_effort": _effort_of_turn(body) or body.output_config.effort or body.reasoning_effort,
    }
    if body.tool_choice is not None and (tools.callable or body.tool_choice.get("type") not in ("auto", "none")):
        fields |= tools.choice(body.tool_choice)
    if isinstance(body, MessagesRequest):
        fields["max_tokens"] = body.max_tokens
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
    wanted_format = body.output_config.format or body.output_format
    if wanted_format is not None:
        fields["response_format"] = _response_format(wanted_format)
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        fields.setdefault("thinking_token_budget", body.thinking.budget_tokens)
    _note_fields(body, left_out)
    return ReadRequest(ChatCompletionRequest.model_validate(fields), tools.shown, left_out.lines())


def _note_fields(body: CountTokensRequest, left_out: LeftOut) -> None:
    known = [name for name in ("metadata", "service_tier") if name in body.model_fields_set]
    for name in (*known, *(body.model_extra or {})):
        if name not in _QUIET:
            left_out.add(name, _FIELDS.get(name, _UNKNOWN))
    for part, inner in (("output_config", body.output_config), ("thinking", body.thinking)):
        for name in (inner.model_extra or {}) if inner is not None else ():
            left_out.add(f"{part}.{name}", _FIELDS.get(f"{part}.{name}", _UNKNOWN))


def _template_kwargs(body: CountTokensRequest, left_out: LeftOut) -> JsonObject:
    """``thinking`` is the template's ``enable_thinking``, unless that was given itself."""
    kwargs = dict(body.chat_template_kwargs)
    kind = None if body.thinking is None else body.thinking.type
    if kind in (*_ON, *_OFF):
        kwargs.setdefault("enable_thinking", kind in _ON)
    elif kind is not None:
        left_out.add(f"thinking of type {kind!r}", f"this server knows {', '.join((*_ON, *_OFF))}")
    return kwargs


def _edits(body: CountTokensRequest, variables: Set[str], left_out: LeftOut) -> JsonObject:
    """What ``context_management`` asks of the template: only it can keep thoughts."""
    given = (body.model_extra or {}).get("context_management")
    edits = given.get("edits") if isinstance(given, Mapping) else None
    kwargs: JsonObject = {}
    for edit in edits if isinstance(edits, list) else ():
        kind = edit.get("type") if isinstance(edit, Mapping) else edit
        asked = {name: value for name, value in KEEPS_THOUGHTS.items() if name in variables}
        keeps = isinstance(edit, Mapping) and edit.get("keep") == "all"
        if keeps and str(kind).startswith("clear_thinking_") and asked:
            kwargs |= asked
        else:
            left_out.add(f"the edit {kind} of context_management", "the chat template shows the history as it was sent")
    return kwargs


def _effort_of_turn(body: CountTokensRequest) -> str | None:
    """The effort that a system message asks for since the last answer."""
    for message in reversed(body.messages):
        if message.get("role") == "assistant":
            return None
        config = message.get("output_config") if message.get("role") == "system" else None
        effort = config.get("effort") if isinstance(config, Mapping) else None
        if effort is not None:
            if effort not in get_args(Effort):
                raise RequestError(
                    f"output_config.effort must be one of {', '.join(get_args(Effort))}, got {effort!r}.",
                    param="messages",
                )
            return str(effort)
    return None


def _response_format(format: JsonObject) -> JsonObject:
    if format.get("type") != "json_schema":
        raise RequestError("output_config.format.type must be json_schema.", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format.get("schema")}}
