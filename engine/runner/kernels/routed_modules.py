"""Kernels of routed experts, swapped into a model's layers where they are right.

On CUDA alone: Metal has products of MLX that read each expert's weights once.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.expert_check import experts_problem, launch_kernels
from engine.runner.kernels.expert_layers import ExpertKind, ExpertLayer, expert_layer
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.swapped_modules import SwappedModules


class RoutedExperts:
    """The layers of experts of a loaded model, and which of them kernels compute."""

    def __init__(self, model: nn.Module, device_kind: DeviceKind) -> None:
        found = [module for module in model.modules() if isinstance(module, SwitchGLU)] if device_kind == "cuda" else []
        self._num_layers = len(found)
        self._layers = [(module, layer) for module in found if (layer := expert_layer(module)) is not None]
        self._trusted: set[ExpertKind] = set()
        self._problems: dict[ExpertKind, str] = {}
        self._swapped = SwappedModules()

    @property
    def note(self) -> str | None:
        """One line for people; None where there are no experts."""
        if not self._num_layers:
            return None
        own = sum(layer.kind in self._trusted for _, layer in self._layers)
        said = f"experts: own kernels for {own} of {self._num_layers} layers"
        return "; ".join([said, *(f"{kind}: {problem}" for kind, problem in self._problems.items())])

    def launch_kernels(self) -> None:
        """Launch the kernels that :meth:`choose` will try; where kernels are only collected, say what to compile."""
        for layer in self._kinds().values():
            launch_kernels(layer)

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check the kernels on a layer of each kind; ``progress(done, total)`` counts kinds."""
        kinds = self._kinds()
        with collecting() as awaited:
            self.launch_kernels()
        compile_all(awaited)
        for done, (kind, layer) in enumerate(kinds.items(), 1):
            problem = experts_problem(layer)
            if problem is None:
                self._trusted.add(kind)
            else:
                self._problems[kind] = problem
            if progress is not None:
                progress(done, len(kinds))

    def install(self) -> None:
        """Swap kernels into the layers of those kinds that were found right."""
        self.remove()
        for module, layer in self._layers:
            if layer.kind in self._trusted:
                self._swap(module, layer)

    def remove(self) -> None:
        """Leave every module as it was."""
        self._swapped.undo()

    def _kinds(self) -> dict[ExpertKind, ExpertLayer]:
        return {layer.kind: layer for _, layer in reversed(self._layers)}

    def _swap(self, module: nn.Module, layer: ExpertLayer) -> None:
        def experts(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
            if layer.takes(x, indices):
                return layer.compute(x, indices)
            return SwitchGLU.__call__(self, x, indices)

        self._swapped.swap_method(module, "__call__", experts)
