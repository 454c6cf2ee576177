"""Modules of a loaded model that compute otherwise for a while: their class is exchanged, weights and place stay."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.nn as nn


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
