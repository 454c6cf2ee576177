"""What ``--json`` may name: a schema as text, in the notebook, or in a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from engine.errors import RequestError

ANY_OBJECT = "object"
"""The word for any JSON object."""


def read_schema(text: str, namespace: Mapping[str, Any]) -> Mapping[str, Any] | Literal[True]:
    """The JSON schema that ``text`` means; True for any object. Raises RequestError naming the ways to say it.

    ``text`` is JSON, a variable of ``namespace`` (a mapping, JSON text, or a class with pydantic's
    ``model_json_schema``), a file, or ``object``.
    """
    if text.lstrip().startswith(("{", "[")):
        return _parsed(text, "--json")
    if text in namespace:
        return _from_value(namespace[text], text)
    if text == ANY_OBJECT:
        return True
    path = Path(text).expanduser()
    if path.is_file():
        return _parsed(path.read_text(encoding="utf-8"), f"--json {text}")
    raise RequestError(
        f"--json {text}: no such variable or file; give a variable with the schema, a file, JSON text in quotes, "
        f"or {ANY_OBJECT}",
        param="json",
    )


def schema_class(text: str, namespace: Mapping[str, Any]) -> type | None:
    """The pydantic class that ``text`` names in ``namespace``, of which a reply is to be an instance; None if none."""
    value = namespace.get(text)
    return value if isinstance(value, type) and callable(getattr(value, "model_validate", None)) else None


def _from_value(value: object, name: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        return _parsed(value, f"--json {name}")
    make = getattr(value, "model_json_schema", None)
    if isinstance(value, type) and callable(make):
        schema: Mapping[str, Any] = make()
        return schema
    raise RequestError(
        f"--json {name}: {type(value).__name__} is not a schema; give a dict, JSON text or a pydantic model",
        param="json",
    )


def _parsed(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not valid JSON: {error}", param="json") from None
    if not isinstance(value, dict):
        raise RequestError(f"{where}: a schema is a JSON object, not {type(value).__name__}", param="json")
    return value
