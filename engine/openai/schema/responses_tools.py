"""The tools of a Responses request: for the model all are functions; their calls go back as the client knows them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.openai.schema.left_out import HOSTED, LeftOut
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
"""Namespace and name."""


@dataclass(frozen=True)
class GivenTool:
    """A tool as the request has it. ``where`` is its place; ``is_found``: a client's search found it, so that it stands
    in the search's result and not among the tools at the beginning of the prompt, which stays as it was."""

    where: str
    tool: JsonObject
    is_found: bool = False


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
    is_found: bool = False

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
    """The tools of a request that the model can call; ``shown`` as the client gave them."""

    tools: tuple[ClientTool, ...] = ()
    shown: tuple[JsonObject, ...] = ()

    def functions(self) -> list[JsonObject]:
        """All that can be called, in a chat's form."""
        return [tool.function() for tool in self.tools]

    def shown_functions(self) -> list[JsonObject]:
        """Those that the prompt begins with."""
        return [tool.function() for tool in self.tools if not tool.is_found]

    def found_functions(self, tools: Iterable[JsonObject]) -> list[JsonObject]:
        """What a search's result shows of ``tools``."""
        names = [(space, one.get("name")) for tool in tools for space, one in _members(tool)]
        return [tool.function() for tool in self.tools if (tool.namespace, tool.name) in names]

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


def read_tools(given: Iterable[GivenTool], left_out: LeftOut) -> Toolbox:
    """All tools of a request; one that is given again is the same tool. Raises RequestError for other kinds."""
    given = list(given)
    plain = {str(one.tool.get("name")) for one in given if one.tool.get("type") != "namespace"}
    tools: dict[_Key, ClientTool] = {}
    shown: list[JsonObject] = []
    for one in given:
        kind = one.tool.get("type")
        searches = kind == TOOL_SEARCH and one.tool.get("execution") == "client"
        if isinstance(kind, str) and kind.startswith(_HOSTED) and not searches:
            left_out.add(f"the tool {kind}", HOSTED)
            continue
        # The description of a whole namespace stands before that of its first tool, so that it is read once.
        context = f"{one.tool.get('name')}: {one.tool['description']}" if _describes_many(one.tool) else ""
        for namespace, tool in _members(one.tool, one.where):
            name = _checked_name(tool, one.where)
            if (namespace, name) not in tools:
                taken = plain | {tool.model_name for tool in tools.values()}
                # So no tool that a later turn brings renames one.
                model_name = f"{namespace}__{name}" if namespace is not None and name in taken else name
                own = ClientTool(str(tool["type"]), name, namespace, model_name, tool, context, one.is_found)
                tools[namespace, name] = own
                context = ""
        shown.append(one.tool)
    return Toolbox(tuple(tools.values()), tuple(shown))


def _describes_many(tool: JsonObject) -> bool:
    return tool.get("type") == "namespace" and bool(tool.get("description"))


def _members(tool: JsonObject, where: str = "") -> Iterator[tuple[str | None, JsonObject]]:
    """A tool, or those of a namespace, each with its namespace's name. Raises RequestError."""
    kind, inner = tool.get("type"), tool.get("tools")
    if kind != "namespace":
        yield None, tool
        return
    if not isinstance(tool.get("name"), str) or not isinstance(inner, list):
        raise RequestError(f"{where} must have a name and tools.", param="tools")
    for position, one in enumerate(inner):
        if not isinstance(one, Mapping) or one.get("type") not in ("function", "custom"):
            raise RequestError(f"{where}.tools[{position}] must be a function or a custom tool.", param="tools")
        yield tool["name"], dict(one)


def _checked_name(tool: JsonObject, where: str) -> str:
    kind = tool.get("type")
    if kind not in ("function", "custom", TOOL_SEARCH):
        raise refuse_kind(where, kind, "tools")
    function = tool.get("function", tool)
    name = function.get("name", TOOL_SEARCH if kind == TOOL_SEARCH else None) if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name must be a non-empty string.", param="tools")
    if kind == "custom":
        _check_format(tool.get("format"), where)
    return name


def _check_format(form: Any, where: str) -> None:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if form is None or kind == "text":
        return
    if kind != "grammar" or form.get("syntax") not in ("lark", "regex") or not isinstance(form.get("definition"), str):
        raise RequestError(
            f"{where}.format must be {{'type': 'text'}} or {{'type': 'grammar', 'syntax': 'lark' or 'regex', "
            "'definition': …}.",
            param="tools",
        )
