"""What memory a model's layers need for a sequence, asked of the model itself.

The model runs one token lazily on recording caches: kinds and shapes are known without computing
anything, so this works before the weights are read, for any architecture that mlx-lm has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from engine.memory.cache_spec import KVCacheSpec, KVVectors

LeafKind = Literal["full", "sliding", "state"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys [num_kv_heads, tokens, key_dim] and values [num_value_heads, tokens, value_dim] of one layer.

    Latent attention (MLA) keeps two different things there, so heads may differ too.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    num_value_heads: int = 0

    def __post_init__(self) -> None:
        if not self.num_value_heads:
            object.__setattr__(self, "num_value_heads", self.num_kv_heads)

    @property
    def vectors(self) -> tuple[KVVectors, KVVectors]:
        """What one token adds: its keys and its values."""
        size = self.dtype.size
        return KVVectors(self.num_kv_heads, self.key_dim, size), KVVectors(self.num_value_heads, self.value_dim, size)


@dataclass(frozen=True, slots=True)
class CacheLeaf:
    """One cache of one layer: its kind, and what a token (keys and values) or a sequence (state) needs.

    ``states`` are shapes, without the batch axis, and element types; ``place`` tells a layer's own caches apart.
    """

    kind: LeafKind
    layer: int
    shape: LayerShape | None = None
    window: int | None = None
    states: tuple[tuple[tuple[int, ...], mx.Dtype], ...] = ()
    place: int = 0

    @property
    def is_latent(self) -> bool:
        """Whether all heads share one latent vector and one of positions (MLA), as in DeepSeek."""
        shape = self.shape
        if self.kind != "full" or shape is None:
            return False
        return shape.num_kv_heads == shape.num_value_heads == 1 and shape.key_dim != shape.value_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return sum(math.prod(shape) * dtype.size for shape, dtype in self.states)


CacheTree = list[CacheLeaf | tuple[CacheLeaf, ...]]
"""One entry per cache that the model asks for; a tuple where a layer has several."""


class UnsupportedCacheError(Exception):
    """The model's layers need a kind of cache that has no paged form. The message names it."""


class _RecordingCache(KVCache):  # type: ignore[misc]
    """mlx-lm's own cache, which also notes the shapes that pass."""

    shape: LayerShape | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, values.shape[1])
        return super().update_and_fetch(keys, values)  # type: ignore[no-any-return]

    start_position = 0

    def maybe_trim_front(self) -> None:
        """As in :class:`ChunkedKVCache`."""


def probe_caches(model: nn.Module) -> CacheTree:
    """Kinds and shapes of all caches, in the model's order. Computes nothing.

    Raises :class:`UnsupportedCacheError` for a kind that has no paged form here.
    """
    originals = make_prompt_cache(model)
    recorders = [_recorder(cache) for cache in originals]
    model(mx.zeros((1, 1), dtype=mx.int32), cache=recorders)
    pairs = zip(originals, recorders, strict=True)
    return [_leaves(layer, cache, recorder) for layer, (cache, recorder) in enumerate(pairs)]


def flatten(tree: CacheTree) -> list[CacheLeaf]:
    """All leaves in order."""
    return [leaf for entry in tree for leaf in (entry if isinstance(entry, tuple) else (entry,))]


def group_leaves(leaves: Sequence[CacheLeaf]) -> list[list[CacheLeaf]]:
    """Leaves that need the same kind of memory together: full attention first, then windows, then state."""
    order = {"full": 0, "sliding": 1, "state": 2}
    groups: dict[tuple[int, int], list[CacheLeaf]] = {}
    for leaf in leaves:
        groups.setdefault((order[leaf.kind], leaf.window or 0), []).append(leaf)
    return [groups[key] for key in sorted(groups)]


def group_spec(leaves: Sequence[CacheLeaf], block_size: int, chunk: int, kv_cache_dtype: str) -> KVCacheSpec:
    """One group for the memory plan; a step's ``chunk`` tokens run ahead of sliding windows."""
    first, layers = leaves[0], tuple(leaf.layer for leaf in leaves)
    if first.kind == "state":
        return KVCacheSpec("state", layers, state_bytes=sum(leaf.state_bytes for leaf in leaves), block_size=block_size)
    vectors = [vector for leaf in leaves if leaf.shape is not None for vector in leaf.shape.vectors]
    return KVCacheSpec(
        "latent" if all(leaf.is_latent for leaf in leaves) else first.kind,
        layers,
        sum(vector.num_bytes(kv_cache_dtype) for vector in vectors),
        window=first.window,
        ahead=0 if first.window is None else chunk,
        block_size=block_size,
        vectors=tuple(vectors),
    )


