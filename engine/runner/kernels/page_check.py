"""Pages for the checks of kernels: small ones, and what they should hold after each launch."""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.params.kv_dtype import group_size
from engine.runner.device.host import floats, to_numpy
from engine.runner.kernels.page_format import PackedPages, PageArrays

Floats = NDArray[np.float32]
_FEW = 1e-3
"""Share of integers that may be off by one: where a rounding differs from MLX's own kernel's."""


class CheckedPages:
    """Rows of ``dim`` elements in ``slots`` slots of each kv head, plain or packed into ``bits`` bits.

    What was never written is NaN; of packed rows their scales and biases are.
    """

    def __init__(self, dtype: mx.Dtype, kv_heads: int, slots: int, dim: int, bits: int = 0) -> None:
        self._dtype, self._bits = dtype, bits
        self._size = group_size(dim) or dim
        shape = (1, kv_heads, slots)
        nan = np.full((*shape, dim // self._size if bits else dim), np.nan, np.float32)
        self._expected: list[Floats] = [np.zeros((*shape, dim), np.float32), nan, nan.copy()] if bits else [nan]
        self.arrays: PageArrays = mx.zeros((0,))

    def fill(self) -> None:
        """Make the arrays, with what is expected in them."""
        if self._bits:
            integers, scales, biases = self._expected
            made = [mx.array(scales).astype(self._dtype), mx.array(biases).astype(self._dtype)]
            self.arrays = PackedPages(mx.array(_words(integers, self._bits)), *made)
        else:
            self.arrays = mx.array(self._expected[0]).astype(self._dtype)
        mx.eval(self.arrays)

    def expect(self, slots: NDArray[Any], rows: Floats) -> None:
        """``rows`` [kv_heads, n, dim], of the element type's numbers, are in ``slots``."""
        if rows.size:
            for pages, part in zip(self._expected, self._stored(rows), strict=True):
                pages[0][:, slots] = part

    def given_back(self, rows: Floats) -> Floats:
        """``rows`` as pages give them back."""
        if not self._bits or not rows.size:
            return rows
        integers, scales, biases = self._stored(rows)
        groups = integers.reshape(*scales.shape, self._size) * scales[..., None] + biases[..., None]
        return groups.reshape(rows.shape)

    def collected_right(self, rows: mx.array, wanted: Floats) -> bool:
        """Whether ``rows`` are what pages give back of ``wanted`` [kv_heads, n, dim]."""
        got, known = floats(rows)[0], self.given_back(wanted)
        if not self._bits:
            return np.array_equal(got, known)
        right = np.isclose(got, known, rtol=1e-2, atol=1e-2 * float(np.abs(known).max(initial=0.0)))
        return bool(np.isfinite(got).all() and (~right).sum() <= _few(right))

    def problem(self, after: mx.array, tolerance: float = 0.0) -> str | None:
        """Whether a slot holds what it should not. ``after`` int32 [1] is zero, once the last launch has written."""
        if not self._bits:
            assert isinstance(self.arrays, mx.array)
            got = [floats(self.arrays + after.astype(self._dtype))]
        else:
            assert isinstance(self.arrays, PackedPages)
            words, scales, biases = self.arrays
            got = [_integers(to_numpy(words + after.astype(mx.uint32)), self._bits)]
            got += [floats(some + after.astype(self._dtype)) for some in (scales, biases)]
        for found, expected in zip(got, self._expected, strict=True):
            exact = not tolerance and found.shape[-1] == expected.shape[-1] and not self._bits
            if exact and not np.array_equal(found, expected, equal_nan=True):
                return "another slot was written, or one was not"
            close = np.isclose(found, expected, rtol=tolerance or 1e-2, atol=tolerance or 1e-6, equal_nan=True)
            if self._bits and found is got[0]:
                close = np.abs(found - expected) <= (1 if tolerance else 0)
                if (np.abs(found - expected) <= 1).all() and (~close).sum() <= _few(close):
                    continue
            if not close.all():
                return "a row is wrong, another slot was written, or one was not"
        return None

    def _stored(self, rows: Floats) -> list[Floats]:
        """What the arrays keep of ``rows`` [kv_heads, n, dim]."""
        if not self._bits:
            return [rows]
        given = mx.array(np.ascontiguousarray(rows)).astype(self._dtype)
        words, scales, biases = mx.quantize(given, group_size=self._size, bits=self._bits)
        return [_integers(to_numpy(words), self._bits), floats(scales), floats(biases)]


def _few(right: NDArray[Any]) -> int:
    return max(1, int(right.size * _FEW))


def _integers(words: NDArray[np.uint32], bits: int) -> Floats:
    """[..., n] as [..., n * 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return integers.reshape(*words.shape[:-1], -1).astype(np.float32)


def _words(integers: Floats, bits: int) -> NDArray[np.uint32]:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    each = integers.astype(np.uint32).reshape(*integers.shape[:-1], -1, len(shifts)) << shifts
    words: NDArray[np.uint32] = np.bitwise_or.reduce(each, axis=-1)
    return words
