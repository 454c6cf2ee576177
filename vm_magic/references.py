"""Lets go of what a notebook keeps behind the user's back: ``Out``, ``_``, the last traceback.

Any of these can hold an array or a model, whose memory ``unload`` then could not give back.
"""

import gc
import sys
from typing import Any

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
    if isinstance(value, list | tuple | set):
        return any(_heavy(item) for item in value)
    if isinstance(value, dict):
        return any(_heavy(item) for item in value.values())
    module = type(value).__module__
    return module.split(".")[0] in _HEAVY_ROOTS or module in _HEAVY_CLASSES
