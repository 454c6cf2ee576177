"""Input items of the Responses API as the messages of a chat, and the output's items likewise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import RequestError

Message = dict[str, Any]


def input_messages(given: str | Sequence[Mapping[str, Any]], history: Sequence[Message]) -> list[Message]:
    """``history`` continued by ``given``: calls and thoughts join the assistant's message that they belong to."""
    messages = [dict(message) for message in history]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for position, item in enumerate(given):
        _add_item(messages, item, f"input[{position}]")
    return messages


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """``messages`` behind one system message: most templates allow only one, at the beginning."""
    texts = [instructions] if instructions else []
    rest = list(messages)
    while rest and rest[0].get("role") in ("system", "developer"):
        texts.append(_text(rest.pop(0).get("content")))
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _add_item(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, item, where)
    elif kind == "reasoning":
        message = _open_assistant(messages, for_thought=True)
        message["reasoning"] = message.get("reasoning", "") + _reasoning_text(item)
    elif kind == "function_call":
        _check_strings(item, ("call_id", "name", "arguments"), where)
        call = {"name": item["name"], "arguments": item["arguments"]}
        message = _open_assistant(messages)
        whole = {"id": item["call_id"], "type": "function", "function": call}
        message["tool_calls"] = [*message.get("tool_calls", ()), whole]
    elif kind == "function_call_output":
        _check_strings(item, ("call_id",), where)
        messages.append(_tool_message(messages, item))
    elif kind == "item_reference":
        raise RequestError(
            f"{where} refers to a stored item: send the item itself, or `previous_response_id`.", param="input"
        )
    else:
        raise RequestError(
            f"{where} is of type {kind!r}; this server reads message, reasoning, function_call and "
            "function_call_output.",
            param="input",
        )


def _add_message(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{where} must have a role.", param="input")
    if role == "assistant":
        _open_assistant(messages, for_text=True)["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _open_assistant(messages: list[Message], *, for_thought: bool = False, for_text: bool = False) -> Message:
    """The assistant's message that the next item belongs to: a thought comes before text, text before calls."""
    last: Message = messages[-1] if messages else {}
    full = (for_thought or for_text) and (last.get("content") or last.get("tool_calls"))
    if last.get("role") != "assistant" or full:
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _tool_message(messages: Iterable[Message], item: Mapping[str, Any]) -> Message:
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    message = {"role": "tool", "tool_call_id": item["call_id"], "content": item.get("output", "")}
    # Some templates name the function beside its result.
    return message | ({"name": names[item["call_id"]]} if item["call_id"] in names else {})


def _reasoning_text(item: Mapping[str, Any]) -> str:
    return _text(item.get("content")) or _text(item.get("summary"))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and "text" in part)


def _check_strings(item: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            raise RequestError(f"{where}.{name} must be a string.", param="input")
