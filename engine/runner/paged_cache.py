"""KV pages and how attention reads them: the reference path, on every backend MLX has.

Per layer the pool is ``[num_kv_heads, slots, head_dim]``, so a sequence whose blocks are
consecutive is a view, without a copy; others are gathered block by block. mlx-lm's models run
unmodified: each layer's cache is a :class:`PagedLayerCache`, and the one function through which
they attend is wrapped (:mod:`engine.runner.attention_seam`), which is also where custom GPU
kernels will enter.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.runner.kv_spec import LayerShape, UnsupportedCacheError
from engine.runner.step_batch import Int32, StepBatch

_MAX_VIEWS = 16
_MIN_VIEW_CONTEXT = 384
"""On a CPU, decode rows of at least this context attend one by one over views rather than gathered
together: measured, the copies cost more from about here on."""
_MIN_SLICE = 4
"""Runs of at least this many slots are written as a slice, shorter ones with a scatter."""


class KVPool:
    """The pages of all layers. Starts small and grows; blocks keep their numbers."""

    def __init__(self, layers: Sequence[LayerShape], block_size: int, dtype: mx.Dtype | None = None) -> None:
        self.layers = tuple(layers)
        self.block_size = block_size
        self.dtype = dtype
        self.num_blocks = 0
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def grow(self, num_blocks: int) -> None:
        """Make room for ``num_blocks`` blocks, layer by layer so that only one is held twice."""
        if num_blocks <= self.num_blocks:
            return
        slots = num_blocks * self.block_size
        fresh = not self.keys
        for i, layer in enumerate(self.layers):
            dtype = self.dtype or layer.dtype
            for arrays, dim in ((self.keys, layer.key_dim), (self.values, layer.value_dim)):
                if fresh:
                    arrays.append(mx.zeros((layer.num_kv_heads, slots, dim), dtype))
                else:
                    more = slots - arrays[i].shape[1]
                    room = mx.zeros((layer.num_kv_heads, more, dim), dtype)
                    arrays[i] = mx.concatenate([arrays[i], room], axis=1)
                mx.eval(arrays[i])
        self.num_blocks = num_blocks

    def release(self) -> None:
        """Give all pages back."""
        self.keys, self.values, self.num_blocks = [], [], 0


@dataclass(frozen=True)
class _Sequence:
    """Rows [first, last) of one sequence, attending over its first ``context`` tokens."""

    first: int
    last: int
    context: int
    start: int | None
    blocks: mx.array | None

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, block_size: int, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """[rows, heads, 1, dim] -> the same, over keys and values [kv_heads, slots, dim]."""
        k, v = (self._read(pages, block_size)[None].astype(queries.dtype) for pages in (keys, values))
        q = queries[:, :, 0].swapaxes(0, 1)[None]
        mask = "causal" if self.last - self.first > 1 else None
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        return out[0].swapaxes(0, 1)[:, :, None]

    def _read(self, pages: mx.array, block_size: int) -> mx.array:
        if self.start is not None:
            return pages[:, self.start : self.start + self.context]
        assert self.blocks is not None
        return _gather(pages, self.blocks, block_size)[:, : self.context]


@dataclass(frozen=True)
class _Rows:
    """The first ``num_rows`` rows, one token each, gathered over ``tables`` [rows, blocks] and masked."""

    num_rows: int
    tables: mx.array
    mask: mx.array

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, block_size: int, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """As :meth:`_Sequence.attend`."""
        k, v = (
            _gather(pages, self.tables, block_size).swapaxes(0, 1).astype(queries.dtype) for pages in (keys, values)
        )
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=self.mask, sinks=sinks)


def _gather(pages: mx.array, tables: mx.array, block_size: int) -> mx.array:
    """Blocks ``tables`` [..., n] of ``pages`` [heads, slots, dim] as [heads, ..., n * block_size, dim]."""
    heads, slots, dim = pages.shape
    blocks = pages.reshape(heads * (slots // block_size), block_size * dim)
    first = mx.arange(heads).reshape(heads, *([1] * tables.ndim)) * (slots // block_size)
    found = blocks[first + tables]
    return found.reshape(heads, *tables.shape[:-1], tables.shape[-1] * block_size, dim)


class StepLayout:
    """Where a step's rows are written and what each attends to; built once, used by every layer."""

    def __init__(self, batch: StepBatch, block_size: int, *, prefer_views: bool) -> None:
        self.block_size = block_size
        self.num_rows = batch.num_rows
        self.positions = mx.array(batch.positions)
        self._plan_writes(batch.slots(block_size))
        self.parts = self._plan_reads(batch, prefer_views)

    def write(self, pages: mx.array, rows: mx.array) -> mx.array:
        """``pages`` [heads, slots, dim] with ``rows`` [T, heads, 1, dim] in their slots; in place where MLX may."""
        rows = rows[:, :, 0].swapaxes(0, 1).astype(pages.dtype)
        for first, last, slot in self._slices:
            pages[:, slot : slot + last - first] = rows[:, first:last]
        if self._scattered is not None:
            index, slots = self._scattered
            pages[:, slots] = rows if index is None else rows[:, index]
        return pages

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """Attention of all rows [T, heads, 1, dim] over the pages."""
        if len(self.parts) == 1:
            return self.parts[0].attend(queries, keys, values, self.block_size, scale, sinks)
        outputs, row = [], 0
        for part in self.parts:
            count = part.num_rows if isinstance(part, _Rows) else part.last - part.first
            some = queries[row : row + count]
            outputs.append(part.attend(some, keys, values, self.block_size, scale, sinks))
            row += count
        return mx.concatenate(outputs, axis=0)

    def _plan_writes(self, slots: Int32) -> None:
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        bounds = [0, *cuts.tolist(), len(slots)]
        runs = list(itertools.pairwise(bounds))
        long = runs if len(runs) == 1 else [run for run in runs if run[1] - run[0] >= _MIN_SLICE]
        self._slices = [(first, last, int(slots[first])) for first, last in long]
        self._scattered: tuple[mx.array | None, mx.array] | None = None
        rest = np.ones(len(slots), dtype=bool)
        for first, last in long:
            rest[first:last] = False
        if rest.any():
            index = None if rest.all() else mx.array(np.flatnonzero(rest).astype(np.int32))
            self._scattered = (index, mx.array(slots[rest]))

    def _plan_reads(self, batch: StepBatch, prefer_views: bool) -> list[_Sequence | _Rows]:
        sequences = [self._sequence(batch, i) for i in range(len(batch.shares))]
        single = sequences[: batch.num_single]
        one_by_one = len(single) <= 1 or (
            prefer_views
            and len(single) <= _MAX_VIEWS
            and np.mean([sequence.context for sequence in single]) >= _MIN_VIEW_CONTEXT
        )
        if one_by_one:
            return list(sequences)
        return [self._rows(batch, single), *sequences[batch.num_single :]]

    def _sequence(self, batch: StepBatch, index: int) -> _Sequence:
        share, first = batch.shares[index], batch.first_rows[index]
        used = -(-share.end // self.block_size)
        table = np.asarray(share.block_tables[0][:used], dtype=np.int32)
        in_a_run = bool((np.diff(table) == 1).all())
        return _Sequence(
            first,
            first + share.num_tokens,
            share.end,
            int(table[0]) * self.block_size if in_a_run else None,
            None if in_a_run else mx.array(table),
        )

    def _rows(self, batch: StepBatch, single: Sequence[_Sequence]) -> _Rows:
        contexts = np.array([sequence.context for sequence in single], dtype=np.int32)
        width = -(-int(contexts.max()) // self.block_size)
        tables = np.zeros((len(single), width), dtype=np.int32)
        for row, share in enumerate(batch.shares[: len(single)]):
            table = share.block_tables[0][:width]
            tables[row, : len(table)] = table
        mask = np.arange(width * self.block_size)[None] < contexts[:, None]
        return _Rows(len(single), mx.array(tables), mx.array(mask[:, None, None]))


class PagedLayerCache:
    """One layer's cache as an mlx-lm model sees it: every row is a sequence with one new token."""

    def __init__(self, pool: KVPool, layer: int) -> None:
        self._pool = pool
        self._layer = layer
        self.layout: StepLayout | None = None

    @property
    def offset(self) -> mx.array:
        """Position of each row's token [T]."""
        return self._step.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the rows' keys and values; attention reads the pages itself."""
        pool, layer = self._pool, self._layer
        pool.keys[layer] = self._step.write(pool.keys[layer], keys)
        pool.values[layer] = self._step.write(pool.values[layer], values)
        return keys, values

    def make_mask(self, *_: object, window_size: int | None = None, **__: object) -> None:
        """Rows mask themselves. A window is another kind of cache."""
        if window_size is not None:
            raise UnsupportedCacheError(f"a window of {window_size} tokens")

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """Attention of ``queries`` [T, heads, 1, dim] over the layer's pages."""
        keys, values = self._pool.keys[self._layer], self._pool.values[self._layer]
        return self._step.attend(queries, keys, values, scale, sinks)

    @property
    def _step(self) -> StepLayout:
        assert self.layout is not None, "no step is being computed"
        return self.layout
