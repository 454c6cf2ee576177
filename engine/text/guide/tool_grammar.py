"""The grammar of a demanded tool call (``tool_choice`` required, or a named function).

In the form that the model's tool parser defines, else in vLLM's forms, which every parser here reads when a call
is demanded: a list of ``{"name": …, "parameters": {…}}`` for required, the arguments alone for a named function.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import RequestError
from engine.params.structured_outputs import ToolCalls
from engine.text.guide.grammar import json_grammar, whitespace_options
from engine.text.parse.tool_parsers.base import DemandedForm, is_function_name

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(form: DemandedForm | None, calls: ToolCalls, mark: Callable[[str], str]) -> str:
    """llguidance's grammar of the calls that ``calls`` allows, in the parser's ``form`` or vLLM's.

    ``mark`` writes a text of the format as the grammar needs it.
    """
    if form is not None:
        more = f" ({mark(form.separator)} call)*" if calls.parallel else ""
        call = " ".join([*map(mark, form.begin), "object", *map(mark, form.end)])
        return _lark(f"start: call{more}\ncall: {call}", calls, form.arguments_key)
    if calls.names:
        return json_grammar(_arguments(calls.callable_functions[0]))
    return json_grammar(_list_schema(calls))


def _lark(head: str, calls: ToolCalls, key: str) -> str:
    """The rules of ``head``, and those for the objects of all functions."""
    functions = calls.callable_functions
    rules = [head, "object: " + " | ".join(f"object_{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        opening = json.dumps(
            f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": ', ensure_ascii=False
        )
        schema = json.dumps({**_arguments(function), "x-guidance": whitespace_options()}, ensure_ascii=False)
        rules.append(f'object_{number}: {opening} arguments_{number} "}}"\narguments_{number}: %json {schema}')
    return "\n".join(rules)


def check_callable(function: Mapping[str, Any]) -> None:
    """Raise RequestError for a function that no reply can call: by its name, or by arguments that are not an object."""
    name, schema = function["name"], function.get("parameters") or {}
    if not is_function_name(name):
        raise RequestError(
            f"tools: the name {name!r} cannot be called; it may have up to 256 letters, digits and _ . : / @ $ + -",
            param="tools",
        )
    if not isinstance(schema, Mapping):
        raise RequestError(f"tools: the parameters of {name!r} must be a JSON schema.", param="tools")
    kinds = schema.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise RequestError(
            f"tools: the parameters of {name!r} must be a schema of type object, got type {kinds!r}.", param="tools"
        )


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: always an object."""
    check_callable(function)
    schema = function.get("parameters")
    return {**schema, "type": "object"} if schema else {**_NOTHING}


def _list_schema(calls: ToolCalls) -> dict[str, Any]:
    """vLLM's form of demanded calls. Definitions move to the root, where references point to."""
    definitions: dict[str, Any] = {}
    items = []
    for function in calls.callable_functions:
        arguments = _arguments(function)
        for key in ("$defs", "definitions"):
            definitions.setdefault(key, {}).update(arguments.pop(key, {}))
        properties = {"name": {"const": function["name"]}, "parameters": arguments}
        items.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    most = {} if calls.parallel else {"maxItems": 1}
    kept = {key: value for key, value in definitions.items() if value}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": items}, **kept}
