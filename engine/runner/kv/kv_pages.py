"""The rows of one layer's keys, or of its values, as they lie in memory: plain, or quantized."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from engine.params.kv_dtype import QUANTIZED_BITS, group_size


@dataclass(frozen=True, slots=True)
class Packing:
    """Integers of ``bits`` bits, eight or four to each uint32, with a scale and a bias per ``group_size`` elements."""

    bits: int
    group_size: int
    on_cpu: bool

    def pack(self, rows: mx.array) -> list[mx.array]:
        """Rows [..., dim] as integers, scales and biases; these two have the rows' element type."""
        return list(mx.quantize(rows, group_size=self.group_size, bits=self.bits))

    def unpack(self, arrays: Sequence[mx.array]) -> mx.array:
        """Rows [..., dim] again, in the scales' element type."""
        packed, scales, biases = arrays
        if not self.on_cpu:
            return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)
        # The same arithmetic; mx.dequantize takes two to three times as long on CPUs.
        integers = packed.view(mx.uint8)
        if self.bits == 4:  # the two halves of a byte become bytes
            pairs = integers.astype(mx.uint16)
            integers = ((pairs | (pairs << 4)) & 0x0F0F).view(mx.uint8)
        groups = integers.astype(scales.dtype).reshape(*scales.shape, self.group_size)
        return (groups * scales[..., None] + biases[..., None]).reshape(integers.shape)


def packing(dim: int, kv_cache_dtype: str) -> Packing | None:
    """How vectors of ``dim`` elements are quantized; None where they stay plain."""
    bits, size = QUANTIZED_BITS.get(kv_cache_dtype), group_size(dim)
    if bits is None or size is None:
        return None
    return Packing(bits, size, mx.default_device().type == mx.DeviceType.cpu)


class Pages:
    """Slots for rows [heads, dim]. ``arrays`` [1, heads, slots, …]: the rows; or integers, scales and biases."""

    def __init__(self, heads: int, dim: int, dtype: mx.Dtype, kv_cache_dtype: str = "auto") -> None:
        self.packing = packing(dim, kv_cache_dtype)
        self.arrays: list[mx.array] = []
        self._heads = heads
        if self.packing is None:
            plain = kv_cache_dtype not in ("auto", *QUANTIZED_BITS)
            self._kinds = [(dim, getattr(mx, kv_cache_dtype) if plain else dtype)]
        else:
            groups = dim // self.packing.group_size
            self._kinds = [(dim * self.packing.bits // 32, mx.uint32), (groups, dtype), (groups, dtype)]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(array.nbytes for array in self.arrays)

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots, array by array; those that are there keep their rows."""
        held = self.arrays[0].shape[2] if self.arrays else 0
        for i, (width, dtype) in enumerate(self._kinds):
            room = mx.zeros((1, self._heads, slots - held, width), dtype)
            if i == len(self.arrays):
                self.arrays.append(room)
            else:
                self.arrays[i] = mx.concatenate([self.arrays[i], room], axis=2)
            mx.eval(self.arrays[i])

    def keep(self, slots: mx.array) -> None:
        """Have only ``slots``, in their order, array by array; the others' memory is given back."""
        for i, array in enumerate(self.arrays):
            self.arrays[i] = mx.take(array, slots, axis=2)
            mx.eval(self.arrays[i])

    def encode(self, rows: mx.array) -> list[mx.array]:
        """Rows [1, heads, T, dim] as the arrays keep them."""
        return [rows.astype(self._kinds[0][1])] if self.packing is None else self.packing.pack(rows)

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        """Rows [B, heads, T, dim] from what was read of each array."""
        return arrays[0] if self.packing is None else self.packing.unpack(arrays)

    def snapshot(self) -> list[mx.array]:
        """The arrays as they are. Copies of the handles: writing changes an array object in place."""
        return [copy(array) for array in self.arrays]


def rounded(caches: list[Any], kv_cache_dtype: str) -> list[Any]:
    """mlx-lm's ``caches`` (as ``make_prompt_cache`` gives them), which now keep what pages would give back."""
    for cache in caches if kv_cache_dtype != "auto" else []:
        if isinstance(cache, CacheList):
            rounded(list(cache.caches), kv_cache_dtype)
        elif hasattr(cache, "update_and_fetch"):
            cache.update_and_fetch = _rounding(cache.update_and_fetch, kv_cache_dtype)
    return caches


def _rounding(keep: Callable[..., Any], kv_cache_dtype: str) -> Callable[[mx.array, mx.array], Any]:
    def there_and_back(rows: mx.array) -> mx.array:
        pages = Pages(rows.shape[1], rows.shape[-1], rows.dtype, kv_cache_dtype)
        return pages.decode(pages.encode(rows)).astype(rows.dtype)

    return lambda keys, values: keep(there_and_back(keys), there_and_back(values))
