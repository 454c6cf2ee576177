"""What memory a model's layers need for a sequence, asked of the model itself.

The model runs one token lazily on recording caches: shapes are known without computing anything,
so this works before the weights are read, for any architecture that mlx-lm has.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys [num_kv_heads, tokens, key_dim] and values [num_kv_heads, tokens, value_dim] of one layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    def bytes_per_token(self, dtype: mx.Dtype | None = None) -> int:
        """Bytes of one token's keys and values, in the layer's own element type or in ``dtype``."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * (dtype or self.dtype).size


class UnsupportedCacheError(Exception):
    """The model's layers need a kind of cache that has no paged form. The message names it."""


class _RecordingCache(KVCache):  # type: ignore[misc]
    """mlx-lm's own cache, which also notes the shapes that pass."""

    shape: LayerShape | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        return super().update_and_fetch(keys, values)  # type: ignore[no-any-return]


def probe_layers(model: nn.Module) -> list[LayerShape]:
    """The KV shapes of all layers, in order. Computes nothing.

    Raises :class:`UnsupportedCacheError` if a layer keeps anything but keys and values of all tokens.
    """
    kinds = {type(cache) for cache in make_prompt_cache(model)}
    if kinds - {KVCache}:
        raise UnsupportedCacheError(", ".join(sorted(kind.__name__ for kind in kinds - {KVCache})))
    caches = [_RecordingCache() for _ in make_prompt_cache(model)]
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    shapes = [cache.shape for cache in caches]
    if None in shapes:
        raise UnsupportedCacheError(f"layer {shapes.index(None)} stores no keys")
    return [shape for shape in shapes if shape is not None]


def contiguous_bytes_per_token(model: nn.Module) -> int:
    """Bytes that one token adds to mlx-lm's own caches, measured lazily over a growing prompt.

    Sliding and recurrent layers add nothing once they are full, so for them this is a bound.
    """
    sizes = []
    for length in (256, 512):
        caches = make_prompt_cache(model)
        model(mx.zeros((1, length), dtype=mx.int32), cache=caches)
        sizes.append(sum(int(cache.nbytes) for cache in caches))
    return max(1, (sizes[1] - sizes[0]) // 256)


def num_logits(model: nn.Module) -> int:
    """Width of the logits, asked of the model (its files may say otherwise). Computes nothing."""
    logits = model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))
    return int(logits.shape[-1])
