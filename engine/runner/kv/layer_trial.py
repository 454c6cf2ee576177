"""What a layer computes in few launches on random rows, beside mlx-lm's own.

mlx-lm's code in float32 says what is right, and the same code in the model's element type how far off one may be.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.runner.device.host import to_numpy
from engine.runner.kernels.joined_check import JoinedShape, joined_problem
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.page_format import PackedPages, PageArrays
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.kernel_cache import DecodeRows, KernelLayerCache, on_device, padded_positions
from engine.runner.kv.kv_pages import Packing, packing
from engine.runner.kv.kv_pool import KVPool
from engine.runner.kv.kv_spec import LayerShape

_ROWS = (3, 12, 20, 30, 40)
CONTEXT = 37
"""Tokens before the new one."""
LOSS, PACKED_LOSS = 1.5, 3.5
"""Times the error of mlx-lm's own code: more is not rounding. Of packed weights that is the code over unpacked ones,
beside which MLX's product of packed ones is off two to three times as far."""
_FLOOR = {mx.bfloat16: 4e-3, mx.float16: 1e-3, mx.float32: 1e-3}
"""Error of a layer, of its norm, that is never too much. Of float32: a GPU may multiply in TF32."""


Way = TypeVar("Way")
Found = TypeVar("Found")


@dataclass(slots=True)
class Context:
    """A cache of one call of mlx-lm's own code: keys and values [rows, kv_heads, tokens, dim] before the new ones."""

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

    def astype(self, dtype: mx.Dtype) -> "Context":
        """The same in another element type."""
        return Context(self.keys.astype(dtype), self.values.astype(dtype), self.packing)


class Own(NamedTuple):
    """What mlx-lm's code gives: the module that ran, what it was given, and its result."""

    layer: Any
    x: mx.array
    result: mx.array


