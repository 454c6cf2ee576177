"""The tools of a Messages request: which its prompt lists, and which can be called by its end.

A tool with ``defer_loading`` is not listed: it is told where a ``tool_reference`` or a ``tool_addition`` loads it, so
that the beginning of the prompt, and with it the prefix cache, stays what it was.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.left_out import HOSTED, LeftOut
from engine.openai.schema.protocol import JsonObject

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SEARCH = "tool_search_tool_"


class OfferedTools:
    """The tools in OpenAI's form. ``shown`` are those that the prompt lists, :attr:`callable` those on offer now."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], left_out: LeftOut) -> None:
        self._left_out = left_out
        self._known: dict[str, JsonObject] = {}
        self._hosted: set[str] = set()
        # Nobody here runs the search that would load them.
        searched = any(str(tool.get("type", "")).startswith(_SEARCH) for tool in tools)
        self.shown: list[JsonObject] = []
        self._on_offer: list[JsonObject] = []
        for position, tool in enumerate(tools):
            made = self._read(tool, f"tools[{position}]")
            if made is not None and (searched or not tool.get("defer_loading")):
                self.shown.append(made)
                self._on_offer.append(made)

    @property
    def callable(self) -> list[JsonObject]:
        """What the model may call."""
        return list(self._on_offer)

    def load(self, name: str) -> str:
        """The prompt's text where the tool ``name`` comes on offer; empty where it is already."""
        tool = self._known.get(name)
        if tool is None:
            self._left_out.add(f"the tool {name}", HOSTED if name in self._hosted else "it is not among the `tools`")
            return f"The tool {name} is not available."
        if tool not in self._on_offer:
            self._on_offer.append(tool)
            return f"The tool {name} can be called again." if tool in self.shown else _introduction(tool)
        return "" if tool in self.shown else f"The tool {name} can be called."

    def define(self, tool: Mapping[str, Any], where: str) -> str:
        """The prompt's text for a tool that a message brings."""
        made = self._read(tool, where)
        if made is None:
            return ""
        self._on_offer = [one for one in self._on_offer if _name(one) != _name(made)] + [made]
        return _introduction(made)

    def remove(self, name: str) -> str:
        """The prompt's text where the tool ``name`` is withdrawn."""
        self._on_offer = [one for one in self._on_offer if _name(one) != name]
        return f"The tool {name} can no longer be called."

    def choice(self, choice: Mapping[str, Any]) -> JsonObject:
        """``tool_choice`` in OpenAI's form. Raises RequestError for what is not Anthropic's, or cannot be met."""
        kind, name = choice.get("type"), choice.get("name")
        if kind == "tool":
            if str(name) in self._hosted:
                raise RequestError(f"tool_choice demands {name!r}, but {HOSTED}: leave it out.", param="tool_choice")
            chosen: Any = {"type": "function", "function": {"name": name}}
        elif isinstance(kind, str) and kind in _CHOICES:
            chosen = _CHOICES[kind]
        else:
            raise RequestError(f"tool_choice.type must be auto, any, tool or none, got {kind!r}.", param="tool_choice")
        return {"tool_choice": chosen, "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}

    def _read(self, tool: Mapping[str, Any], where: str) -> JsonObject | None:
        """``tool`` as a function; None for what only its maker's servers run."""
        name = tool.get("name")
        if tool.get("type", "custom") != "custom" and "input_schema" not in tool:
            self._hosted.add(str(name))
            self._left_out.add(f"the tool {name or where} of type {tool['type']}", HOSTED)
            return None
        if tool.get("input_examples"):
            self._left_out.add("input_examples of a tool", "chat templates have no place for them")
        function = {"name": name, "description": tool.get("description"), "parameters": tool.get("input_schema", {})}
        function |= {"strict": tool.get("strict")}
        function = {key: value for key, value in function.items() if value or key in ("name", "parameters")}
        made: JsonObject = {"type": "function", "function": function}
        self._known[str(name)] = made
        return made


def _name(tool: JsonObject) -> Any:
    return tool["function"]["name"]


def _introduction(tool: JsonObject) -> str:
    return f"The tool {_name(tool)} can be called from now on:\n{json.dumps(tool, ensure_ascii=False)}"
