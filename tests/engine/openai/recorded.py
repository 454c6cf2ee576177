"""Requests of programs with words of our own: ``@LENGTH WORDS`` is a text as long as that which was sent."""

import re
from typing import Any

FILLER = "A word to the wise is enough, and a long text is made of many such words. "


def called(name: str, **arguments: str) -> str:
    """A call as Qwen's coders write it."""
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def expanded(value: Any) -> Any:
    """``value`` with its texts as long as they were."""
    if isinstance(value, dict):
        return {name: expanded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [expanded(one) for one in value]
    found = re.fullmatch(r"@(\d+) (.*)", value, re.DOTALL) if isinstance(value, str) else None
    if found is None:
        return value
    length = int(found[1])
    return (found[2] + " " + FILLER * (length // len(FILLER) + 1))[:length]
