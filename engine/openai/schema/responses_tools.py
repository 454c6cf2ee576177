"""The tools of a Responses request: for the model all are functions; their calls go back as the client knows them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.protocol import JsonObject
from engine.params.tool_choice import refuse_kind

FREE_TEXT = "input"
"""The one parameter of the function that stands for a custom tool."""
TOOL_SEARCH = "tool_search"
_HOSTED = (
    *("web_search", "file_search", "computer", "mcp", "code_interpreter", "image_generation"),
    *("programmatic_tool_calling", "local_shell", "shell", "apply_patch", TOOL_SEARCH),
)
"""Beginnings of the types that OpenAI runs, or whose calls have forms of their own: left out, since none runs here."""
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_Key = tuple[str | None, str]
_Found = dict[_Key, tuple[str, JsonObject, str]]
"""Kind, tool and context by namespace and name."""


@dataclass(frozen=True)
class ClientTool:
    """One tool that can be called. ``kind`` is ``function``, ``custom`` (free text) or ``tool_search``.

    ``name`` is the client's, ``model_name`` the one that the model calls it by.
    """

    kind: str
    name: str
    namespace: str | None
    model_name: str
    given: JsonObject
    context: str = ""

    def function(self) -> JsonObject:
        """The tool as a chat's function."""
        function = self.given.get("function", self.given)
        shown = {key: function[key] for key in function if key != "type" and function[key] is not None}
        if self.kind == "custom":
            shown = {"description": self._with_grammar(), "parameters": self._free_text()}
        elif self.kind == TOOL_SEARCH:
            shown = {key: shown[key] for key in _FUNCTION_FIELDS if key in shown}
        if self.context:
            shown["description"] = f"{self.context}\n{shown.get('description', '')}".rstrip()
        return {"type": "function", "function": {**shown, "name": self.model_name}}

    @property
    def grammar(self) -> Mapping[str, str] | None:
        """A custom tool's ``syntax`` and ``definition``, if its text has any."""
        form = self.given.get("format") or {}
        return form if self.kind == "custom" and form.get("type") == "grammar" else None

    def _with_grammar(self) -> str:
        description = str(self.given.get("description") or "")
        if self.grammar is None:
            return description
        syntax = "Lark grammar" if self.grammar["syntax"] == "lark" else "regular expression"
        return f"{description}\n\n`{FREE_TEXT}` follows this {syntax}:\n{self.grammar['definition']}".strip()

    def _free_text(self) -> JsonObject:
        text: JsonObject = {"type": "string", "description": "The whole input of the tool, as plain text."}
        if self.grammar is not None and self.grammar["syntax"] == "regex":
            text["pattern"] = f"^(?:{self.grammar['definition']})$"
        return {
            "type": "object",
            "properties": {FREE_TEXT: text},
            "required": [FREE_TEXT],
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Toolbox:
    """All tools of a request. ``shown`` are those that the model can call, as the client gave them; ``notes`` are lines
    for ``explain`` about those that were left out."""

    tools: tuple[ClientTool, ...] = ()
    shown: tuple[JsonObject, ...] = ()
    notes: tuple[str, ...] = ()

    def functions(self) -> list[JsonObject]:
        """The tools in a chat's form."""
        return [tool.function() for tool in self.tools]

    def called(self, model_name: str) -> ClientTool:
        """The tool that the model means by ``model_name``; a function of that name where there is none."""
        for tool in self.tools:
            if tool.model_name == model_name:
                return tool
        return ClientTool("function", model_name, None, model_name, {})

    def model_name(self, name: str, namespace: str | None = None) -> str:
        """What the model calls the client's tool ``name``; a tool that is not offered keeps its name."""
        for tool in self.tools:
            if (tool.name, tool.namespace) == (name, namespace):
                return tool.model_name
        return name

    def find(self, choice: Mapping[str, Any]) -> ClientTool | None:
        """The tool that a ``tool_choice`` names, if it is offered."""
        name, namespace = choice.get("name"), choice.get("namespace")
        found = [tool for tool in self.tools if tool.kind == choice.get("type") and tool.name == name]
        return next((tool for tool in found if namespace in (None, tool.namespace)), None)


def read_tools(given: Iterable[tuple[str, JsonObject]]) -> Toolbox:
    """The tools at their places in the request (``tools[3]``); a later one of the same name replaces the earlier.

    Raises RequestError for what is not a tool of OpenAI's API.
    """
    found: _Found = {}
    shown: list[JsonObject] = []
    left_out: dict[str, None] = {}
    for where, tool in given:
        kind = tool.get("type")
        if kind == "namespace":
            _add_namespace(found, tool, where)
        elif kind in ("function", "custom") or _is_client_search(tool):
            found[None, _name(tool, where)] = (str(kind), tool, "")
        elif isinstance(kind, str) and kind.startswith(_HOSTED):
            left_out[kind] = None
            continue
        else:
            raise refuse_kind(where, kind, "tools")
        shown.append(tool)
    notes = [f"tool {kind!r} was left out: this server runs no tools itself" for kind in left_out]
    return Toolbox(tuple(_named(found)), tuple(shown), tuple(notes))


def _is_client_search(tool: JsonObject) -> bool:
    return tool.get("type") == TOOL_SEARCH and tool.get("execution") == "client"


def _add_namespace(found: _Found, tool: JsonObject, where: str) -> None:
    namespace, inner = _name(tool, where), tool.get("tools")
    if not isinstance(inner, list):
        raise RequestError(f"{where}.tools must be a list of functions and custom tools.", param="tools")
    # The description of all stands before that of the first, so that the model reads it once.
    context = f"{namespace}: {tool['description']}" if tool.get("description") else ""
    for position, one in enumerate(inner):
        at = f"{where}.tools[{position}]"
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind not in ("function", "custom"):
            raise refuse_kind(at, kind, "tools")
        found[namespace, _name(one, at)] = (str(kind), one, context)
        context = ""


def _name(tool: JsonObject, where: str) -> str:
    function = tool.get("function", tool)
    name = function.get("name", TOOL_SEARCH if tool.get("type") == TOOL_SEARCH else None)
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name must be a non-empty string.", param="tools")
    _check_format(tool, where)
    return name


def _check_format(tool: JsonObject, where: str) -> None:
    form = tool.get("format") if tool.get("type") == "custom" else None
    if form is None or (isinstance(form, Mapping) and form.get("type") == "text"):
        return
    whole = isinstance(form, Mapping) and form.get("type") == "grammar" and isinstance(form.get("definition"), str)
    if not whole or form.get("syntax") not in ("lark", "regex"):
        raise RequestError(
            f"{where}.format must be {{'type': 'text'}} or {{'type': 'grammar', 'syntax': 'lark' or 'regex', "
            "'definition': …}.",
            param="tools",
        )


def _named(found: _Found) -> Sequence[ClientTool]:
    """Each tool by its own name; those of namespaces that share one are told apart by their namespace."""
    counts: dict[str, int] = {}
    for _, name in found:
        counts[name] = counts.get(name, 0) + 1
    return [
        ClientTool(
            kind, name, namespace, f"{namespace}__{name}" if namespace and counts[name] > 1 else name, tool, context
        )
        for (namespace, name), (kind, tool, context) in found.items()
    ]
