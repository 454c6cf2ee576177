"""Does attention from a joined product give what it should on this GPU? Asked at load, before layers are fused."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels.joined_attention import HeadConstants, HeadNorms
from engine.runner.kernels.joined_attention_text import ValueHeads
from engine.runner.kernels.page_check import CheckedPages
from engine.runner.kernels.paged_attention import arrival_counters
from engine.runner.kernels.reference import attention
from engine.runner.kernels.self_check import MOST_KV_HEADS, TOLERANCE, AttentionKernels

_LENGTHS = (1, 0, 16, 333, 49, 100)
"""Tokens of the rows, the new one among them; a row of 0 is padding. Of three splits, 100 tokens often fill two."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedShape:
    """Layers that share a kernel: ``dtype`` is that of rows and pages, ``eps`` that of norms of heads, if any;
    ``bits`` of an element in packed pages, 0 in plain ones."""

    dtype: mx.Dtype
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    scale: float
    window: int | None = None
    eps: float | None = None
    bits: int = 0
    value_heads: ValueHeads = "given"


def joined_problem(shape: JoinedShape, kernels: AttentionKernels) -> str | None:
    """Run ``kernels`` on small random rows of ``shape``, beside numpy: one line on the first thing wrong, or None.

    Ragged rows, one of them padding, with one split and, twice on the same counters of arrivals, with several; NaN lies
    in every slot that was never written. All are launched, whatever is wrong with the first. Raises nothing.
    """
    try:
        arrivals = arrival_counters(len(_LENGTHS) * shape.heads)
        problems = [_Check(shape, kernels, arrivals).run(splits) for splits in (1, 3, 3)]
        return next((problem for problem in problems if problem), None)
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, the layers have another path)
        return error_line(error)


class _Check:
    def __init__(self, shape: JoinedShape, kernels: AttentionKernels, arrivals: mx.array | None) -> None:
        self._shape, self._kernels, self._arrivals = shape, kernels, arrivals
        self._rng = np.random.default_rng(9)
        self._kv_heads = min(shape.kv_heads, MOST_KV_HEADS)
        self._heads = shape.heads // shape.kv_heads * self._kv_heads
        self._frequencies = 1e4 ** (-np.arange(0, shape.dim, 2, dtype=np.float32) / shape.dim)
        size = shape.block_size
        counts = [-(-length // size) for length in _LENGTHS]
        order = self._rng.permutation(sum(counts) + 1)
        self._tables = np.full((len(_LENGTHS), max(counts) + 1), order[-1], np.int32)
        for row, count in enumerate(counts):
            self._tables[row, :count], order = order[:count], order[count:]
        slots = (sum(counts) + 1) * size
        self._pages = [CheckedPages(shape.dtype, self._kv_heads, slots, shape.dim, shape.bits) for _ in range(2)]
        self._rows = [[self._random(self._kv_heads, max(n - 1, 0), shape.dim) for n in _LENGTHS] for _ in range(2)]
        for pages, rows in zip(self._pages, self._rows, strict=True):
            for row, length in enumerate(_LENGTHS):
                pages.expect(self._slots(row, length)[:-1], rows[row])

    def _slots(self, row: int, length: int) -> NDArray[np.int64]:
        positions, size = np.arange(length), self._shape.block_size
        slots: NDArray[np.int64] = self._tables[row, positions // size].astype(np.int64) * size + positions % size
        return slots

    def _random(self, *sizes: int) -> Floats:
        """Numbers that the element type holds."""
        return floats(mx.array(self._rng.standard_normal(sizes, dtype=np.float32)).astype(self._shape.dtype))

    def run(self, splits: int) -> str | None:
        """The first thing that is wrong with one launch."""
        shape, rows = self._shape, len(_LENGTHS)
        kinds = 1 if shape.value_heads == "normalized keys" else 2
        joined = self._random(rows, self._heads + kinds * self._kv_heads, shape.dim)
        gains = [1 + 0.2 * self._random(shape.dim) for _ in range(2)]
        gains = [floats(mx.array(gain).astype(shape.dtype)) for gain in gains]
        given, query_gain, key_gain = (
            mx.array(array).astype(shape.dtype) for array in (joined.reshape(rows, -1), *gains)
        )
        for pages in self._pages:
            pages.fill()
        key_pages, value_pages = (pages.arrays for pages in self._pages)
        mx.eval(given, mx.full((rows * self._heads * shape.dim * 3,), np.nan))
        out = self._kernels.joined_attention(
            given, key_pages, value_pages, mx.array(self._tables) + 0,
            mx.array([length - 1 for length in _LENGTHS], mx.int32) + 0, HeadConstants.of(
                mx.array(self._frequencies), None if shape.eps is None else HeadNorms(query_gain, key_gain, shape.eps),
                shape.value_heads,
            ), heads=self._heads, scale=shape.scale, block_size=shape.block_size, window=shape.window,
            splits=splits, arrivals=self._arrivals,
        )  # fmt: skip
        found = floats(out).reshape(rows, self._heads, shape.dim)
        after = mx.where(out.reshape(-1)[:1] == 0, 0, 0)  # pages are read only once the launch has written
        return self._difference(joined, gains, found, after)

    def _difference(self, joined: Floats, gains: list[Floats], found: Floats, after: mx.array) -> str | None:
        shape, limit = self._shape, TOLERANCE[self._shape.dtype]
        for row, length in enumerate(_LENGTHS):
            wanted = np.zeros_like(found[row])
            if length:
                queries, keys, values = self._split(joined[row])
                queries, keys = (
                    self._turned(some, gain, length - 1) for some, gain in zip((queries, keys), gains, strict=True)
                )
                seen = []
                for pages, before, new in zip(self._pages, self._rows, (keys, values), strict=True):
                    new = floats(mx.array(new).astype(shape.dtype))
                    pages.expect(self._slots(row, length)[-1:], new[:, None])
                    seen.append(pages.given_back(np.concatenate([before[row], new[:, None]], axis=1)))
                wanted = attention(queries, *seen, scale=shape.scale, window=shape.window).astype(np.float32)
            error = float(np.linalg.norm(found[row] - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)
            if not error <= (limit if length else 0.0):
                return f"{length} tokens from a joined product: relative error {error:.1e}"
        if problem := self._pages[1].problem(after, tolerance=0.0 if shape.value_heads == "given" else limit):
            return f"value pages: {problem}"
        if problem := self._pages[0].problem(after, tolerance=limit):
            return f"key pages: {problem}"
        return None

    def _split(self, heads: Floats) -> list[Floats]:
        """Query, key and value heads of a row's; values as they are attended to."""
        queries, keys, values = np.split(heads, [self._heads, self._heads + self._kv_heads])
        if self._shape.value_heads == "normalized keys":
            values = keys
        return [queries, keys, values if self._shape.value_heads == "given" else self._normalized(values)]

    def _normalized(self, heads: Floats) -> Floats:
        assert self._shape.eps is not None, "nothing to add to a mean square"
        normalized: Floats = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + self._shape.eps)
        return normalized

    def _turned(self, heads: Floats, gain: Floats, position: int) -> Floats:
        """``heads`` [n, D] normalized, if they are to be, and rotated."""
        if self._shape.eps is not None:
            heads = self._normalized(heads) * gain
        angles = position * self._frequencies.astype(np.float64)
        first, second = np.split(heads, 2, axis=-1)
        cosines, sines = np.cos(angles), np.sin(angles)
        turned = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
        return turned.astype(np.float32)
