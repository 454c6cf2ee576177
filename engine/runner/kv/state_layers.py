"""Layers of a model that move their states on by kernels of this project, where those are right."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.errors import error_line
from engine.runner.kernels.state_kernels import StateKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv import delta_nets, ssm_layers

Methods = dict[str, Callable[..., mx.array]]


class StateLayers:
    """The layers of ``model`` whose kinds are known, each kind checked, and swapped where ``kernels`` are right."""

    def __init__(self, model: nn.Module, kernels: StateKernels) -> None:
        self._swapped = SwappedModules()
        problems: dict[str, None] = {}
        for _, module in model.named_modules():
            found = _found(module, kernels)
            if isinstance(found, str):
                problems[found] = None
                continue
            for name, method in found.items():
                self._swapped.swap_method(module, name, method)
        self.problem = "; ".join(problems)
        """Why some are left to mlx-lm's code, for people; empty where none is."""

    def remove(self) -> None:
        """Leave every module as it was."""
        self._swapped.undo()


def _found(module: Any, kernels: StateKernels) -> Methods | str:
    """As :func:`_methods`, of whatever module."""
    try:
        return _methods(module, kernels)
    except Exception as error:  # noqa: BLE001  (a module that is made otherwise computes as it did)
        return f"{type(module).__name__} by mlx-lm's operations, {error_line(error)}"


def _methods(module: Any, kernels: StateKernels) -> Methods | str:
    """What a module computes with kernels, by the names of its methods; or why it does not."""
    kind = type(module)
    if isinstance(module, delta_nets.KINDS):
        deltas = delta_nets.delta_shape(module)
        problem = deltas if isinstance(deltas, str) else kernels.delta_problem(deltas)
        if isinstance(deltas, str) or problem:
            return f"gated delta nets by mlx-lm's operations, {problem}"
        return {"__call__": delta_nets.delta_call(kind, deltas, kernels)}
    if isinstance(module, ssm_layers.KINDS):
        spaces = ssm_layers.ssm_shape(module)
        problem = spaces if isinstance(spaces, str) else kernels.ssm_problem(spaces)
        if isinstance(spaces, str) or problem:
            return f"state spaces by mlx-lm's operations, {problem}"
        return {
            "_conv": ssm_layers.conv_call(kind, spaces, kernels), "_ssm": ssm_layers.ssm_call(kind, spaces, kernels),
        }  # fmt: skip
    return {}
