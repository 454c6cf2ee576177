"""OpenAI's ``tools`` and ``tool_choice``: what may be called, and what must be. Checked here for every client."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import RequestError

KINDS_NOT_CALLED = {
    "custom": "a tool that takes free text is not supported; offer a function with one parameter of type string",
    "allowed_tools": "a choice among some of the tools is not supported; send only the tools that may be called",
}
"""Types of ``tools`` and of ``tool_choice`` that are neither functions nor run by OpenAI, and what to do instead."""
_HOSTED = "this server runs no tools itself, so only functions can be offered; leave it out"


def refuse_kind(where: str, kind: object, param: str) -> RequestError:
    """The error for a tool, or a choice, that is not a function."""
    why = KINDS_NOT_CALLED.get(kind, _HOSTED) if isinstance(kind, str) else _HOSTED
    return RequestError(f"{where} is of type {kind!r}: {why}.", param=param)


def tool_functions(tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The tools' ``function`` objects. Raises RequestError unless all have a name."""
    found = [tool.get("function", tool) if isinstance(tool, Mapping) else None for tool in tools]
    if any(not isinstance(function, Mapping) or not isinstance(function.get("name"), str) for function in found):
        raise RequestError("every tool must be a function with a name.", param="tools")
    return [function for function in found if isinstance(function, Mapping)]


def demanded_names(choice: str | Mapping[str, Any] | None, tools: Sequence[Any]) -> tuple[str, ...] | None:
    """Which of the ``tools`` must be called: one, or any (an empty tuple); None where no call is demanded.

    Raises RequestError for a ``choice`` that is not OpenAI's, or that ``tools`` cannot meet.
    """
    if choice is None or choice in ("none", "auto"):
        return None
    if choice != "required" and not isinstance(choice, Mapping):
        raise RequestError(
            f"`tool_choice` must be 'none', 'auto', 'required' or a function, got {choice!r}.", param="tool_choice"
        )
    names = [str(function["name"]) for function in tool_functions(tools)]
    if not names:
        raise RequestError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
    return () if isinstance(choice, str) else (_named(choice, names),)


def _named(choice: Mapping[str, Any], names: Sequence[str]) -> str:
    kind, function = choice.get("type", "function"), choice.get("function")
    if isinstance(kind, str) and kind in KINDS_NOT_CALLED:
        raise refuse_kind("tool_choice", kind, "tool_choice")
    name = function.get("name") if kind == "function" and isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            'A named `tool_choice` must read {"type": "function", "function": {"name": …}}.', param="tool_choice"
        )
    if name not in names:
        raise RequestError(
            f"The tool {name!r} that `tool_choice` names is not among the `tools`: {', '.join(names)}.",
            param="tool_choice",
        )
    return name
