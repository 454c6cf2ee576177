"""A request of Anthropic's Messages API as a chat: its messages, tools and thinking in OpenAI's form."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.messages_protocol import CountTokensRequest, MessagesRequest
from engine.openai.schema.protocol import ChatCompletionRequest, JsonObject

_OWN_NAMES = {"messages", "tools", "tool_choice", "max_tokens", "stream", "reasoning_effort"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The chat that ``body`` asks for: fields that both APIs share keep their names."""
    shared = (
        body.model_fields_set & type(body).model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    ) - _OWN_NAMES
    fields: dict[str, Any] = {name: getattr(body, name) for name in shared}
    fields |= {
        "n": 1,
        "messages": [*_system(body.system), *chat_messages(body.messages)],
        "tools": [_chat_tool(tool, f"tools[{position}]") for position, tool in enumerate(body.tools)],
        "chat_template_kwargs": _template_kwargs(body),
        "reasoning_effort": body.output_config.effort or body.reasoning_effort,
    }
    if body.tool_choice is not None:
        fields |= _chat_tool_choice(body.tool_choice)
    if isinstance(body, MessagesRequest):
        fields["max_tokens"] = body.max_tokens
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
    if body.output_config.format is not None:
        fields["response_format"] = _response_format(body.output_config.format)
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        fields.setdefault("thinking_token_budget", body.thinking.budget_tokens)
    return ChatCompletionRequest.model_validate(fields)


def _template_kwargs(body: CountTokensRequest) -> JsonObject:
    """``thinking`` is the template's ``enable_thinking``, unless that was given itself."""
    kwargs = dict(body.chat_template_kwargs)
    if body.thinking is not None:
        kwargs.setdefault("enable_thinking", body.thinking.type != "disabled")
    return kwargs


def _system(system: str | list[JsonObject] | None) -> list[JsonObject]:
    text = _joined(system, "system") if system else ""
    return [{"role": "system", "content": text}] if text else []


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[JsonObject]:
    """Anthropic's messages as OpenAI's: tool results become messages of their own, before the user's text."""
    names: dict[str, str] = {}
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{where}.role must be 'user' or 'assistant', got {role!r}.", param="messages")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif role == "assistant":
            yield _assistant_message(_blocks(content, where), where, names)
        else:
            yield from _user_messages(role, _blocks(content, where), where, names)


def _blocks(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise RequestError(f"{where}.content must be a string or a list of blocks.", param="messages")
    return content


def _assistant_message(blocks: Sequence[Mapping[str, Any]], where: str, names: dict[str, str]) -> JsonObject:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[JsonObject] = []
    for position, block in enumerate(blocks):
        at = f"{where}.content[{position}]"
        if block.get("type") == "thinking":
            thoughts.append(_text_of(block, "thinking", at))
        elif block.get("type") == "tool_use":
            call_id, name = _text_of(block, "id", at), _text_of(block, "name", at)
            names[call_id] = name
            function = {"name": name, "arguments": block.get("input")}
            calls.append({"id": call_id, "type": "function", "function": function})
        else:
            texts.append(_block_text(block, at))
    message: JsonObject = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _user_messages(
    role: str, blocks: Sequence[Mapping[str, Any]], where: str, names: Mapping[str, str]
) -> Iterator[JsonObject]:
    texts: list[str] = []
    for position, block in enumerate(blocks):
        at = f"{where}.content[{position}]"
        if block.get("type") == "tool_result":
            call_id = _text_of(block, "tool_use_id", at)
            result = {"role": "tool", "tool_call_id": call_id, "content": _joined(block.get("content") or "", at)}
            # Some templates name the function beside its result.
            yield result | ({"name": names[call_id]} if call_id in names else {})
        else:
            texts.append(_block_text(block, at))
    if texts or not blocks:
        yield {"role": role, "content": "\n".join(texts)}


def _joined(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = _blocks(content, where)
    return "\n".join(_block_text(block, f"{where}[{position}]") for position, block in enumerate(blocks))


def _block_text(block: Mapping[str, Any], where: str) -> str:
    kind = block.get("type")
    if kind == "text":
        return _text_of(block, "text", where)
    if kind in ("image", "document"):
        raise RequestError(
            f"{where} is of type {kind!r}, but this engine serves text only: at most 0 {kind}(s) may be provided "
            "in one prompt.",
            param="messages",
        )
    raise RequestError(f"{where} is of type {kind!r}, which this server does not accept here.", param="messages")


def _text_of(block: Mapping[str, Any], name: str, where: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{name} must be a string.", param="messages")
    return text


def _chat_tool(tool: JsonObject, where: str) -> JsonObject:
    if tool.get("type", "custom") != "custom":
        raise RequestError(
            f"{where} is of type {tool['type']!r}: this server runs no tools itself, so only tools with an "
            "input_schema can be offered; leave it out.",
            param="tools",
        )
    described = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": tool.get("name"), **described, "parameters": tool.get("input_schema", {})}
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: JsonObject) -> JsonObject:
    kind = choice.get("type")
    if kind == "tool":
        chosen: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES:
        chosen = _CHOICES[kind]
    else:
        raise RequestError(f"tool_choice.type must be auto, any, tool or none, got {kind!r}.", param="tool_choice")
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}


def _response_format(format: JsonObject) -> JsonObject:
    if format.get("type") != "json_schema":
        raise RequestError("output_config.format.type must be json_schema.", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format.get("schema")}}
