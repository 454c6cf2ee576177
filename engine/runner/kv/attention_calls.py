"""How a model's layers attend, asked of the model itself, and which of them kernels can serve."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import mlx.nn as nn

from engine.memory.cache_spec import SlidingWindowSpec
from engine.params.kv_dtype import QUANTIZED_BITS
from engine.runner.kernels.self_check import AttentionKernels, AttentionShape
from engine.runner.kv import attention_patch, capped_attention
from engine.runner.kv.attention_patch import AttentionCall
from engine.runner.kv.kv_pages import packing
from engine.runner.kv.kv_spec import (
    CacheLeaf,
    CacheTree,
    UnsupportedCacheError,
    flatten,
    probe_caches,
    recording_caches,
)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Which cache groups ``kernels`` serve: ``reasons`` has why not, per group; "" where they do."""

    kernels: AttentionKernels
    reasons: tuple[str, ...]

    @property
    def serves_any(self) -> bool:
        """Whether there is any use for kernels."""
        return "" in self.reasons

    @property
    def serves_all(self) -> bool:
        """Whether a step touches no other memory."""
        return all(not reason for reason in self.reasons)


def choose_kernels(
    model: nn.Module, tree: CacheTree, groups: Sequence[Sequence[CacheLeaf]], kernels: AttentionKernels, *,
    block_size: int, kv_cache_dtype: str,
) -> KernelChoice:  # fmt: skip
    """Ask ``kernels`` about every kind of layer in ``groups``: each variant runs on small tensors here and now."""
    calls = attention_calls(model, tree)
    found: dict[AttentionShape, str] = {}
    reasons = []
    for leaves in groups:
        if leaves[0].states:
            reasons.append(kernels.states.slots_problem(state for leaf in leaves for state in leaf.states) or "")
            continue
        why = ""
        for leaf in leaves:
            why = why or _unserved(leaf, calls.get(leaf), kv_cache_dtype)
            if not why:
                why = _problem(leaf, calls[leaf], kernels, block_size, found, kv_cache_dtype)
        reasons.append(why)
    return KernelChoice(kernels, tuple(reasons))


def kernel_shapes(model: nn.Module, block_size: int, kv_cache_dtype: str = "auto") -> list[AttentionShape]:
    """The shapes of ``model``'s layers that kernels are made for, each once, whether they are right here or not."""
    try:
        calls = attention_calls(model, probe_caches(model))
    except UnsupportedCacheError:
        return []
    served = [(leaf, call) for leaf, call in calls.items() if not _unserved(leaf, call, kv_cache_dtype)]
    return list(dict.fromkeys(_kernel_shape(leaf, call, block_size, kv_cache_dtype) for leaf, call in served))


def attention_calls(model: nn.Module, tree: CacheTree) -> dict[CacheLeaf, AttentionCall]:
    """How each cache's layer attends; none for layers that do it without mlx-lm's one function. Computes nothing."""
    caches = recording_caches(model)
    capped = capped_attention.install(model)
    try:
        with attention_patch.recorded(model) as calls:
            model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    finally:
        capped.undo()
    flat = [one for cache in caches for one in getattr(cache, "caches", (cache,))]
    leaves = flatten(tree)
    return {leaf: calls[id(cache)] for leaf, cache in zip(leaves, flat, strict=True) if id(cache) in calls}


def _unserved(leaf: CacheLeaf, call: AttentionCall | None, kv_cache_dtype: str) -> str:
    """What no kernel covers yet."""
    shape = leaf.shape
    assert shape is not None, "a state has no attention"
    if kv_cache_dtype in QUANTIZED_BITS:
        kept = [packing(dim, kv_cache_dtype) is not None for dim in (shape.key_dim, shape.value_dim)]
        if any(kept) and shape.is_latent:
            return f"no kernel for latent vectors in {kv_cache_dtype} yet"
        if len(set(kept)) > 1:
            return f"keys of {shape.key_dim} and values of {shape.value_dim}, of which {kv_cache_dtype} packs one"
    elif kv_cache_dtype not in ("auto", str(shape.dtype).rpartition(".")[2]):
        return f"{kv_cache_dtype} pages under a model in {str(shape.dtype).rpartition('.')[2]}"
    if call is None or shape.num_kv_heads != shape.num_value_heads:
        return "attention of the model's own"
    if shape.is_latent and not (call.biased and call.query_dim == shape.key_dim):
        return "attention of the model's own over latent vectors"
    return "" if call.dtype == shape.dtype else f"queries in {call.dtype} over keys in {shape.dtype}"


def _problem(
    leaf: CacheLeaf, call: AttentionCall, kernels: AttentionKernels, block_size: int, found: dict[AttentionShape, str],
    kv_cache_dtype: str,
) -> str:  # fmt: skip
    """Why the kernels cannot serve a layer, "" where they can; each variant is asked once."""
    shape = _kernel_shape(leaf, call, block_size, kv_cache_dtype)
    if shape not in found:
        found[shape] = kernels.attention_problem(**{one.name: getattr(shape, one.name) for one in fields(shape)}) or ""
    return found[shape]


def _kernel_shape(leaf: CacheLeaf, call: AttentionCall, block_size: int, kv_cache_dtype: str) -> AttentionShape:
    shape, window = leaf.shape, leaf.spec.window if isinstance(leaf.spec, SlidingWindowSpec) else None
    assert shape is not None, "a state has no attention"
    packed = packing(shape.key_dim, kv_cache_dtype)
    return AttentionShape(
        dtype=shape.dtype, heads=call.num_heads, kv_heads=shape.num_kv_heads, key_dim=shape.key_dim,
        value_dim=shape.value_dim, block_size=block_size, window=window, sinks=call.sinks, softcap=call.softcap,
        scale=call.scale, bits=packed.bits if packed else 0, latent=shape.is_latent,
    )  # fmt: skip
