"""The grammar of a demanded tool call (``tool_choice`` required, or a named function).

In the form that the model's tool parser defines, else in vLLM's forms, which every parser here reads when a call
is demanded: a list of ``{"name": …, "parameters": {…}}`` for required, the arguments alone for a named function.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import RequestError
from engine.params.structured_outputs import ToolCalls
from engine.text.guide.grammar import json_grammar, whitespace_options, written_grammar
from engine.text.guide.json_schema import SchemaWriter, written_schema
from engine.text.guide.lark_text import lark_string
from engine.text.parse.tool_parsers.base import DemandedForm, is_function_name

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
Mark = Callable[[str], str]


def tool_grammar(form: DemandedForm | None, calls: ToolCalls, mark: Mark, relaxed: set[str]) -> str:
    """llguidance's grammar of the calls that ``calls`` allows, in the parser's ``form`` or vLLM's.

    ``mark`` writes a text of the format as the grammar needs it; ``relaxed`` gets what it cannot enforce.
    """
    if form is not None:
        more = f" ({mark(form.separator)} call)*" if calls.parallel else ""
        call = " ".join([*map(mark, form.begin), "object", *map(mark, form.end)])
        return _lark(f"start: call{more}\ncall: {call}", calls, form.arguments_key, relaxed)
    if calls.names:
        return arguments_grammar(calls.callable_functions[0], relaxed)
    return _list_grammar(calls, relaxed)


def arguments_grammar(function: Mapping[str, Any], relaxed: set[str]) -> str:
    """The grammar of one function's arguments."""
    left_out: set[str] = set()
    grammar = json_grammar(_arguments(function), left_out, closes=_closes(function))
    relaxed |= _of(function, left_out)
    return grammar


def opening_grammar(openings: Sequence[str], mark: Mark) -> str:
    """The grammar of the texts that calls begin with; a token may also hold what follows."""
    return f"start: ({' | '.join(map(mark, openings))}) TEXT\nTEXT: /(.|\\n)*/"


def _lark(head: str, calls: ToolCalls, key: str, relaxed: set[str]) -> str:
    """The rules of ``head``, and those for the objects of all functions."""
    functions = calls.callable_functions
    rules = [head, "object: " + " | ".join(f"object_{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        opening = lark_string(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": ')
        written, left_out = written_schema(_arguments(function), closes=_closes(function))
        relaxed |= _of(function, left_out)
        assert isinstance(written, dict), "arguments are an object"
        schema = json.dumps({**written, "x-guidance": whitespace_options()}, ensure_ascii=False)
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


def _closes(function: Mapping[str, Any]) -> bool:
    """Whether objects that do not say otherwise have the declared properties only: not where ``strict`` is false."""
    return function.get("strict") is not False


def _of(function: Mapping[str, Any], left_out: frozenset[str] | set[str]) -> set[str]:
    return {f"{keyword} in the parameters of {function['name']!r}" for keyword in left_out}


def _list_grammar(calls: ToolCalls, relaxed: set[str]) -> str:
    """vLLM's form of demanded calls; the definitions of all functions, each with a name of its own, at the root."""

    writer = SchemaWriter()
    items = []
    for function in calls.callable_functions:
        writer.relaxed = set()
        arguments = writer.write(_arguments(function), closes=_closes(function))
        relaxed |= _of(function, writer.relaxed)
        properties = {"name": {"const": function["name"]}, "parameters": arguments}
        items.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    most = {} if calls.parallel else {"maxItems": 1}
    schema = {"type": "array", "minItems": 1, **most, "items": {"anyOf": items}, "$defs": writer.definitions}
    return written_grammar(schema)