class LayerTrial(ABC, Generic[Way, Found]):
    """One layer on random rows, by a ``Way`` in few launches, which gives what is ``Found``, and by mlx-lm's code.

    ``shape`` is that of its attention, but for the bits of packed pages; rows have ``hidden`` elements. ``loss``: times
    the error of mlx-lm's own code that are rounding, where weights are not packed.
    """

    def __init__(
        self, layer: Any, shape: JoinedShape, hidden: int, kernels: AttentionKernels, kv_cache_dtype: str = "auto", *,
        loss: float = LOSS,
    ) -> None:  # fmt: skip
        self._layer, self._kernels, self._hidden, self._loss = layer, kernels, hidden, loss
        self._kv_cache_dtype, self._packing = kv_cache_dtype, packing(shape.dim, kv_cache_dtype)
        self.shape = replace(shape, bits=self._packing.bits if self._packing else 0)

    @abstractmethod
    def copied(self, layer: Any, dtype: mx.Dtype) -> Any:
        """A copy of ``layer`` with the same weights, unpacked, in another element type."""

    @abstractmethod
    def result(self, layer: Any, x: mx.array, cache: Context) -> mx.array:
        """What mlx-lm's code gives for ``x`` [rows, 1, hidden]."""

    @abstractmethod
    def fused(self, way: Way, x: mx.array, context: Context) -> tuple[Found, tuple[mx.array, mx.array]]:
        """The same by ``way`` over pages; gives the new keys and values [rows, kv_heads, dim] from their slots too."""

    @abstractmethod
    def compared(self, found: Found, usual: Own, exact: Own) -> Mapping[str, tuple[mx.array, mx.array, mx.array]]:
        """By name: of what was found, what mlx-lm's code gives in the model's element type, and in float32."""

    def problem(self, way: Way) -> str | None:
        """What is wrong with its attention, or with ``way`` at the first number of rows where something is."""
        packed = any("scales" in module for _, module in self._layer.named_modules())
        numbers = rows_to_try(packed)
        with collecting() as awaited:
            joined_problem(self.shape, self._kernels)
            for rows in numbers:
                self.fused(way, *self.inputs(rows))
        compile_all(awaited)
        if problem := joined_problem(self.shape, self._kernels):
            return problem
        exact, usual = self.copied(self._layer, mx.float32), self._layer
        if packed:
            self._loss = PACKED_LOSS
            usual = self.copied(usual, self.shape.dtype)  # MLX's product of packed weights compiles for long on CUDA
        for rows in numbers:
            if problem := self._difference(way, exact, usual, rows):
                return f"{problem} at {rows} rows"
        return None

    def _difference(self, way: Way, exact: Any, usual: Any, rows: int) -> str | None:
        x, context = self.inputs(rows)
        wide = x.astype(mx.float32)
        with uncompiled():  # a kernel for float32 that nothing else needs would take seconds on CUDA
            wanted, exact_context = self.own(exact, wide, context.astype(mx.float32))
        own, own_context = self.own(usual, x, context)
        found, pages = self.fused(way, x, context)
        results = dict(self.compared(found, Own(usual, x, own), Own(exact, wide, wanted)))
        for name, page in zip(("keys", "values"), pages, strict=True):
            rows_of = (getattr(some, name)[:, :, -1] for some in (own_context, exact_context))
            results[f"what it writes as {name}"] = page, *rows_of
        for name, (some, near, right) in results.items():
            if problem := difference(name, some, near, right, self.shape.dtype, self._loss):
                return problem
        return None

    def inputs(self, rows: int) -> tuple[mx.array, Context]:
        """Rows [rows, 1, hidden], and what lies in the cache before them."""
        keys = mx.random.split(mx.random.key(rows), 3)
        shape = (rows, self.shape.kv_heads, CONTEXT, self.shape.dim)
        x, before, values = (
            mx.random.normal(size, key=key).astype(self.shape.dtype)
            for size, key in zip(((rows, 1, self._hidden), shape, shape), keys, strict=True)
        )
        return x, Context(before, values, self._packing)

    def own(self, layer: Any, x: mx.array, context: Context) -> tuple[mx.array, Context]:
        """mlx-lm's code; gives the cache with the new rows too."""
        cache = replace(context)
        return self.result(layer, x, cache), cache

    def begun(self, context: Context) -> tuple[KernelLayerCache, tuple[PageArrays, PageArrays]]:
        """A cache over pages that hold ``context``, for one call of single rows, and those pages."""
        rows, width = context.keys.shape[0], self._width
        blocks = mx.arange(rows * width, dtype=mx.int32).reshape(rows, width)
        pages = self._pages(context.keys), self._pages(context.values)
        mx.eval(pages)
        shape = LayerShape(self.shape.kv_heads, self.shape.dim, self.shape.dim, self.shape.dtype)
        pool = KVPool([shape], self.shape.block_size, self._kv_cache_dtype)
        cache = KernelLayerCache(pool, 0, self.shape.window, self._kernels)
        positions = on_device(padded_positions(np.full(rows, CONTEXT, dtype=np.int32), rows))
        cache.begin(DecodeRows.of(rows, positions, blocks), pages)
        return cache, pages

    def written(self, pages: tuple[PageArrays, PageArrays], *found: mx.array) -> tuple[mx.array, mx.array]:
        """The new keys and values [rows, kv_heads, dim] in ``pages``, once the results ``found`` are there."""
        mx.eval(found)
        mx.synchronize()  # what the launches wrote is read now
        shape = self.shape.kv_heads, -1, self._width * self.shape.block_size, self.shape.dim
        keys, values = (self._rows_of(some).reshape(shape)[:, :, CONTEXT].swapaxes(0, 1) for some in pages)
        return keys, values

    @property
    def _width(self) -> int:
        """Blocks of a sequence."""
        return -(-(CONTEXT + 1) // self.shape.block_size)

    def _pages(self, rows: mx.array) -> PageArrays:
        """``rows`` [rows, kv_heads, tokens, dim] one behind the other, each with room behind it."""
        padding = self._width * self.shape.block_size - CONTEXT
        padded = mx.pad(rows, [(0, 0), (0, 0), (0, padding), (0, 0)]).transpose(1, 0, 2, 3)
        plain = mx.contiguous(padded.reshape(1, self.shape.kv_heads, -1, self.shape.dim))
        return plain if self._packing is None else PackedPages(*self._packing.pack(plain))

    def _rows_of(self, pages: PageArrays) -> mx.array:
        if isinstance(pages, mx.array):
            return pages
        assert self._packing is not None
        return self._packing.unpack(pages)


def rows_to_try(packed: bool) -> tuple[int, ...]:
    """Numbers of rows that a layer is tried with: each has kernels of its own, and of packed weights one row has."""
    return (1, *_ROWS) if packed else _ROWS


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that are compiled by ``mx.compile`` run operation by operation inside."""
    mx.disable_compile()
    try:
        yield
    finally:
        if not os.environ.get("MLX_DISABLE_COMPILE"):
            mx.enable_compile()


@contextmanager
def passing_on(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` gives what it is given."""
    stand_in = SwappedModules()
    stand_in.swap_method(module, "__call__", lambda _self, x: x)
    try:
        yield
    finally:
        stand_in.undo()


def with_weights_of(layer: Any, copy: Any, dtype: mx.Dtype, *, but: str | None = None) -> Any:
    """``copy``, which is made like ``layer``, with the same weights, unpacked, in another element type.

    ``but``: the name of a module that computes nothing in the copy, whatever it is in the layer.
    """
    weights: dict[str, mx.array] = {}
    if but is not None:
        copy[but] = nn.Identity()
    for name, module in layer.named_modules():
        if "weight" not in module or (but is not None and name.split(".")[0] == but):
            continue
        known = {key: value.astype(dtype) for key, value in module.items() if key in ("weight", "bias")}
        if "scales" in module:
            scales, biases = (module[key].astype(mx.float32) for key in ("scales", "biases"))
            weight = mx.dequantize(module["weight"], scales, biases, group_size=module.group_size, bits=module.bits)
            known["weight"] = weight.astype(dtype)
        weights |= {f"{name}.{key}": value for key, value in known.items()}
    copy.load_weights(list(weights.items()))
    return copy


def difference(
    name: str, found: mx.array, near: mx.array, right: mx.array, dtype: mx.Dtype, loss: float
) -> str | None:  # fmt: skip
    """How what was ``found`` differs from what is ``right``, None if not by more than ``loss`` times what is ``near``.

    Those two are of mlx-lm's code, in float32 and in the model's element type ``dtype``.
    """
    allowed = max(loss * distance(near, right), _FLOOR[dtype])
    error = distance(found, right)
    if error <= allowed:
        return None
    return f"{name} differs by {error:.1e} from float32's, where {allowed:.1e} is rounding"


def distance(found: mx.array, wanted: mx.array) -> float:
    """Of the norm of ``wanted``; NaN if there is any."""
    found, wanted = (some.astype(mx.float32) for some in (found, wanted))
    ratio = mx.linalg.norm(found - wanted) / mx.maximum(mx.linalg.norm(wanted), 1e-30)
    return float(to_numpy(ratio))
