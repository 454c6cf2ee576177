"""One layer's fused block on random rows, beside mlx-lm's own.

mlx-lm's block in float32 says what is right, and the same block in the model's element type how far off one may be.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.runner.kernels.joined_check import JoinedShape, joined_problem
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.page_format import PackedPages, PageArrays
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.fused_block import FusedBlock, Rows, head_dim
from engine.runner.kv.kernel_cache import DecodeRows, KernelLayerCache, on_device, padded_positions
from engine.runner.kv.kv_pages import Packing, packing
from engine.runner.kv.kv_pool import KVPool
from engine.runner.kv.kv_spec import LayerShape

_ROWS = (3, 12, 20, 30, 40)
"""Numbers of rows that a block is tried with: each has kernels of its own."""
_CONTEXT = 37
"""Tokens before the new one."""
_LOSS, _PACKED_LOSS = 1.5, 3.5
"""Times the error of mlx-lm's own block: more is not rounding. Of packed weights that is the block over unpacked ones,
beside which MLX's product of packed ones is off two to three times as far."""
_FLOOR = {mx.bfloat16: 4e-3, mx.float16: 1e-3, mx.float32: 1e-3}
"""Error of a block, of its norm, that is never too much. Of float32: a GPU may multiply in TF32."""


@dataclass(slots=True)
class _Context:
    """A cache of one call of mlx-lm's own block: keys and values [rows, kv_heads, tokens, dim] before the new ones."""

    keys: mx.array
    values: mx.array
    packing: Packing | None = None
    """How pages keep rows: what comes back of these is what they give back."""

    @property
    def offset(self) -> int:
        """Position of the new token."""
        return int(self.keys.shape[2])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append; gives all."""
        self.keys = self._kept(mx.concatenate([self.keys, keys], axis=2))
        self.values = self._kept(mx.concatenate([self.values, values], axis=2))
        return self.keys, self.values

    def _kept(self, rows: mx.array) -> mx.array:
        return rows if self.packing is None else self.packing.unpack(self.packing.pack(rows))

    def astype(self, dtype: mx.Dtype) -> "_Context":
        """The same in another element type."""
        return _Context(self.keys.astype(dtype), self.values.astype(dtype), self.packing)


class BlockTrial:
    """One layer's block on random rows, fused and not."""

    def __init__(self, layer: Any, kernels: AttentionKernels, block_size: int, kv_cache_dtype: str = "auto") -> None:
        self._layer, self._kernels, self._block_size = layer, kernels, block_size
        attention = layer.self_attn
        self._dtype: mx.Dtype = layer.input_layernorm.weight.dtype
        self._hidden = int(layer.input_layernorm.weight.shape[0])
        self._loss = _LOSS
        self._kv_heads, self._dim = int(attention.n_kv_heads), head_dim(attention)
        self._kv_cache_dtype, self._packing = kv_cache_dtype, packing(self._dim, kv_cache_dtype)
        self.shape = JoinedShape(
            dtype=self._dtype, heads=int(attention.n_heads), kv_heads=self._kv_heads, dim=self._dim,
            block_size=block_size, scale=float(attention.scale),
            eps=float(attention.q_norm.eps) if "q_norm" in attention else None,
            bits=self._packing.bits if self._packing else 0,
        )  # fmt: skip

    def problem(self, block: FusedBlock) -> str | None:
        """What is wrong with its attention, or with ``block`` at the first number of rows where something is."""
        with collecting() as awaited:
            joined_problem(self.shape, self._kernels)
            for rows in _ROWS:
                self.fused(block, *self.inputs(rows))
        compile_all(awaited)
        if problem := joined_problem(self.shape, self._kernels):
            return problem
        exact, usual = in_dtype(self._layer, mx.float32), self._layer
        if any("scales" in module for _, module in usual.named_modules()):
            self._loss = _PACKED_LOSS
            usual = in_dtype(usual, self._dtype)  # MLX's product of packed weights compiles for long on CUDA
        for rows in _ROWS:
            if problem := self._difference(block, exact, usual, rows):
                return f"{problem} at {rows} rows"
        return None

    def _difference(self, block: FusedBlock, exact: nn.Module, usual_layer: nn.Module, rows: int) -> str | None:
        x, context = self.inputs(rows)
        wide = x.astype(mx.float32)
        with uncompiled():  # a kernel for float32 that nothing else needs would take seconds on CUDA
            wanted, exact_context = self.own(exact, wide, context.astype(mx.float32))
        own, own_context = self.own(usual_layer, x, context)
        rows_found, pages = self.fused(block, x, context)
        found = rows_found.plain.reshape(x.shape)
        results = {"its result": (found.astype(mx.float32) - wide, own.astype(mx.float32) - wide, wanted - wide)}
        if rows_found.normed is not None:
            usual_norm, exact_norm = (some.input_layernorm for some in (usual_layer, exact))
            results["its normalized result"] = rows_found.normed.reshape(x.shape), usual_norm(own), exact_norm(wanted)
        for name, page in zip(("keys", "values"), pages, strict=True):
            rows_of = (getattr(some, name)[:, :, -1] for some in (own_context, exact_context))
            results[f"what it writes as {name}"] = page, *rows_of
        for name, (some, usual, right) in results.items():
            allowed = max(self._loss * distance(usual, right), _FLOOR[self._dtype])
            error = distance(some, right)
            if not error <= allowed:
                return f"{name} differs by {error:.1e} from float32's, where {allowed:.1e} is rounding"
        return None

    def inputs(self, rows: int) -> tuple[mx.array, _Context]:
        """Rows [rows, 1, hidden], and what lies in the cache before them."""
        keys = mx.random.split(mx.random.key(rows), 3)
        shape = (rows, self._kv_heads, _CONTEXT, self._dim)
        x, before, values = (
            mx.random.normal(size, key=key).astype(self._dtype)
            for size, key in zip(((rows, 1, self._hidden), shape, shape), keys, strict=True)
        )
        return x, _Context(before, values, self._packing)

    def own(self, layer: nn.Module, x: mx.array, context: _Context) -> tuple[mx.array, _Context]:
        """mlx-lm's block; gives the cache with the new rows too."""
        cache = replace(context)
        return layer(x, None, cache), cache

    def fused(self, block: FusedBlock, x: mx.array, context: _Context) -> tuple[Rows, tuple[mx.array, mx.array]]:
        """The fused block over pages; gives the new keys and values [rows, kv_heads, dim] from their slots too.

        The rows come normalized as if a layer with the same norm were behind it.
        """
        rows, size = x.shape[0], self._block_size
        width = -(-(_CONTEXT + 1) // size)
        blocks = mx.arange(rows * width, dtype=mx.int32).reshape(rows, width)
        padding = width * size - _CONTEXT
        pages = self._pages(context.keys, padding), self._pages(context.values, padding)
        mx.eval(pages)
        shape = LayerShape(self._kv_heads, self._dim, self._dim, self._dtype)
        cache = KernelLayerCache(KVPool([shape], size, self._kv_cache_dtype), 0, None, self._kernels)
        positions = on_device(padded_positions(np.full(rows, _CONTEXT, dtype=np.int32), rows))
        cache.begin(DecodeRows.of(rows, positions, blocks), pages)
        found = block(Rows(x.reshape(rows, -1)), cache, block.input_norm)
        cache.finish()
        mx.eval(found.plain, found.normed if found.normed is not None else found.plain)
        mx.synchronize()  # what the block wrote is read now
        keys, values = (
            self._rows_of(some).reshape(self._kv_heads, rows, width * size, self._dim)[:, :, _CONTEXT].swapaxes(0, 1)
            for some in pages
        )
        return found, (keys, values)

    def _pages(self, rows: mx.array, padding: int) -> PageArrays:
        """``rows`` [rows, kv_heads, tokens, dim] one behind the other, each with room behind it."""
        padded = mx.pad(rows, [(0, 0), (0, 0), (0, padding), (0, 0)]).transpose(1, 0, 2, 3)
        plain = mx.contiguous(padded.reshape(1, self._kv_heads, -1, self._dim))
        return plain if self._packing is None else PackedPages(*self._packing.pack(plain))

    def _rows_of(self, pages: PageArrays) -> mx.array:
        if isinstance(pages, mx.array):
            return pages
        assert self._packing is not None
        return self._packing.unpack(pages)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that are compiled by ``mx.compile`` run operation by operation inside."""
    mx.disable_compile()
    try:
        yield
    finally:
        if not os.environ.get("MLX_DISABLE_COMPILE"):
            mx.enable_compile()


def in_dtype(layer: Any, dtype: mx.Dtype) -> Any:
    """A copy of mlx-lm's block with the same weights, unpacked, in another element type."""
    copy = type(layer)(layer.args)
    weights: dict[str, mx.array] = {}
    for name, module in layer.named_modules():
        if "weight" not in module:
            continue
        known = {key: value.astype(dtype) for key, value in module.items() if key in ("weight", "bias")}
        if "scales" in module:
            scales, biases = (module[key].astype(mx.float32) for key in ("scales", "biases"))
            weight = mx.dequantize(module["weight"], scales, biases, group_size=module.group_size, bits=module.bits)
            known["weight"] = weight.astype(dtype)
        weights |= {f"{name}.{key}": value for key, value in known.items()}
    copy.load_weights(list(weights.items()))
    return copy


def distance(found: mx.array, wanted: mx.array) -> float:
    """Of the norm of ``wanted``; NaN if there is any."""
    found, wanted = (some.astype(mx.float32) for some in (found, wanted))
    ratio = mx.linalg.norm(found - wanted) / mx.maximum(mx.linalg.norm(wanted), 1e-30)
    return float(np.array(ratio))
