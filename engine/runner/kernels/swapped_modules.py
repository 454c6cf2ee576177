"""Modules of a loaded model that compute otherwise for a while: their class is exchanged, weights and place stay."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.nn as nn

_MODELS = "mlx_lm.models."


class SwappedModules:
    """What was exchanged, to be undone."""

    def __init__(self) -> None:
        self._were: list[tuple[nn.Module, type[nn.Module]]] = []

    def swap_method(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Give ``module``, and no other of its class, another ``method`` called ``name``."""
        self.swap_methods(module, {name: method})

    def swap_methods(self, module: nn.Module, methods: Mapping[str, Any]) -> None:
        """The same of several ``methods``, or what else its class shall have."""
        kind = type(module)
        self.swap_class(module, type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__}))

    def swap_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Make ``module`` one of ``kind``."""
        self._were.append((module, type(module)))
        module.__class__ = kind

    def undo(self) -> None:
        """Leave every module as it was."""
        while self._were:
            module, kind = self._were.pop()
            module.__class__ = kind


def mlx_lm_name(module: Any) -> str:
    """Of a module's class, or of the one that was exchanged: its file and name within mlx-lm's models; else empty."""
    kind = type(module)
    within = kind.__module__.removeprefix(_MODELS)
    return "" if within == kind.__module__ else f"{within}.{kind.__qualname__}"
