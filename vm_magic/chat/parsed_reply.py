"""``Reply.parsed``: what the JSON of a reply is in Python."""

import json
import re
from typing import Any

from engine.outputs import Reply

_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_ENDS = {
    "length": "it was cut off at its limit of tokens",
    "abort": "it was stopped",
    "repetition": "it repeated itself and was ended",
}


def parse_reply(reply: Reply, model: Any = None) -> None:
    """Fill in ``reply.parsed`` from its text: JSON's value, or an instance of the pydantic class ``model``.

    Where that fails it stays None, and ``reply.parse_error`` says why in one line.
    """
    try:
        value = json.loads(_FENCED.sub(r"\1", reply.text))
    except (ValueError, RecursionError) as error:
        end = _ENDS.get(reply.finish_reason or "")
        reply.parse_error = f"the JSON is not whole: {end}" if end else f"the text is not JSON: {error}"
        return
    if model is None:
        reply.parsed = value
        return
    try:
        reply.parsed = model.model_validate(value)
    except Exception as error:  # noqa: BLE001 - validators are the user's own code
        reply.parse_error = f"not a {model.__name__}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """One line: pydantic's problems with their places, any other error with its class."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return " ".join(f"{type(error).__name__}: {error}".split())
    problems = error.errors(include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'value'}: {one['msg']}" for one in problems)
