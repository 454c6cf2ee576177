"""Releases what a notebook keeps unasked: ``Out``, ``_``, the last traceback.

Any of these can hold an array or a model, whose memory ``unload`` then could not give back.
"""

import gc
import sys
from typing import Any

from engine.outputs import Reply

_HEAVY_ROOTS = ("mlx", "mlx_lm")
_HEAVY_CLASSES = ("engine.llm",)


def release_references(shell: Any) -> None:
    """Drop arrays and models from the output history, and the last exception's frames."""
    for number, value in list(shell.user_ns.get("_oh", {}).items()):
        if _heavy(value):
            del shell.user_ns["_oh"][number]
            shell.user_ns.pop(f"_{number}", None)
    for name in ("_", "__", "___"):
        if _heavy(shell.user_ns.get(name)):
            shell.user_ns[name] = ""
        if _heavy(getattr(shell.displayhook, name, None)):
            setattr(shell.displayhook, name, "")
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    for name in ("tb", "evalue", "etype"):
        if hasattr(shell.InteractiveTB, name):
            setattr(shell.InteractiveTB, name, None)
    gc.collect()


def _heavy(value: object) -> bool:
    """Whether ``value`` is a model or an array, or a container that holds one. ``Out`` may hold itself."""
    seen: set[int] = set()
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list | tuple | set | dict):
            if id(value) not in seen:
                seen.add(id(value))
                left += value.values() if isinstance(value, dict) else value
            continue
        if isinstance(value, Reply):
            left.append(value.parsed)
            continue
        if hasattr(type(value), "__pydantic_fields__") and id(value) not in seen:  # what a Reply was parsed to
            seen.add(id(value))
            left += vars(value).values()
            left.append(getattr(value, "__pydantic_private__", None))
        module = type(value).__module__
        if module.split(".")[0] in _HEAVY_ROOTS or module in _HEAVY_CLASSES:
            return True
    return False
