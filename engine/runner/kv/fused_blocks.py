"""Which layers of a loaded model are fused: each kind is tried on one layer's own weights, and swapped where right."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.handover import Handover
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.block_trial import BlockTrial
from engine.runner.kv.fused_block import (
    FusedBlock,
    Rows,
    fused_call,
    fusing_problem,
    is_block,
    passes_rows_on,
)
from engine.runner.kv.joined_modules import JoinedModules, OwnProducts


class FusedBlocks(JoinedModules[FusedBlock]):
    """The layers of a loaded model that compute a decode step in few launches.

    ``kernels`` attend, over pages of ``block_size`` slots that keep ``kv_cache_dtype``.
    """

    name, counted = "fused layers", ""
    left_out: Mapping[OwnProducts, str] = {
        "all": "narrow products do not split K", "few": "few rows are not fused", "none": "layers are not fused",
    }  # fmt: skip
    unjoined = "a layer is not fused"

    def __init__(
        self, model: nn.Module, device_kind: DeviceKind, kernels: AttentionKernels | None, block_size: int,
        kv_cache_dtype: str = "auto",
    ) -> None:  # fmt: skip
        modules = [module for _, module in model.named_modules()][::-1] if kernels else []  # as called: it begins last
        super().__init__(filter(is_block, modules), device_kind)
        orders = [[id(layer) for layer in trunk.layers] for trunk in modules if passes_rows_on(trunk)]
        self._hand_over = orders == [[id(layer) for layer in self.modules]]
        self._kernels, self._block_size, self._kv_cache_dtype = kernels, block_size, kv_cache_dtype

    def refused(self, module: Any) -> str | None:
        """See :class:`JoinedModules`."""
        return fusing_problem(module)

    def join(self, module: Any, own: OwnProducts) -> FusedBlock:
        """See :class:`JoinedModules`."""
        return FusedBlock.of(module, own)

    def wrong(self, module: Any, fused: FusedBlock) -> str | None:
        """See :class:`JoinedModules`."""
        assert self._kernels is not None
        return BlockTrial(module, self._kernels, self._block_size, self._kv_cache_dtype).problem(fused)

    def kind(self, module: Any) -> tuple[object, ...]:
        """See :class:`JoinedModules`."""
        attention = module.self_attn
        return type(attention.rope), attention.n_heads, attention.n_kv_heads, *super().kind(module)

    def swap(self) -> None:
        """See :class:`JoinedModules`."""
        swap_layers(self.swapped, self.modules, self.fused, hand_over=self._hand_over)


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
