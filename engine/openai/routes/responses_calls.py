"""One call of a response, as an item of the kind that the client knows the tool by."""

import json
import re
import uuid
from dataclasses import dataclass, field

from engine.openai.schema.protocol import JsonObject
from engine.openai.schema.responses_tools import FREE_TEXT, TOOL_SEARCH, ClientTool, Toolbox
from engine.text.parse.scan.output_sink import ToolCallDelta, random_call_id

_BEGIN = re.compile(rf'\s*\{{\s*"{FREE_TEXT}"\s*:\s*"')
_HIGH, _LOW = r"[dD][89abAB][0-9a-fA-F]{2}", r"[dD][c-fC-F][0-9a-fA-F]{2}"
_WHOLE = re.compile(rf'(?:[^"\\]+|\\["\\/bfnrt]|\\u{_HIGH}\\u{_LOW}|\\u(?!{_HIGH})[0-9a-fA-F]{{4}})*')
"""The beginning of a JSON string's text up to where an escape may still be half written."""


class FunctionCall:
    """A function's call; ``json`` is its item as it stands. ``event`` names the events of its arguments."""

    type, prefix, event, key = "function_call", "fc", "function_call_arguments", "arguments"

    def __init__(self, tool: ClientTool, call_id: str) -> None:
        named = {"name": tool.name} | ({} if tool.namespace is None else {"namespace": tool.namespace})
        self.json: JsonObject = {"id": f"{self.prefix}_{uuid.uuid4().hex}", "type": self.type, "call_id": call_id}
        self.json |= {**named, self.key: "", "status": "in_progress"}

    def add(self, arguments: str) -> str:
        """Take a piece of the arguments; gives what the client sees of them."""
        self.json[self.key] += arguments
        return arguments

    def finish(self) -> str:
        """The call is over: gives what was held back."""
        return ""

    def done(self) -> JsonObject:
        """What the event of the whole arguments holds."""
        return {name: self.json[name] for name in ("name", "arguments")}


class WrittenCall(FunctionCall):
    """A custom tool's call whose input is written as it is."""

    type, prefix, event, key = "custom_tool_call", "ctc", "custom_tool_call_input", "input"

    def done(self) -> JsonObject:
        """What the event of the whole input holds."""
        return {"input": self.json["input"]}


class CustomCall(WrittenCall):
    """A custom tool's call whose input is the one argument of a function."""

    def __init__(self, tool: ClientTool, call_id: str) -> None:
        super().__init__(tool, call_id)
        self._arguments: list[str] = []
        self._unread = ""
        self._begun = False

    def add(self, arguments: str) -> str:
        """Take a piece of JSON; gives the text in it."""
        self._arguments.append(arguments)
        self._unread += arguments
        if not self._begun:
            begin = _BEGIN.match(self._unread)
            if begin is None:
                return ""
            self._unread, self._begun = self._unread[begin.end() :], True
        whole = _WHOLE.match(self._unread)
        assert whole is not None, "no text at all matches too"
        self._unread = self._unread[whole.end() :]
        return super().add(json.loads(f'"{whole.group()}"', strict=False))

    def finish(self) -> str:
        """What is not the text of ``input`` alone is shown as the model wrote it."""
        text = _input("".join(self._arguments))
        shown: str = self.json[self.key]
        return super().add(text.removeprefix(shown)) if text.startswith(shown) else ""


class SearchCall(FunctionCall):
    """A call of the client's tool search: its arguments are an object, shown when they are whole."""

    type, prefix, event = "tool_search_call", "tsc", ""

    def __init__(self, tool: ClientTool, call_id: str) -> None:
        super().__init__(tool, call_id)
        del self.json["name"]
        self.json |= {"arguments": {}, "execution": "client"}
        self._arguments: list[str] = []

    def add(self, arguments: str) -> str:
        """Take a piece of the arguments."""
        self._arguments.append(arguments)
        return ""

    def finish(self) -> str:
        """The arguments are whole."""
        self.json["arguments"] = _object("".join(self._arguments))
        return ""


_KINDS = {"function": FunctionCall, "custom": CustomCall, TOOL_SEARCH: SearchCall}


@dataclass(frozen=True)
class CallItems:
    """Makes the items. ``written`` is the custom tool whose input is the whole answer, if there is one."""

    toolbox: Toolbox
    written: ClientTool | None = None
    written_id: str = field(default_factory=lambda: random_call_id(0, ""))

    def item(self, call: ToolCallDelta) -> FunctionCall:
        """A call that begins with this piece."""
        tool, call_id = self.toolbox.called(call.name or ""), call.id or ""
        return WrittenCall(tool, call_id) if self.written is not None else _KINDS[tool.kind](tool, call_id)

    def written_call(self, text: str) -> ToolCallDelta:
        """A piece of the answer as one of the only call's input."""
        assert self.written is not None, "asked only where the answer is a call"
        return ToolCallDelta(0, self.written_id, self.written.model_name, text)


def _input(arguments: str) -> str:
    """The text that a custom tool gets: the argument named so, else the only text, else all as it was written."""
    values = _object(arguments)
    texts = [values[FREE_TEXT]] if FREE_TEXT in values else list(values.values())
    text = texts[0] if len(texts) == 1 and isinstance(texts[0], str) else arguments
    # Half a surrogate pair cannot be sent.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _object(arguments: str) -> JsonObject:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
