"""Where a call's rows are written in a group's pages, and what each row attends to.

The reference path, on every backend MLX has. A sequence whose blocks are consecutive is read as a
view, without a copy; others are gathered block by block, or position by position where MLX would
misread a view. A window only moves the first position that is read.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from engine.runner.device.devices import DeviceKind
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kv_pages import Pages

MAX_VIEWS: dict[DeviceKind, int] = {"cpu": 16, "metal": 1, "cuda": 0}
"""Most decode rows of a call that may attend one by one over views of the pages, by device.

None on CUDA: for one query row and no mask MLX 0.32.4 takes keys that are a slice of a longer array for the beginning
of a cache of mlx-lm's, and reads from another place than theirs (``unslice_kv`` in its attention, which undoes the
slice; also where the slice is of a gathered copy). A row there reads an array of its own length. Several query rows,
or any mask as an array, are read where they lie.
"""
_MIN_VIEW_CONTEXT = 384
"""Several decode rows attend one by one from this mean context on, measured on a CPU: gathered together, the copies
cost more."""
_MIN_SLICE = 4
"""Runs of at least this many slots are written as a slice, shorter ones with a scatter."""


@dataclass(frozen=True)
class SequenceRead:
    """Rows [first, last) of one sequence at positions from ``start``, reading positions [begin, end).

    What is derived is kept, since every layer of a group asks for it.
    """

    first: int
    last: int
    start: int
    begin: int
    end: int
    window: int | None
    blocks: Int32
    block_size: int
    copied: bool
    """Whether what is read must be an array of its own: see :data:`MAX_VIEWS`."""

    @classmethod
    def of(
        cls, batch: InputBatch, index: int, group: int, window: int | None, block_size: int, *, views: bool = True
    ) -> "SequenceRead":
        """What the rows of the batch's request number ``index`` read in ``group``; ``views``: also a single row."""
        scheduled, first = batch.scheduled_requests[index], batch.first_rows[index]
        begin = 0 if window is None else max(0, scheduled.start - window + 1)
        blocks = scheduled.block_tables[group][begin // block_size : -(-scheduled.end // block_size)]
        last = first + scheduled.num_tokens
        numbers = np.array(blocks, dtype=np.int32)
        copied = scheduled.num_tokens == 1 and not views
        return cls(first, last, scheduled.start, begin, scheduled.end, window, numbers, block_size, copied)

    @property
    def num_rows(self) -> int:
        """Rows of this sequence."""
        return self.last - self.first

    @cached_property
    def slots(self) -> Int32:
        """Where the positions [begin, end) lie in the pages."""
        positions = np.arange(self.end - self.begin, dtype=np.int32) + self.begin % self.block_size
        slots: Int32 = self.blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots

    @cached_property
    def first_slot(self) -> int | None:
        """Where the positions lie in the pages, if their blocks are consecutive."""
        if len(self.blocks) > 1 and not (np.diff(self.blocks) == 1).all():
            return None
        return int(self.blocks[0]) * self.block_size + self.begin % self.block_size

    def mask(self, *, as_array: bool = False) -> mx.array | str | None:
        """What rows may see of [begin, end): None (all), "causal", or bool [rows, end - begin]."""
        if self.num_rows == 1:
            return None
        cut = self.window is not None and self.end - self.begin > self.window
        return self.seen if cut or as_array else "causal"

    @cached_property
    def seen(self) -> mx.array:
        """Bool [rows, end - begin]: what each row may see."""
        rows = np.arange(self.start, self.end)[:, None]
        columns = np.arange(self.begin, self.end)[None]
        seen = columns <= rows
        if self.window is not None:
            seen &= columns > rows - self.window
        return mx.array(seen)


@dataclass(frozen=True)
class RowsRead:
    """The first ``num_rows`` rows, one token each, gathered over ``tables`` [rows, blocks].

    ``seen`` [rows, 1, 1, slots] says which gathered positions a row may see.
    """

    num_rows: int
    tables: Int32
    seen: mx.array


class AttentionMetadata:
    """One call's writes and reads in one group; built once, used by all its layers."""

    def __init__(
        self, batch: InputBatch, block_size: int, *, group: int = 0, window: int | None = None, max_views: int
    ) -> None:
        self.block_size = block_size
        self.num_rows = batch.num_rows
        self.num_calls = len(batch.scheduled_requests)
        self._window = window
        self._group = group
        self._max_views = max_views
        self._indices: dict[tuple[int, int, int], mx.array] = {}
        self.positions = mx.array(batch.positions)
        self.start = batch.scheduled_requests[0].start
        self._plan_writes(batch.slots(block_size, group))
        self.parts = self._plan_reads(batch)

    def write(self, pages: Pages, rows: mx.array) -> Pages:
        """``pages`` with ``rows`` ([T, heads, 1, dim] or [1, heads, T, dim]) in their slots."""
        for i, some in enumerate(pages.encode(as_sequence(rows))):
            pages.arrays[i] = self._write(pages.arrays[i], some)
        return pages

    def _write(self, pages: mx.array, rows: mx.array) -> mx.array:
        """``pages`` [1, heads, slots, n] with ``rows`` [1, heads, T, n] in their slots."""
        for first, last, slot in self._slices:
            pages[:, :, slot : slot + last - first] = rows if last - first == self.num_rows else rows[:, :, first:last]
        if self._scattered is not None:
            index, slots = self._scattered
            pages[:, :, slots] = rows if index is None else rows[:, :, index]
        return pages

    def read(self, part: SequenceRead | RowsRead, pages: Pages) -> mx.array:
        """What ``part`` attends to: [1 or rows, heads, positions, dim]; of quantized pages no more is unpacked."""
        return pages.decode([self._read(part, array) for array in pages.arrays])

    def _read(self, part: SequenceRead | RowsRead, pages: mx.array) -> mx.array:
        if isinstance(part, RowsRead):
            return self._gather(pages, -1, part.tables)
        if part.copied:
            return self._gather(pages, part.first, part.slots[None], size=1)
        slot = part.first_slot
        if slot is not None:
            return pages[:, :, slot : slot + part.end - part.begin]
        skipped = part.begin % self.block_size
        return self._gather(pages, part.first, part.blocks[None])[:, :, skipped : skipped + part.end - part.begin]

    def attend(self, queries: mx.array, keys: Pages, values: Pages, scale: float,
               sinks: mx.array | None) -> mx.array:  # fmt: skip
        """Attention of all rows [T, heads, 1, dim] over the pages."""
        outputs, row = [], 0
        for part in self.parts:
            some = queries if part.num_rows == self.num_rows else queries[row : row + part.num_rows]
            outputs.append(self._attend(part, some, keys, values, scale, sinks))
            row += part.num_rows
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=0)

    def _attend(self, part: SequenceRead | RowsRead, queries: mx.array, keys: Pages, values: Pages,
                scale: float, sinks: mx.array | None) -> mx.array:  # fmt: skip
        k, v = (self.read(part, pages).astype(queries.dtype) for pages in (keys, values))
        if isinstance(part, RowsRead):
            return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=part.seen, sinks=sinks)
        mask = part.mask()
        queries = as_sequence(queries)
        return as_rows(mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=mask, sinks=sinks))

    def _gather(self, pages: mx.array, key: int, tables: Int32, *, size: int | None = None) -> mx.array:
        """Blocks ``tables`` [B, n], of ``size`` slots each, of ``pages``: a new array [B, heads, n * size, dim].

        ``size`` None: whole blocks. ``key`` names the tables: layers of one shape share the index.
        """
        _, heads, slots, dim = pages.shape
        size = size or self.block_size
        num_blocks = slots // size
        index = self._indices.get((key, heads, num_blocks))
        if index is None:
            first = np.arange(heads, dtype=np.int32)[None, :, None] * num_blocks
            index = self._indices[key, heads, num_blocks] = mx.array(first + tables[:, None])
        found = pages.reshape(heads * num_blocks, size * dim)[index]
        return found.reshape(tables.shape[0], heads, tables.shape[1] * size, dim)

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

    def _plan_reads(self, batch: InputBatch) -> Sequence[SequenceRead | RowsRead]:
        reads = [
            SequenceRead.of(batch, i, self._group, self._window, self.block_size, views=self._max_views > 0)
            for i in range(len(batch.scheduled_requests))
        ]
        single = reads[: batch.num_single]
        one_by_one = len(single) <= 1 or (
            len(single) <= self._max_views and np.mean([read.end - read.begin for read in single]) >= _MIN_VIEW_CONTEXT
        )
        return reads if one_by_one else [self.rows(single), *reads[batch.num_single :]]

    def rows(self, reads: Sequence[SequenceRead]) -> RowsRead:
        """Single rows of several sequences, to be gathered together."""
        width = max(len(read.blocks) for read in reads)
        tables = np.zeros((len(reads), width), dtype=np.int32)
        seen = np.zeros((len(reads), width * self.block_size), dtype=bool)
        for row, read in enumerate(reads):
            tables[row, : len(read.blocks)] = read.blocks
            tables[row, len(read.blocks) :] = read.blocks[-1]  # its own: NaN of another's would be NaN without weight
            skipped = read.begin % self.block_size
            seen[row, skipped : skipped + read.end - read.begin] = True
        return RowsRead(len(reads), tables, mx.array(seen[:, None, None]))


def as_sequence(rows: mx.array) -> mx.array:
    """[rows, heads, 1, dim] as [1, heads, rows, dim]; what is in that form stays."""
    return rows if rows.shape[0] == 1 else rows.transpose(2, 1, 0, 3)


def as_rows(sequence: mx.array) -> mx.array:
    """[1, heads, rows, dim] as [rows, heads, 1, dim]."""
    return sequence if sequence.shape[2] == 1 else sequence.transpose(2, 1, 0, 3)
