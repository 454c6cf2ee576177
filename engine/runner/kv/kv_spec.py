"""What memory a model's layers need for a sequence, asked of the model itself.

The model runs one token lazily on recording caches: kinds and shapes are known without computing
anything, so this works before the weights are read, for any architecture that mlx-lm has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from engine.errors import ModelLoadError
from engine.memory.cache_spec import (
    FullAttentionSpec,
    KVCacheSpec,
    KVVectors,
    MLAAttentionSpec,
    SlidingWindowSpec,
    StateSpec,
    merge_specs,
)
from engine.runner.device.memory import is_out_of_memory


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

    @property
    def is_latent(self) -> bool:
        """Whether all heads share one latent vector and one of positions (MLA), as in DeepSeek."""
        return self.num_kv_heads == self.num_value_heads == 1 and self.key_dim != self.value_dim


@dataclass(frozen=True, slots=True)
class CacheLeaf:
    """One cache of one layer: what it costs, and the shapes of its keys and values or of its states.

    ``states`` are shapes, without the batch axis, and element types; ``place`` tells a layer's own caches apart.
    """

    spec: KVCacheSpec
    shape: LayerShape | None = None
    states: tuple[tuple[tuple[int, ...], mx.Dtype], ...] = ()
    place: int = 0


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
    recorders = recording_caches(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=recorders)
    pairs = zip(originals, recorders, strict=True)
    return [_leaves(layer, cache, recorder) for layer, (cache, recorder) in enumerate(pairs)]


def recording_caches(model: nn.Module) -> list[Any]:
    """Caches for one lazy call of ``model``: mlx-lm's own, which note the shapes that pass."""
    return [_recorder(cache) for cache in make_prompt_cache(model)]


def flatten(tree: CacheTree) -> list[CacheLeaf]:
    """All leaves in order."""
    return [leaf for entry in tree for leaf in (entry if isinstance(entry, tuple) else (entry,))]


def group_leaves(leaves: Sequence[CacheLeaf]) -> list[list[CacheLeaf]]:
    """Leaves that need the same kind of memory together: full attention first, then windows, then state."""
    groups: dict[tuple[int, int], list[CacheLeaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.spec.group_key, []).append(leaf)
    return [groups[key] for key in sorted(groups)]


def group_spec(leaves: Sequence[CacheLeaf], block_size: int, chunk: int, kv_cache_dtype: str = "auto") -> KVCacheSpec:
    """One group for the memory plan; a step's ``chunk`` tokens run ahead of sliding windows."""
    spec = merge_specs([leaf.spec for leaf in leaves]).for_steps(block_size, chunk)
    return spec if kv_cache_dtype == "auto" else spec.with_kv_cache_dtype(kv_cache_dtype)


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
        except Exception as error:
            if is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:200]
            raise ModelLoadError(
                f"the model's own code fails at a single token ({type(error).__name__}: {said}); "
                "is its config.json whole?"
            ) from error

    def groups(self, block_size: int, chunk: int, *, paged: bool) -> list[KVCacheSpec]:
        """The cache groups in the model's own element type; a step's ``chunk`` tokens run ahead of windows.

        Where not ``paged``, or a kind of cache has no paged form, they are mlx-lm's contiguous caches: blocks and
        slots are bookkeeping, the element type cannot be chosen, and what is unknown is billed as it was measured.
        """
        if self._measured:
            return [replace(group, block_size=block_size) for group in self._measured]
        groups = [group_spec(leaves, block_size, chunk) for leaves in self._leaves]
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
    groups: list[KVCacheSpec] = [FullAttentionSpec(layers, per_token)]
    if sizes[0] > 256 * per_token:
        groups.append(StateSpec(layers, state_bytes=sizes[0] - 256 * per_token))
    return tuple(groups)


def num_logits(model: nn.Module) -> int:
    """Width of the logits, asked of the model (its files may say otherwise). Computes nothing."""
    return int(_logits(model).shape[-1])


def logits_dtype(model: nn.Module) -> mx.Dtype:
    """Element type of the logits, asked of the model. Computes nothing."""
    return _logits(model).dtype


def _logits(model: nn.Module) -> mx.array:
    logits: mx.array = model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))
    return logits


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
    """Recognises mlx-lm's kinds of caches by their types."""
    if type(cache) is ArraysCache:
        if any(array is None for array in recorder.cache):
            raise UnsupportedCacheError(f"a state that layer {layer} leaves empty")
        states = tuple((array.shape[1:], array.dtype) for array in recorder.cache)
        size = sum(math.prod(shape) * dtype.size for shape, dtype in states)
        return CacheLeaf(StateSpec((layer,), state_bytes=size), states=states)
    if type(cache) is RotatingKVCache and not cache.keep:
        return _pages(SlidingWindowSpec, layer, recorder, window=int(cache.max_size))
    if type(cache) is ChunkedKVCache:  # a chunk is never longer than what lies behind a window of its size
        return _pages(SlidingWindowSpec, layer, recorder, window=int(cache.chunk_size))
    if type(cache) is KVCache:
        latent = recorder.shape is not None and recorder.shape.is_latent
        return _pages(MLAAttentionSpec if latent else FullAttentionSpec, layer, recorder)
    raise UnsupportedCacheError(type(cache).__name__)


def _pages(kind: type[KVCacheSpec], layer: int, recorder: _RecordingCache, **given: int) -> CacheLeaf:
    """A cache of keys and values; ``given`` are fields of its kind."""
    shape = recorder.shape
    if shape is None:
        raise UnsupportedCacheError(f"unused in layer {layer}")
    per_token = sum(vector.num_bytes("auto") for vector in shape.vectors)
    return CacheLeaf(kind((layer,), per_token, vectors=shape.vectors, **given), shape)
