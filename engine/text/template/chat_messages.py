"""Chat messages as a template needs them: content as strings or as parts, calls' arguments as objects or as text."""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import nodes

from engine.errors import RequestError

ContentFormat = Literal["string", "openai"]
"""How a template reads ``content``: as a string, or looping over parts as OpenAI's API has them."""


@dataclass(frozen=True)
class MessageForm:
    """The form in which a template takes messages.

    ``strings_as_parts``: strings become parts too. ``call_content``: the content of an assistant's message that has
    calls and no text. ``arguments_as_text``: calls bring their arguments as JSON text, not as objects.
    ``thought_beside_text``: a message with calls may have a text and a thought for ``thinking``.
    """

    content_format: ContentFormat = "string"
    strings_as_parts: bool = False
    call_content: Literal[""] | None = ""
    arguments_as_text: bool = False
    thought_beside_text: bool = True


_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHT_NAMES = ("reasoning", "reasoning_content", "thinking")
_MEDIA_PARTS = ("image", "audio", "video", "file")


def detect_content_format(template: nodes.Template) -> ContentFormat:
    """``openai`` if the template loops over a message's content, else ``string`` (vLLM's rule)."""
    messages = set(_aliases(template, "messages"))
    loops = list(template.find_all(nodes.For))
    message_names = {
        loop.target.name
        for loop in loops
        if isinstance(loop.target, nodes.Name) and _root_name(loop.iter) in messages and not _ends_in_content(loop.iter)
    }
    contents = {
        assign.target.name
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name)
        and _ends_in_content(assign.node)
        and _root_name(assign.node) in message_names
    }
    for loop in loops:
        if _ends_in_content(loop.iter) and _root_name(loop.iter) in message_names | messages:
            return "openai"
        if isinstance(_unfiltered(loop.iter), nodes.Name) and _root_name(loop.iter) in contents:
            return "openai"
    return "string"


def tests_for_string(template: nodes.Template) -> bool:
    """Whether the template asks ``is string`` anywhere, so that it takes both forms of content."""
    return any(test.name == "string" for test in template.find_all(nodes.Test))


def normalise_messages(messages: Sequence[Mapping[str, Any]], form: MessageForm) -> list[dict[str, Any]]:
    """Messages ready for a template. Raises RequestError naming the message that is wrong."""
    if not messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    return [_normalise_message(message, form, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalise_message(message: Mapping[str, Any], form: MessageForm, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role and a content.", param="messages")
    result = {key: value for key, value in message.items() if value is not None}
    content = _content(message.get("content"), where)
    calls = result.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list.", param="messages")
    has_text = bool(content)
    if isinstance(content, list) and form.content_format == "string":
        content = "\n".join(part["text"] for part in content)
    elif isinstance(content, str) and form.strings_as_parts:
        content = [{"type": "text", "text": content}]
    result["content"] = form.call_content if calls and not has_text and form.call_content is None else content
    _name_thought(result, beside_text=form.thought_beside_text or not (calls and has_text))
    if calls:
        result["tool_calls"] = [_tool_call(call, where, as_text=form.arguments_as_text) for call in calls]
    return result


def _name_thought(message: dict[str, Any], *, beside_text: bool) -> None:
    """The message's thought under all names that templates read it by."""
    thought = next((message[name] for name in _THOUGHT_NAMES if name in message), None)
    if thought is not None:
        message["reasoning"] = message["reasoning_content"] = thought
        if beside_text:
            message.setdefault("thinking", thought)


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return [_part(part, where) for part in content]
    raise RequestError(f"{where}.content must be a string or a list of parts.", param="messages")


def _part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get(_TEXT_PARTS[kind]), str):
        return {"type": "text", "text": part[_TEXT_PARTS[kind]]}
    for media in _MEDIA_PARTS:
        if isinstance(kind, str) and media in kind:
            raise RequestError(
                f"{where}.content has a part of type {kind!r}, but this engine serves text only: "
                f"at most 0 {media}(s) may be provided in one prompt.",
                param="messages",
            )
    raise RequestError(f"{where}.content has a part of unknown type {kind!r}; send text parts.", param="messages")


def _tool_call(call: Any, where: str, *, as_text: bool) -> dict[str, Any]:
    """A tool call whose arguments are a mapping, for templates that loop over it, or text, for those that print it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}.tool_calls must hold objects with a function.", param="messages")
    arguments = function.get("arguments")
    read = _arguments_text(arguments) if as_text else call_arguments(arguments)
    return {**call, "function": {**function, "arguments": read}}


class BrokenArguments(Mapping[str, str]):
    """Arguments that are not a JSON object, for a template that wants one: the model sees the text that it wrote.

    Printed, and by ``tojson``, they are that text; for a loop they have it as their only value.
    """

    def __init__(self, text: str) -> None:
        self._only = {"arguments": text}

    def __str__(self) -> str:
        return self._only["arguments"]

    def __getitem__(self, name: str) -> str:
        return self._only[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._only)

    def __len__(self) -> int:
        return len(self._only)


def call_arguments(given: Any) -> Mapping[str, Any]:
    """A call's arguments, JSON text or JSON itself, as the mapping that templates loop over; none are an empty one."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError):
            return BrokenArguments(given)
    if isinstance(value, Mapping):
        return value
    if value in (None, [], ""):  # some clients know only one empty value
        return {}
    return BrokenArguments(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps`` for templates: :class:`BrokenArguments` anywhere in ``value`` are their text."""
    broken: list[str] = []

    def hold(arguments: Any) -> str:
        if not isinstance(arguments, BrokenArguments):
            raise TypeError(f"Object of type {type(arguments).__name__} is not JSON serializable")
        broken.append(str(arguments))
        return f"{_HELD}{len(broken) - 1}"

    text = json.dumps(value, default=hold, **options)
    return re.sub(rf'"{_HELD}(\d+)"', lambda held: broken[int(held[1])], text) if broken else text


_HELD = f"broken-arguments-{secrets.token_hex(16)}-"
"""Holds a place in JSON; nobody else can write it."""


def _arguments_text(arguments: Any) -> str:
    if isinstance(arguments, str) and arguments.strip():
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


def _aliases(template: nodes.Template, name: str) -> Iterator[str]:
    """``name`` and the variables set from it: ``{% set loop_messages = messages[1:] %}``."""
    known = {name}
    yield name
    for assign in template.find_all(nodes.Assign):
        target, value = assign.target, assign.node
        if (
            isinstance(target, nodes.Name)
            and _root_name(value) in known - {target.name}
            and not _ends_in_content(value)
        ):
            known.add(target.name)
            yield target.name


def _unfiltered(node: nodes.Node) -> nodes.Node:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return node


def _ends_in_content(node: nodes.Node) -> bool:
    node = _unfiltered(node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _root_name(node: nodes.Node) -> str | None:
    """The variable that an expression such as ``messages[1:] | list`` starts from."""
    while True:
        node = _unfiltered(node)
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            node = node.node
        elif isinstance(node, nodes.CondExpr):
            node = node.expr1
        else:
            return node.name if isinstance(node, nodes.Name) else None
