"""One layer's fused block on random rows, beside mlx-lm's own."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from engine.runner.kernels.joined_check import JoinedShape
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.fused_block import FusedBlock, Rows, head_dim
from engine.runner.kv.layer_trial import Context, LayerTrial, Own, with_weights_of


class BlockTrial(LayerTrial[FusedBlock, Rows]):
    """One layer's block on random rows, fused and not."""

    def __init__(self, layer: Any, kernels: AttentionKernels, block_size: int, kv_cache_dtype: str = "auto") -> None:
        attention, gain = layer.self_attn, layer.input_layernorm.weight
        shape = JoinedShape(
            dtype=gain.dtype, heads=int(attention.n_heads), kv_heads=int(attention.n_kv_heads),
            dim=head_dim(attention), block_size=block_size, scale=float(attention.scale),
            eps=float(attention.q_norm.eps) if "q_norm" in attention else None,
        )  # fmt: skip
        super().__init__(layer, shape, int(gain.shape[0]), kernels, kv_cache_dtype)

    def copied(self, layer: Any, dtype: mx.Dtype) -> Any:
        """See :class:`LayerTrial`."""
        return in_dtype(layer, dtype)

    def result(self, layer: Any, x: mx.array, cache: Context) -> mx.array:
        """See :class:`LayerTrial`."""
        result: mx.array = layer(x, None, cache)
        return result

    def fused(self, way: FusedBlock, x: mx.array, context: Context) -> tuple[Rows, tuple[mx.array, mx.array]]:
        """See :class:`LayerTrial`. The rows come normalized as if a layer with the same norm were behind it."""
        cache, pages = self.begun(context)
        found = way(Rows(x.reshape(x.shape[0], -1)), cache, way.input_norm)
        cache.finish()
        return found, self.written(pages, found.plain, found.plain if found.normed is None else found.normed)

    def compared(self, found: Rows, usual: Own, exact: Own) -> Mapping[str, tuple[mx.array, mx.array, mx.array]]:
        """See :class:`LayerTrial`: what the block adds to its rows, and those normalized."""
        wide, shape = exact.x, exact.x.shape
        plain, near, right = (
            some.astype(mx.float32) - wide for some in (found.plain.reshape(shape), usual.result, exact.result)
        )
        results = {"its result": (plain, near, right)}
        if found.normed is not None:
            near, right = (own.layer.input_layernorm(own.result) for own in (usual, exact))
            results["its normalized result"] = found.normed.reshape(shape), near, right
        return results


def in_dtype(layer: Any, dtype: mx.Dtype) -> Any:
    """A copy of mlx-lm's block with the same weights, unpacked, in another element type."""
    return with_weights_of(layer, type(layer)(layer.args), dtype)
