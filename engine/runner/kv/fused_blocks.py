"""Which layers of a loaded model are fused: each kind is tried on one layer's own weights, and swapped where right."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.handover import Handover
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.block_trial import BlockTrial
from engine.runner.kv.fused_block import (
    FusedBlock,
    OwnProducts,
    Rows,
    fused_call,
    fusing_problem,
    is_block,
    passes_rows_on,
)

_LEFT_OUT: dict[OwnProducts, str] = {
    "all": "narrow products do not split K", "few": "few rows are not fused", "none": "layers are not fused",
}  # fmt: skip
"""What is to be said where a way is wrong, in the order in which they are tried."""


class FusedBlocks:
    """The layers of a loaded model that compute a decode step in few launches.

    ``kernels`` attend, over pages of ``block_size`` slots that keep ``kv_cache_dtype``. Choose, then install before a
    step is compiled.
    """

    def __init__(
        self, model: nn.Module, device_kind: DeviceKind, kernels: AttentionKernels | None, block_size: int,
        kv_cache_dtype: str = "auto",
    ) -> None:  # fmt: skip
        modules = [module for _, module in model.named_modules()][::-1] if kernels else []  # as called: it begins last
        self._layers: list[Any] = [module for module in modules if is_block(module)]
        orders = [[id(layer) for layer in trunk.layers] for trunk in modules if passes_rows_on(trunk)]
        self._hand_over = orders == [[id(layer) for layer in self._layers]]
        self._kernels, self._block_size, self._kv_cache_dtype = kernels, block_size, kv_cache_dtype
        self._ways: tuple[OwnProducts, ...] = tuple(_LEFT_OUT) if device_kind == "cuda" else ("none",)
        self._blocks: list[FusedBlock | None] = []
        self._swapped = SwappedModules()
        self.problems: tuple[str, ...] = ()
        """Why layers are not fused, or not with kernels for few rows: a line each."""

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Try one layer of each kind, and join the weights of those that are right. Raises nothing.

        ``progress(done, total)`` counts layers.
        """
        found: dict[tuple[object, ...], tuple[str | None, OwnProducts]] = {}
        problems: dict[str, None] = {}
        self._blocks = []
        for number, layer in enumerate(self._layers):
            kind = _kind(layer)
            if kind not in found:
                found[kind] = self._tried(layer, problems)
            problem, own = found[kind]
            right = problem is None and fusing_problem(layer) is None
            self._blocks.append(_joined(layer, own, problems) if right else None)
            if progress is not None:
                progress(number + 1, len(self._layers))
        self.problems = tuple(problems)

    @property
    def note(self) -> str | None:
        """One line for people; None where there is nothing to fuse."""
        if not self._layers:
            return None
        fused = sum(block is not None for block in self._blocks)
        said = f"fused layers: {fused} of {len(self._layers)}"
        return "; ".join([said, *self.problems])

    @property
    def products(self) -> frozenset[int]:
        """Ids of the modules whose products are not computed for few rows any more, where layers are fused.

        Packed weights stay out: MLX's product of them starts slowly, and short prompts go by them.
        """
        fused = [layer for layer, block in zip(self._layers, self._blocks, strict=False) if block is not None]
        return frozenset(id(one) for layer in fused for _, one in layer.named_modules() if type(one) is nn.Linear)

    def install(self) -> None:
        """Swap what was chosen into the model's layers."""
        self.remove()
        swap_layers(self._swapped, self._layers, self._blocks, hand_over=self._hand_over)

    def remove(self) -> None:
        """Leave every layer as it was; its weights stay slices of joined ones."""
        self._swapped.undo()

    def _tried(self, layer: Any, problems: dict[str, None]) -> tuple[str | None, OwnProducts]:
        """Why layers like this one are not fused, and which kernels of products are right."""
        said: str | None = None
        for own in self._ways:
            problem = self._problem(layer, own)
            if problem is None:
                break
            said = f"{_LEFT_OUT[own]}: {problem}"
        if said is not None:
            problems[said] = None
        return problem, own

    def _problem(self, layer: Any, own: OwnProducts) -> str | None:
        try:
            if problem := fusing_problem(layer):
                return problem
            assert self._kernels is not None
            block = FusedBlock.of(layer, own)
            return BlockTrial(layer, self._kernels, self._block_size, self._kv_cache_dtype).problem(block)
        except Exception as error:  # noqa: BLE001  (whatever stops it, the layers have mlx-lm's own way)
            return error_line(error)


def swap_layers(
    swapped: SwappedModules, layers: Sequence[Any], blocks: Sequence[FusedBlock | None], *, hand_over: bool = True
) -> None:
    """Have each of ``layers``, in the order of their calls, compute by its block if it has one.

    ``hand_over``: and leave its rows to the one behind it.
    """
    handover = Handover[Rows]()
    for layer, block, behind in zip(layers, blocks, [*blocks[1:], None], strict=False):
        if block is not None:
            next_norm = behind.input_norm if behind is not None and hand_over else None
            call = fused_call(type(layer), block, handover, next_norm)
            swapped.swap_method(layer, "__call__", call)


def _joined(layer: Any, own: OwnProducts, problems: dict[str, None]) -> FusedBlock | None:
    """A layer like one that was right, with its weights joined, if there is memory for that."""
    try:
        return FusedBlock.of(layer, own)
    except RuntimeError as error:
        problems[f"a layer is not fused: {' '.join(str(error).split())[:160]}"] = None
        return None


def _kind(layer: Any) -> tuple[object, ...]:
    """What layers have in common that are computed by the same kernels."""
    attention = layer.self_attn
    shapes = [(name, value.shape, value.dtype) for name, value in tree_flatten(layer.parameters())]
    packed = [(getattr(one, "bits", 0), getattr(one, "group_size", 0)) for _, one in layer.named_modules()]
    return type(layer), type(attention.rope), attention.n_heads, attention.n_kv_heads, *shapes, *packed