def shared_layers(model: nn.Module) -> tuple[int, ...]:
    """Layers that keep nothing, since they read the keys and values of layers before them (Gemma 3n, Gemma 4)."""
    configs = [getattr(module, name, None) for module in model.modules() for name in ("config", "args")]
    shared = max((int(getattr(config, "num_kv_shared_layers", 0) or 0) for config in configs), default=0)
    return tuple(range(len(model.layers)))[-shared:] if shared else ()


class ModelCaches:
    """What a model's layers keep: asked once, before anything is patched into the model, for any number of plans."""

    def __init__(self, model: nn.Module) -> None:
        self.shared_layers = shared_layers(model)
        self._leaves: list[list[CacheLeaf]] = []
        self._measured: tuple[KVCacheSpec, ...] = ()
        try:
            self._leaves = group_leaves(flatten(probe_caches(model)))
        except UnsupportedCacheError:
            self._measured = _measured_groups(model)

    def groups(self, block_size: int, chunk: int, *, paged: bool) -> list[KVCacheSpec]:
        """The cache groups in the model's own element type; a step's ``chunk`` tokens run ahead of windows.

        Where not ``paged``, or a kind of cache has no paged form, they are mlx-lm's contiguous caches: blocks and
        slots are bookkeeping, the element type cannot be chosen, and what is unknown is billed as it was measured.
        """
        if self._measured:
            return [replace(group, block_size=block_size) for group in self._measured]
        groups = [group_spec(leaves, block_size, chunk, "auto") for leaves in self._leaves]
        return groups if paged else [replace(group, vectors=()) for group in groups]


def _measured_groups(model: nn.Module) -> tuple[KVCacheSpec, ...]:
    """Sizes of mlx-lm's own caches over a growing prompt, computed lazily.

    A window longer than that prompt is billed as if it had no end.
    """
    sizes = []
    for length in (256, 512):
        caches = make_prompt_cache(model)
        model(mx.zeros((1, length), dtype=mx.int32), cache=caches)
        sizes.append(sum(int(cache.nbytes) for cache in caches))
    per_token, layers = max(1, (sizes[1] - sizes[0]) // 256), tuple(range(len(model.layers)))
    groups = [KVCacheSpec("full", layers, per_token)]
    if sizes[0] > 256 * per_token:
        groups.append(KVCacheSpec("state", layers, state_bytes=sizes[0] - 256 * per_token))
    return tuple(groups)


def num_logits(model: nn.Module) -> int:
    """Width of the logits, asked of the model (its files may say otherwise). Computes nothing."""
    logits = model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))
    return int(logits.shape[-1])


def _recorder(cache: Any) -> Any:
    if type(cache) in (KVCache, RotatingKVCache, ChunkedKVCache):
        return _RecordingCache()
    if type(cache) is CacheList:
        return CacheList(*(_recorder(inner) for inner in cache.caches))
    return cache


def _leaves(layer: int, cache: Any, recorder: Any) -> CacheLeaf | tuple[CacheLeaf, ...]:
    if type(cache) is CacheList:
        pairs = zip(cache.caches, recorder.caches, strict=True)
        return tuple(replace(_leaf(layer, *pair), place=place) for place, pair in enumerate(pairs))
    return _leaf(layer, cache, recorder)


def _leaf(layer: int, cache: Any, recorder: Any) -> CacheLeaf:
    if type(cache) is ArraysCache:
        if any(array is None for array in recorder.cache):
            raise UnsupportedCacheError(f"a state that layer {layer} leaves empty")
        return CacheLeaf("state", layer, states=tuple((array.shape[1:], array.dtype) for array in recorder.cache))
    if type(cache) is RotatingKVCache and not cache.keep:
        return CacheLeaf("sliding", layer, _shape(layer, recorder), window=int(cache.max_size))
    if type(cache) is ChunkedKVCache:  # a chunk is never longer than what lies behind a window of its size
        return CacheLeaf("sliding", layer, _shape(layer, recorder), window=int(cache.chunk_size))
    if type(cache) is KVCache:
        return CacheLeaf("full", layer, _shape(layer, recorder))
    raise UnsupportedCacheError(type(cache).__name__)


def _shape(layer: int, recorder: _RecordingCache) -> LayerShape:
    if recorder.shape is None:
        raise UnsupportedCacheError(f"unused in layer {layer}")
    return recorder.shape
