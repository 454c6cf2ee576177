"""Which of a loaded model's attentions of Gemma 4 take few launches: each kind is tried on one layer's own weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.joined_check import JoinedShape
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.gemma_attention import (
    GemmaAttention,
    OwnProducts,
    is_joinable,
    joined_call,
    joined_modules,
    joining_problem,
    value_heads,
)
from engine.runner.kv.layer_trial import CONTEXT, Context, LayerTrial, Own, with_weights_of

_LEFT_OUT: dict[OwnProducts, str] = {
    "few": "few rows are multiplied by MLX", "none": "attention is mlx-lm's own",
}  # fmt: skip
"""What is to be said where a way is wrong, in the order in which they are tried."""
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
        stand_in = SwappedModules()
        stand_in.swap_method(layer.o_proj, "__call__", lambda _self, attended: attended)
        try:
            attended: mx.array = layer(x, mask, cache)[0]
        finally:
            stand_in.undo()
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


class GemmaAttentions:
    """The attentions of a loaded Gemma 4 that compute a decode step in few launches.

    ``kernels`` attend, over pages of ``block_size`` slots that keep ``kv_cache_dtype``. Choose, then install before a
    step is compiled.
    """

    def __init__(
        self, model: nn.Module, device_kind: DeviceKind, kernels: AttentionKernels | None, block_size: int,
        kv_cache_dtype: str = "auto",
    ) -> None:  # fmt: skip
        found = {id(module): module for module in model.modules() if kernels and is_joinable(module)}
        self._layers: list[Any] = list(found.values())  # one that stands twice is joined once
        self._kernels, self._block_size, self._kv_cache_dtype = kernels, block_size, kv_cache_dtype
        self._ways: tuple[OwnProducts, ...] = tuple(_LEFT_OUT) if device_kind == "cuda" else ("none",)
        self._chosen: list[tuple[Any, GemmaAttention]] = []
        self._swapped = SwappedModules()
        self.problems: tuple[str, ...] = ()
        """Why attentions are mlx-lm's own, or without kernels for few rows: a line each."""

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Try one layer of each kind, and join the weights of those that are right. Raises nothing.

        ``progress(done, total)`` counts layers.
        """
        found: dict[tuple[object, ...], tuple[str | None, OwnProducts]] = {}
        problems: dict[str, None] = {}
        self._chosen = []
        for number, layer in enumerate(self._layers, 1):
            kind = _kind(layer)
            if kind not in found:
                found[kind] = self._tried(layer, problems)
            problem, own = found[kind]
            if problem is None and joining_problem(layer) is None:
                try:
                    self._chosen.append((layer, GemmaAttention.of(layer, own)))
                except RuntimeError as error:  # no memory to join its weights
                    problems[f"an attention is mlx-lm's own: {error_line(error)}"] = None
            if progress is not None:
                progress(number, len(self._layers))
        self.problems = tuple(problems)

    @property
    def note(self) -> str | None:
        """One line for people; None where there are no such layers."""
        if not self._layers:
            return None
        return "; ".join([f"fused attention: {len(self._chosen)} of {len(self._layers)} layers", *self.problems])

    @property
    def products(self) -> frozenset[int]:
        """Ids of the modules whose products are not computed for few rows any more.

        Packed weights stay out: MLX's product of them starts slowly, and short prompts go by them.
        """
        modules = [one for layer, _ in self._chosen for one in joined_modules(layer)]
        return frozenset(id(one) for one in modules if type(one) is nn.Linear)

    def install(self) -> None:
        """Swap what was chosen into the model's layers."""
        self.remove()
        for layer, fused in self._chosen:
            self._swapped.swap_method(layer, "__call__", joined_call(fused))

    def remove(self) -> None:
        """Leave every layer as it was; its weights stay slices of joined ones."""
        self._swapped.undo()

    def _tried(self, layer: Any, problems: dict[str, None]) -> tuple[str | None, OwnProducts]:
        """Why layers like this one are mlx-lm's own, and which kernels of products are right."""
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
            if problem := joining_problem(layer):
                return problem
            assert self._kernels is not None
            trial = AttentionTrial(layer, self._kernels, self._block_size, self._kv_cache_dtype)
            return trial.problem(GemmaAttention.of(layer, own))
        except Exception as error:  # noqa: BLE001  (whatever stops it, the layer has mlx-lm's own way)
            return error_line(error)


def _kind(attention: Any) -> tuple[object, ...]:
    """What layers have in common that are computed by the same kernels."""
    shapes = [(name, value.shape, value.dtype) for name, value in tree_flatten(attention.parameters())]
    packed = [(getattr(one, "bits", 0), getattr(one, "group_size", 0)) for _, one in attention.named_modules()]
    return type(attention.rope), attention.is_sliding, attention.n_heads, attention.n_kv_heads, *shapes, *packed
