"""Which of a loaded model's attentions of Gemma 4 take few launches: each kind is tried on one layer's own weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.joined_check import JoinedShape
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.gemma_attention import (
    GemmaAttention,
    is_joinable,
    joined_call,
    joined_modules,
    joining_problem,
    value_heads,
)
from engine.runner.kv.joined_modules import JoinedModules, OwnProducts, each_once
from engine.runner.kv.layer_trial import CONTEXT, Context, LayerTrial, Own, passing_on, with_weights_of

_LOSS = 2.5
"""Scores are not scaled, so that rounding may turn them by much: how near two of them are is chance at a few rows. A
norm or a rotation left out makes far more than that."""


class AttentionTrial(LayerTrial[GemmaAttention, mx.array]):
    """One layer's attention on random rows, before its output's product."""

    def __init__(self, layer: Any, kernels: AttentionKernels, block_size: int, kv_cache_dtype: str = "auto") -> None:
        shape = JoinedShape(
            dtype=layer.q_norm.weight.dtype, heads=int(layer.n_heads), kv_heads=int(layer.n_kv_heads),
            dim=int(layer.head_dim), block_size=block_size, scale=float(layer.scale),
            window=int(layer.config.sliding_window) if layer.is_sliding else None, eps=float(layer.q_norm.eps),
            value_heads=value_heads(layer),
        )  # fmt: skip
        super().__init__(layer, shape, int(layer.config.hidden_size), kernels, kv_cache_dtype, loss=_LOSS)

    def inputs(self, rows: int) -> tuple[mx.array, Context]:
        """See :class:`LayerTrial`. The keys are as large as the layer's own."""
        x, context = super().inputs(rows)
        return x, replace(context, keys=context.keys * self._layer.k_norm.weight)

    def copied(self, layer: Any, dtype: mx.Dtype) -> Any:
        """See :class:`LayerTrial`."""
        return with_weights_of(layer, type(layer)(layer.config, layer.layer_idx), dtype, but="o_proj")

    def result(self, layer: Any, x: mx.array, cache: Context) -> mx.array:
        """See :class:`LayerTrial`."""
        window, mask = self.shape.window, None
        if window is not None and window <= CONTEXT:
            mask = mx.arange(CONTEXT + 1) > CONTEXT - window
        with passing_on(layer.o_proj):
            attended: mx.array = layer(x, mask, cache)[0]
        return attended

    def fused(self, way: GemmaAttention, x: mx.array, context: Context) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """See :class:`LayerTrial`."""
        cache, pages = self.begun(context)
        found = way(x.reshape(x.shape[0], -1), cache).reshape(*x.shape[:-1], -1)
        cache.finish()
        return found, self.written(pages, found)

    def compared(self, found: mx.array, usual: Own, exact: Own) -> Mapping[str, tuple[mx.array, mx.array, mx.array]]:
        """See :class:`LayerTrial`."""
        return {"its result": (found, usual.result, exact.result)}


class GemmaAttentions(JoinedModules[GemmaAttention]):
    """The attentions of a loaded Gemma 4 that compute a decode step in few launches.

    ``kernels`` attend, over pages of ``block_size`` slots that keep ``kv_cache_dtype``.
    """

    name, counted = "fused attention", " layers"
    left_out: Mapping[OwnProducts, str] = {
        "few": "few rows are multiplied by MLX", "none": "attention is mlx-lm's own",
    }  # fmt: skip
    unjoined = "an attention is mlx-lm's own"

    def __init__(
        self, model: nn.Module, device_kind: DeviceKind, kernels: AttentionKernels | None, block_size: int,
        kv_cache_dtype: str = "auto",
    ) -> None:  # fmt: skip
        modules = [module for module in each_once(model.modules()) if kernels and is_joinable(module)]
        super().__init__(modules, device_kind)
        self._kernels, self._block_size, self._kv_cache_dtype = kernels, block_size, kv_cache_dtype

    def refused(self, module: Any) -> str | None:
        """See :class:`JoinedModules`."""
        return joining_problem(module)

    def join(self, module: Any, own: OwnProducts) -> GemmaAttention:
        """See :class:`JoinedModules`."""
        return GemmaAttention.of(module, own)

    def wrong(self, module: Any, fused: GemmaAttention) -> str | None:
        """See :class:`JoinedModules`."""
        assert self._kernels is not None
        return AttentionTrial(module, self._kernels, self._block_size, self._kv_cache_dtype).problem(fused)

    def joined(self, module: Any) -> list[nn.Module]:
        """See :class:`JoinedModules`."""
        return joined_modules(module)

    def kind(self, module: Any) -> tuple[object, ...]:
        """See :class:`JoinedModules`."""
        heads = module.n_heads, module.n_kv_heads
        return type(module.rope), module.is_sliding, *heads, *super().kind(module)

    def swap(self) -> None:
        """See :class:`JoinedModules`."""
        for layer, fused in self.chosen:
            self.swapped.swap_method(layer, "__call__", joined_call(fused))
