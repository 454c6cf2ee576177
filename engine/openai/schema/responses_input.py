"""Input items of the Responses API as the messages of a chat, and the output's items likewise."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.left_out import LeftOut
from engine.openai.schema.responses_tools import FREE_TEXT, TOOL_SEARCH, GivenTool, Toolbox
from engine.openai.schema.sealed_thought import unseal

Message = dict[str, Any]
Item = Mapping[str, Any]
FindItem = Callable[[str], Item | None]
"""A stored item by its id."""

_ACTIONS = {"local_shell_call": "action", "shell_call": "action", "apply_patch_call": "operation"}
"""Calls with a form of their own, and where their arguments are."""
_OUTPUTS = ("function_call_output", "custom_tool_call_output", *(f"{kind}_output" for kind in _ACTIONS))
_LEFT_OUT = (
    *("web_search_call", "file_search_call", "computer_call", "computer_call_output", "code_interpreter_call"),
    *("image_generation_call", "mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
    *("program", "program_output", "compaction", "compaction_summary"),
)
"""What other servers did or wrote for themselves: it is in old conversations, and no model here can read it."""


def tools_in_input(given: str | Sequence[Item]) -> Iterator[GivenTool]:
    """Tools that input items bring: ``additional_tools``, and what a client's tool search found."""
    for position, item in enumerate([] if isinstance(given, str) else given):
        if item.get("type") in ("additional_tools", "tool_search_output"):
            tools = item.get("tools")
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise RequestError(f"input[{position}].tools must be a list of tools.", param="input")
            for number, tool in enumerate(tools):
                where = f"input[{position}].tools[{number}]"
                yield GivenTool(where, tool, is_found=item["type"] == "tool_search_output")


class InputReader:
    """Continues ``history`` by items: calls and thoughts join the assistant's message that they belong to.

    ``toolbox`` tells what the model calls the client's tools, ``find`` gives stored items by their ids. What cannot be
    read is told to ``left_out``.
    """

    def __init__(self, history: Sequence[Message], toolbox: Toolbox, left_out: LeftOut, find: FindItem) -> None:
        self.messages = [dict(message) for message in history]
        self._toolbox = toolbox
        self._find = find
        self._left_out = left_out

    def read(self, given: str | Sequence[Item]) -> None:
        """Add what ``given`` says. Raises RequestError naming the item that is wrong."""
        if isinstance(given, str):
            self.messages.append({"role": "user", "content": given})
            return
        for position, item in enumerate(given):
            self._add(item, f"input[{position}]")

    def _add(self, item: Item, where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "message":
            self._add_message(item, where)
        elif kind == "reasoning":
            self._add_thought(item)
        elif kind in ("function_call", "custom_tool_call", "tool_search_call", *_ACTIONS):
            self._add_call(str(kind), item, where)
        elif kind in _OUTPUTS:
            self._add_output(item, self._output(item.get("output")), where)
        elif kind == "tool_search_output":
            self._add_output(item, _json(self._toolbox.found_functions(item["tools"])), where)
        elif kind == "item_reference":
            self._add_stored(item, where)
        elif kind in _LEFT_OUT:
            self._left_out.add(f"{kind} of `input`", "only the server that wrote it can read it")
        elif kind != "additional_tools":  # which tools_in_input reads
            raise RequestError(
                f"{where} is of type {kind!r}; this server reads message, reasoning, item_reference, additional_tools, "
                "and the calls of functions, custom tools, tool_search, shells and apply_patch with their outputs.",
                param="input",
            )

    def _add_message(self, item: Item, where: str) -> None:
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str):
            raise RequestError(f"{where} must have a role.", param="input")
        if role == "assistant":
            self._open_assistant(for_text=True)["content"] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _add_thought(self, item: Item) -> None:
        sealed = item.get("encrypted_content")
        text = _text(item.get("content")) or unseal(sealed) or _text(item.get("summary"))
        if text:
            message = self._open_assistant(for_thought=True)
            message["reasoning"] = message.get("reasoning", "") + text
        elif sealed:
            self._left_out.add("a thought of `input`", "its encrypted_content is damaged, or another server's")

    def _add_call(self, kind: str, item: Item, where: str) -> None:
        call_id = _call_id(item, where)
        if kind == "function_call":
            _check_strings(item, ("name", "arguments"), where)
            arguments = item["arguments"]
        elif kind == "custom_tool_call":
            _check_strings(item, ("name", "input"), where)
            arguments = _json({FREE_TEXT: item["input"]})
        else:
            given = item.get(_ACTIONS.get(kind, "arguments"))
            arguments = given if isinstance(given, str) else _json(given or {})
        name = item.get("name", TOOL_SEARCH if kind == "tool_search_call" else kind.removesuffix("_call"))
        function = {"name": self._toolbox.model_name(name, item.get("namespace")), "arguments": arguments}
        message = self._open_assistant()
        message["tool_calls"] = [
            *message.get("tool_calls", ()),
            {"id": call_id, "type": "function", "function": function},
        ]

    def _add_output(self, item: Item, content: Any, where: str) -> None:
        call_id = _call_id(item, where)
        calls = (call for message in self.messages for call in message.get("tool_calls", ()))
        names = {call["id"]: call["function"]["name"] for call in calls}
        # Some templates name the function beside its result.
        named = {"name": names[call_id]} if call_id in names else {}
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content, **named})

    def _output(self, output: Any) -> Any:
        """A result as a message's content. What is not text is named in its place: the client cannot take it back."""
        if output is None or isinstance(output, str):
            return output or ""
        if not isinstance(output, list) or not all(isinstance(part, Mapping) and "type" in part for part in output):
            return _json(output)
        return [self._output_part(part) for part in output]

    def _output_part(self, part: Item) -> Item:
        if isinstance(part.get("text"), str):
            return part
        kind = str(part["type"]).removeprefix("input_")
        self._left_out.add(f"{part['type']} of a tool's result", "this engine serves text only")
        return {"type": "text", "text": f"[{kind} left out: only text can be read here]"}

    def _add_stored(self, item: Item, where: str) -> None:
        item_id = item.get("id")
        stored = self._find(item_id) if isinstance(item_id, str) else None
        if stored is None:
            raise RequestError(
                f"{where} refers to an item that is not stored here: send the item itself, or `previous_response_id`.",
                param="input",
            )
        self._add(stored, where)

    def _open_assistant(self, *, for_thought: bool = False, for_text: bool = False) -> Message:
        """The assistant's message that the next item belongs to: a thought comes before text, text before calls."""
        last: Message = self.messages[-1] if self.messages else {}
        full = (for_thought or for_text) and (last.get("content") or last.get("tool_calls"))
        if last.get("role") != "assistant" or full:
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """``messages`` behind one system message: most templates allow only one, at the beginning."""
    texts = [instructions] if instructions else []
    rest = list(messages)
    while rest and rest[0].get("role") in ("system", "developer") and _is_text(rest[0].get("content")):
        texts.append(_text(rest.pop(0).get("content")))
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _is_text(content: Any) -> bool:
    """Whether ``content`` is all text: else it is left to the check of messages, which names what cannot be read."""
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and "text" in part for part in content)
    return content is None or isinstance(content, str)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and "text" in part)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call_id(item: Item, where: str) -> str:
    call_id = item.get("call_id") or item.get("id")  # a local shell's output has only an id, which is the call's
    if not isinstance(call_id, str):
        raise RequestError(f"{where}.call_id must be a string.", param="input")
    return call_id


def _check_strings(item: Item, names: Iterable[str], where: str) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            raise RequestError(f"{where}.{name} must be a string.", param="input")
