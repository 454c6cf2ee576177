"""KV pages and how attention reads them: the reference path, on every backend MLX has.

Per layer the pool is ``[1, num_kv_heads, slots, head_dim]``, so a sequence whose blocks are
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
                    arrays.append(mx.zeros((1, layer.num_kv_heads, slots, dim), dtype))
                else:
                    more = slots - arrays[i].shape[2]
                    room = mx.zeros((1, layer.num_kv_heads, more, dim), dtype)
                    arrays[i] = mx.concatenate([arrays[i], room], axis=2)
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
    blocks: Int32

    @property
    def num_rows(self) -> int:
        return self.last - self.first

    def attend(self, step: "StepLayout", queries: mx.array, keys: mx.array, values: mx.array, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """[rows, heads, 1, dim] -> the same, over keys and values [1, kv_heads, slots, dim]."""
        k, v = (self._read(step, pages).astype(queries.dtype) for pages in (keys, values))
        mask = "causal" if self.num_rows > 1 else None
        out = mx.fast.scaled_dot_product_attention(_turned(queries), k, v, scale=scale, mask=mask, sinks=sinks)
        return _turned(out)

    def _read(self, step: "StepLayout", pages: mx.array) -> mx.array:
        if self.start is not None:
            return pages[:, :, self.start : self.start + self.context]
        return step.gather(pages, self.first, self.blocks[None])[:, :, : self.context]


@dataclass(frozen=True)
class _Rows:
    """The first ``num_rows`` rows, one token each, gathered over ``tables`` [rows, blocks] and masked."""

    num_rows: int
    tables: Int32
    mask: mx.array

    def attend(self, step: "StepLayout", queries: mx.array, keys: mx.array, values: mx.array, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """As :meth:`_Sequence.attend`."""
        k, v = (step.gather(pages, -1, self.tables).astype(queries.dtype) for pages in (keys, values))
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=self.mask, sinks=sinks)


def _turned(rows: mx.array) -> mx.array:
    """[rows, heads, 1, dim] <-> [1, heads, rows, dim]; a single row is both."""
    return rows if rows.shape[0] == rows.shape[2] == 1 else rows.transpose(2, 1, 0, 3)


class StepLayout:
    """Where a step's rows are written and what each attends to; built once, used by every layer."""

    def __init__(self, batch: StepBatch, block_size: int, *, prefer_views: bool) -> None:
        self.block_size = block_size
        self.num_rows = batch.num_rows
        self._indices: dict[tuple[int, int, int], mx.array] = {}
        self.positions = mx.array(batch.positions)
        self._plan_writes(batch.slots(block_size))
        self.parts = self._plan_reads(batch, prefer_views)

    def write(self, pages: mx.array, rows: mx.array) -> mx.array:
        """``pages`` [1, heads, slots, dim] with ``rows`` [T, heads, 1, dim] in their slots; in place where MLX may."""
        rows = _turned(rows).astype(pages.dtype)
        for first, last, slot in self._slices:
            pages[:, :, slot : slot + last - first] = rows if last - first == self.num_rows else rows[:, :, first:last]
        if self._scattered is not None:
            index, slots = self._scattered
            pages[:, :, slots] = rows if index is None else rows[:, :, index]
        return pages

    def gather(self, pages: mx.array, key: int, tables: Int32) -> mx.array:
        """Blocks ``tables`` [B, n] of ``pages`` [1, heads, slots, dim] as [B, heads, n * block_size, dim].

        Whole blocks are copied as one piece. ``key`` names the tables: layers of one shape share the index.
        """
        _, heads, slots, dim = pages.shape
        num_blocks = slots // self.block_size
        index = self._indices.get((key, heads, num_blocks))
        if index is None:
            first = np.arange(heads, dtype=np.int32)[None, :, None] * num_blocks
            index = self._indices[key, heads, num_blocks] = mx.array(first + tables[:, None])
        found = pages.reshape(heads * num_blocks, self.block_size * dim)[index]
        return found.reshape(tables.shape[0], heads, tables.shape[1] * self.block_size, dim)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """Attention of all rows [T, heads, 1, dim] over the pages."""
        if len(self.parts) == 1:
            return self.parts[0].attend(self, queries, keys, values, scale, sinks)
        outputs, row = [], 0
        for part in self.parts:
            outputs.append(part.attend(self, queries[row : row + part.num_rows], keys, values, scale, sinks))
            row += part.num_rows
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
            table,
        )

    def _rows(self, batch: StepBatch, single: Sequence[_Sequence]) -> _Rows:
        contexts = np.array([sequence.context for sequence in single], dtype=np.int32)
        width = -(-int(contexts.max()) // self.block_size)
        tables = np.zeros((len(single), width), dtype=np.int32)
        for row, share in enumerate(batch.shares[: len(single)]):
            table = share.block_tables[0][:width]
            tables[row, : len(table)] = table
        mask = np.arange(width * self.block_size)[None] < contexts[:, None]
        return _Rows(len(single), tables, mx.array(mask[:, None, None]))


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
