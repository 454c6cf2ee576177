"""Anthropic's messages and their content blocks as OpenAI's messages."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.left_out import HOSTED, LeftOut
from engine.openai.schema.messages_tools import OfferedTools
from engine.openai.schema.protocol import JsonObject

Block = Mapping[str, Any]

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "ctx": "user", "msg": "user"}
"""Claude Code from 2.1.154 on also says ``ctx`` and ``msg`` for what a user's side adds."""
_ATTRIBUTION = "x-anthropic-billing-header:"
_HOSTED_CALLS = ("server_tool_use", "mcp_tool_use")
_HOSTED_RESULT = "_tool_result"
_LEFT_OUT = {
    "redacted_thinking": "only Anthropic's servers can read it",
    "container_upload": "the file lies on Anthropic's servers",
    "mcp_tool_listing": HOSTED,
    "fallback": "one model is served here",
    "browser_state": HOSTED,
}
"""Blocks that say nothing to a model here."""
_UNREADABLE = frozenset(
    ("type", "cache_control", "citations", "encrypted_content", "encrypted_index", "encrypted_stdout")
)


class MessageReader:
    """Reads the messages of one request in order: tools come on offer and go as they say."""

    def __init__(self, tools: OfferedTools, left_out: LeftOut) -> None:
        self._tools = tools
        self._left_out = left_out
        self._names: dict[str, str] = {}
        """Call ids, and what they called."""

    def system(self, system: str | Sequence[Any] | None) -> list[JsonObject]:
        """The field ``system`` as a message."""
        return self._system_message(system or "", "system")

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[JsonObject]:
        """Tool results become messages of their own, before the user's text. Raises RequestError."""
        start = self._compacted(messages)
        last_user = max((n for n, message in enumerate(messages) if message.get("role") == "user"), default=-1)
        for position, message in enumerate(messages[start:], start):
            where = f"messages[{position}]"
            role, content = _ROLES.get(str(message.get("role"))), message.get("content")
            if role is None:
                raise RequestError(
                    f"{where}.role must be 'user' or 'assistant', got {message.get('role')!r}.", param="messages"
                )
            if role == "system":
                if message.get("clear_at") != "next_user_message" or last_user < position:
                    yield from self._system_message(content or "", where)
            elif isinstance(content, str):
                yield {"role": role, "content": content}
            elif role == "assistant":
                yield from self._assistant_messages(_blocks(content, where), where)
            else:
                yield from self._user_messages(_blocks(content, where), where)

    def _compacted(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """The message from which on the model reads: a summary stands for what came before it."""
        for position in range(len(messages) - 1, -1, -1):
            content = messages[position].get("content")
            if isinstance(content, list) and any(_is_summary(block) for block in content):
                if position:
                    self._left_out.add("messages before a compaction block", "its summary stands for them")
                return position
        return 0

    def _system_message(self, content: Any, where: str) -> list[JsonObject]:
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else _blocks(content, where)
        texts = [self._system_text(block, f"{where}[{position}]") for position, block in enumerate(blocks)]
        text = "\n".join(text for text in texts if text)
        return [{"role": "system", "content": text}] if text else []

    def _system_text(self, block: Block, at: str) -> str:
        text = self._text(block, at)
        if not text.startswith(_ATTRIBUTION):
            return text
        # It changes with each request, and no prefix would be found in the cache behind it.
        self._left_out.add("the line x-anthropic-billing-header of `system`", "it would defeat the prefix cache")
        return text.partition("\n")[2].lstrip("\n")

    def _assistant_messages(self, blocks: Sequence[Block], where: str) -> Iterator[JsonObject]:
        """One message, and one more before it for each call that Anthropic's servers answered, with its result."""
        turn = _Turn()
        hosted: dict[str, JsonObject] = {}
        for position, block in enumerate(blocks):
            at = f"{where}.content[{position}]"
            kind = block.get("type")
            if kind == "thinking":
                turn.thoughts.append(_text_of(block, "thinking", at))
            elif kind == "tool_use":
                turn.calls.append(self._call(block, at))
            elif kind in _HOSTED_CALLS:
                hosted[_text_of(block, "id", at)] = self._call(block, at)
            elif _is_hosted_result(kind):
                call = hosted.pop(_text_of(block, "tool_use_id", at), None)
                if call is None:
                    self._left_out.add(f"a {kind} block", "the call that it answers is not in its message")
                else:
                    yield turn.message([call])
                    yield self._result(call["id"], self._readable(block.get("content"), at))
                    turn = _Turn(calls=turn.calls)
            elif kind == "compaction":
                turn = _Turn()
                yield from self._summary(block, at)
            else:
                turn.texts.append(self._text(block, at))
        for _ in hosted:
            self._left_out.add("a call of a hosted tool", "its result is not in its message")
        if turn.says_something or not blocks:
            yield turn.message(turn.calls)

    def _call(self, block: Block, at: str) -> JsonObject:
        call_id, name = _text_of(block, "id", at), _text_of(block, "name", at)
        self._names[call_id] = name
        function = {"name": name, "arguments": block.get("input")}
        return {"id": call_id, "type": "function", "function": function}

    def _result(self, call_id: str, content: str) -> JsonObject:
        # Some templates name the function beside its result.
        named = {"name": self._names[call_id]} if call_id in self._names else {}
        return {"role": "tool", "tool_call_id": call_id, "content": content, **named}

    def _summary(self, block: Block, at: str) -> Iterator[JsonObject]:
        if not _is_summary(block):
            return
        changes = [self._text(change, at) for change in _blocks(block.get("tool_changes") or [], at, "tool_changes")]
        text = "\n".join(["The conversation so far, in short:", _text_of(block, "content", at), *changes])
        yield {"role": "user", "content": text}

    def _user_messages(self, blocks: Sequence[Block], where: str) -> Iterator[JsonObject]:
        texts: list[str] = []
        for position, block in enumerate(blocks):
            at = f"{where}.content[{position}]"
            if block.get("type") == "tool_result":
                yield self._result(_text_of(block, "tool_use_id", at), self._result_text(block.get("content"), at))
            elif block.get("type") == "compaction":
                yield from self._summary(block, at)
            else:
                texts.append(self._text(block, at))
        text = "\n".join(text for text in texts if text)
        if text or not blocks:
            yield {"role": "user", "content": text}

    def _result_text(self, content: Any, at: str) -> str:
        if isinstance(content, str) or not content:
            return content or ""
        texts = []
        for position, block in enumerate(_blocks(content, at)):
            unseen = _unseen(block)
            # A program made this, not the user: a refusal would end the conversation for good.
            texts.append(
                f"[{unseen}, which this model cannot see]" if unseen else self._text(block, f"{at}[{position}]")
            )
            if unseen:
                self._left_out.add(f"{unseen} in a tool's result", "this engine serves text only")
        return "\n".join(text for text in texts if text)

    def _text(self, block: Block, at: str) -> str:
        """What the model reads of a block; empty where that is nothing."""
        match block.get("type"):
            case "text":
                return _text_of(block, "text", at)
            case "document" if not _unseen(block):
                return _titled(block, ("title", "context"), self._document(block["source"], at))
            case "search_result":
                return _titled(block, ("title", "source"), self._result_text(block.get("content"), at))
            case "tool_reference":
                return self._tools.load(_text_of(block, "tool_name", at))
            case "tool_addition" | "tool_removal" as kind:
                return self._tool_change(kind, block.get("tool"), at)
            case str(kind) if kind in _LEFT_OUT:
                self._left_out.add(f"a {kind} block", _LEFT_OUT[kind])
                return ""
            case kind:
                raise _refused(kind, block, at)

    def _document(self, source: Mapping[str, Any], at: str) -> str:
        if source["type"] == "text":
            return _text_of(source, "data", f"{at}.source")
        return self._result_text(source.get("content"), f"{at}.source.content")

    def _tool_change(self, kind: str, tool: Any, at: str) -> str:
        if not isinstance(tool, Mapping):
            raise RequestError(f"{at}.tool must be an object.", param="messages")
        if tool.get("type") == "tool_reference":
            name = _text_of(tool, "name", f"{at}.tool")
            return self._tools.load(name) if kind == "tool_addition" else self._tools.remove(name)
        definition = tool.get("definition")
        if isinstance(definition, Mapping):
            return self._tools.define(definition, f"{at}.tool")
        self._left_out.add(f"a {kind} of type {tool.get('type')}", HOSTED)
        return ""

    def _readable(self, content: Any, at: str) -> str:
        """What can be read of a hosted tool's result, whatever its form: texts, and other values with their names."""
        if isinstance(content, Mapping):
            if content.get("type") in ("text", "document", "search_result", "tool_reference"):
                return self._result_text([content], at)
            lines = []
            for name, value in content.items():
                if name in _UNREADABLE or value in (None, ""):
                    continue
                nested = isinstance(value, Mapping | list)
                lines.append(self._readable(value, at) if nested else f"{name}: {value}")
            return "\n".join(line for line in lines if line)
        if isinstance(content, list):
            return "\n".join(text for text in (self._readable(one, at) for one in content) if text)
        return content if isinstance(content, str) else json.dumps(content)


class _Turn:
    """What an assistant's message has so far."""

    def __init__(self, calls: Sequence[JsonObject] = ()) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls = list(calls)

    @property
    def says_something(self) -> bool:
        return bool(self.calls or any(self.texts) or any(self.thoughts))

    def message(self, calls: Sequence[JsonObject]) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": "".join(self.texts)}
        if any(self.thoughts):
            message["reasoning"] = "".join(self.thoughts)
        return message | ({"tool_calls": list(calls)} if calls else {})


def _is_summary(block: Any) -> bool:
    # Without content the summary failed, and the messages before it count.
    return isinstance(block, Mapping) and block.get("type") == "compaction" and block.get("content") is not None


def _is_hosted_result(kind: Any) -> bool:
    return isinstance(kind, str) and kind.endswith(_HOSTED_RESULT)


def _unseen(block: Block) -> str | None:
    """``an image`` or ``a document`` if the block holds one that only another model could read."""
    source = block.get("source")
    readable = isinstance(source, Mapping) and source.get("type") in ("text", "content")
    if block.get("type") == "document" and not readable:
        return "a document"
    return "an image" if block.get("type") == "image" else None


def _refused(kind: Any, block: Block, at: str) -> RequestError:
    if _unseen(block):
        advice = " Send its text, as a source of type 'text'." if kind == "document" else ""
        return RequestError(
            f"{at} is of type {kind!r}, but this engine serves text only: at most 0 {kind}(s) may be provided "
            f"in one prompt.{advice}",
            param="messages",
        )
    return RequestError(f"{at} is of type {kind!r}, which this server does not accept here.", param="messages")


def _titled(block: Block, names: Sequence[str], text: str) -> str:
    heads = [block[name] for name in names if isinstance(block.get(name), str) and block[name]]
    return "\n".join([*heads, text])


def _blocks(content: Any, where: str, name: str = "content") -> list[Block]:
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        may_be = "a string or a list of blocks" if name == "content" else "a list of blocks"
        raise RequestError(f"{where}.{name} must be {may_be}.", param="messages")
    return content


def _text_of(block: Block, name: str, where: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{name} must be a string.", param="messages")
    return text
