"""Kernels of routed experts, swapped into a model's layers where they are right.

On CUDA alone: Metal has products of MLX that read each expert's weights once.
"""

from collections.abc import Callable
from contextlib import suppress

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.expert_check import experts_problem, launch_kernels
from engine.runner.kernels.expert_layers import (
    ExpertKind,
    ExpertLayer,
    expert_layer,
    joins,
    scales_in_range,
    with_shared,
)
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.routed_blocks import (
    block_problem,
    experts_of,
    launch_block_kernels,
    shared_of,
    swap_block,
)
from engine.runner.kernels.swapped_modules import SwappedModules

BlockKind = tuple[type[nn.Module], ExpertKind]
Block = tuple[nn.Module, ExpertLayer]


class RoutedExperts:
    """The layers of experts of a loaded model, and which of them kernels compute."""

    def __init__(self, model: nn.Module, device_kind: DeviceKind) -> None:
        found = [module for module in model.modules() if isinstance(module, SwitchGLU)] if device_kind == "cuda" else []
        self._num_layers = len(found)
        self._layers = [(module, layer) for module in found if (layer := expert_layer(module)) is not None]
        layers = {id(module): layer for module, layer in self._layers}
        around = [(block, experts_of(block)) for block in model.modules()] if layers else []
        self._blocks: list[tuple[BlockKind, Block]] = [
            ((type(block), layers[id(experts)].kind), (block, layers[id(experts)]))
            for block, experts in around
            if id(experts) in layers
        ]
        self._trusted: set[ExpertKind] = set()
        self._trusted_blocks: set[BlockKind] = set()
        self._problems: dict[str, str] = {}
        self._swapped = SwappedModules()

    @property
    def note(self) -> str | None:
        """One line for people; None where there are no experts."""
        if not self._num_layers:
            return None
        own = sum(layer.kind in self._trusted for _, layer in self._layers)
        blocks = sum(kind in self._trusted_blocks for kind, _ in self._blocks)
        said = f"experts: own kernels for {own} of {self._num_layers} layers"
        said += f", with their routing for {blocks}" if blocks else ""
        left = self._num_layers - len(self._layers)
        said += f"; {left} in a form that no kernel covers" if left else ""
        return "; ".join([said, *(f"{what}: {problem}" for what, problem in self._problems.items())])

    def launch_kernels(self) -> None:
        """Launch the kernels that :meth:`choose` will try; where kernels are only collected, say what to compile."""
        for layer in self._kinds().values():
            with suppress(Exception):  # what fails here fails again when it is checked, and is said then
                launch_kernels(layer)
        for block, layer in dict(self._blocks).values():
            with suppress(Exception):
                launch_block_kernels(block, layer.kind, joined=_joins(block, layer))

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check the kernels on a layer of each kind; ``progress(done, total)`` counts kinds."""
        with collecting() as awaited:
            self.launch_kernels()
        compile_all(awaited)
        self._join_shared()
        kinds, blocks = self._kinds(), dict(self._blocks)
        for done, (kind, layer) in enumerate(kinds.items(), 1):
            in_range = all(scales_in_range(one) for one in self._every() if one.kind == kind)
            problem = experts_problem(layer) if in_range else "scales are beyond what kernels unpack"
            if problem is not None:
                self._problems[str(kind)] = problem
            else:
                self._trusted.add(kind)
            if progress is not None:
                progress(done, len(kinds) + len(blocks))
        for done, (block_kind, (block, layer)) in enumerate(blocks.items(), len(kinds) + 1):
            if layer.kind in self._trusted:
                problem = block_problem(block, layer)
                if problem is not None:
                    self._problems["routing"] = problem
                else:
                    self._trusted_blocks.add(block_kind)
            if progress is not None:
                progress(done, len(kinds) + len(blocks))

    def install(self) -> None:
        """Swap kernels into the layers of those kinds that were found right."""
        self.remove()
        for module, layer in self._layers:
            if layer.kind in self._trusted:
                self._swap(module, layer)
        for kind, (block, layer) in self._blocks:
            if kind in self._trusted_blocks:
                swap_block(block, layer, self._swapped)

    def remove(self) -> None:
        """Leave every module as it was; weights stay slices of joined ones."""
        self._swapped.undo()

    def _kinds(self) -> dict[ExpertKind, ExpertLayer]:
        return {layer.kind: layer for layer in self._every()}

    def _every(self) -> list[ExpertLayer]:
        """Of all modules, and of all blocks, whose shared experts may be among them."""
        return [layer for _, layer in (*self._layers, *(block for _, block in self._blocks))]

    def _join_shared(self) -> None:
        """Have shared experts be one more of the routed ones, where they are alike and there is memory for that."""
        places = {id(module): place for place, (module, _) in enumerate(self._layers)}
        for number in range(len(self._blocks)):
            (kind, _), (block, layer) = self._blocks[number]
            module = experts_of(block)
            if module is None or not _joins(block, layer):
                continue
            try:
                whole = with_shared(layer, module, shared_of(block))
            except RuntimeError as error:
                whole = None
                self._problems["shared experts"] = error_line(error, 120)
            sliced = expert_layer(module)
            assert sliced is not None, "the weights that were taken before"
            self._layers[places[id(module)]] = module, sliced  # the old ones would be a second copy
            self._blocks[number] = (kind, (whole or sliced).kind), (block, whole or sliced)
            del layer
            mx.clear_cache()  # no buffer of so many experts is asked for again
            if whole is None:
                return

    def _swap(self, module: nn.Module, layer: ExpertLayer) -> None:
        def experts(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
            if layer.takes(x, indices):
                return layer.compute(x, indices)
            usual: mx.array = SwitchGLU.__call__(self, x, indices)
            return usual

        self._swapped.swap_method(module, "__call__", experts)


def _joins(block: nn.Module, layer: ExpertLayer) -> bool:
    """Whether a block's shared expert can be one of its experts, and is not yet."""
    module, shared = experts_of(block), shared_of(block)
    return module is not None and shared is not None and joins(layer, module, shared)
