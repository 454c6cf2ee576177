"""A decode step over pages that kernels read: one token of each of several sequences, compiled by shape.

On a GPU the host's work per operation bounds a step, and building mlx-lm's graph anew costs as much
again. Paging makes the shapes static: rows and block tables are padded to a few sizes, and MLX
keeps a compiled graph of each.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.runner.kv.input_batch import InputBatch, Int32, picked
from engine.runner.kv.kernel_cache import DecodeRows, KernelGroupCache, after, on_device, padded_positions
from engine.runner.kv.state_cache import KernelStateGroup, StateRows, slot_rows

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
_MIN_WIDTH = 32
"""Blocks of the narrowest tables: 512 tokens in blocks of 16."""

Memory = list[list[Any]]
"""Of each group and layer: keys and values in pages, or states in slots."""


def padded_rows(num_rows: int) -> int:
    """Rows that ``num_rows`` rows are padded to: at most half as many again."""
    return next((size for size in _ROWS if size >= num_rows), -(-num_rows // 64) * 64)


def padded_width(num_blocks: int) -> int:
    """Width of block tables for sequences of ``num_blocks`` blocks: a power of two; kernels read what is used."""
    return max(_MIN_WIDTH, 1 << (num_blocks - 1).bit_length())


class BlockTables:
    """Block tables of a call's rows, from step to step: only rows that changed are written again."""

    def __init__(self, num_rows: int, width: int) -> None:
        self._tables = np.zeros((num_rows, width), dtype=np.int32)
        self._held: list[tuple[Request, int, int, int] | None] = [None] * num_rows
        self._array: mx.array | None = None

    def update(self, scheduled_requests: Sequence[ScheduledRequest], group: int) -> mx.array:
        """The tables [rows, width] of a step's requests in ``group``; rows beyond them may hold anything."""
        for row, scheduled in enumerate(scheduled_requests):
            table, request = scheduled.block_tables[group], scheduled.request
            # A table only grows, but for blocks behind a window, until its request is preempted.
            held = (request, len(table), table[-1], request.metrics.num_preemptions)
            if self._held[row] != held:
                self._held[row] = held
                self._tables[row, : len(table)] = table
                self._array = None
        if self._array is None:
            self._array = on_device(self._tables)
        return self._array


class SlotRows:
    """Slots of a call's rows, from step to step: they change where a sequence comes, goes or leaves a checkpoint."""

    def __init__(self) -> None:
        self._slots: Int32 = np.zeros((2, 0), dtype=np.int32)
        self._array: mx.array | None = None

    def update(self, scheduled_requests: Sequence[ScheduledRequest], group: int, num_rows: int) -> mx.array:
        """See :func:`engine.runner.kv.state_cache.slot_rows`."""
        slots = slot_rows(scheduled_requests, group, num_rows)
        if self._array is None or not np.array_equal(slots, self._slots):
            self._slots, self._array = slots, on_device(slots)
        return self._array


class DecodeStep:
    """The model's pass over one new token of each of several sequences. All its cache groups are read by kernels."""

    def __init__(
        self, model: nn.Module, caches: Sequence[Any], groups: Sequence[KernelGroupCache | KernelStateGroup], *,
        compiled: bool,
    ) -> None:  # fmt: skip
        self._model = model
        self._caches = list(caches)
        self._groups = list(groups)
        self._compute = mx.compile(self._logits) if compiled else self._logits
        self._tables: dict[tuple[int, int, int], BlockTables] = {}
        self._slots: dict[int, SlotRows] = {}

    @property
    def has_states(self) -> bool:
        """Whether some layers carry a state; then all sequences must have begun."""
        return any(isinstance(group, KernelStateGroup) for group in self._groups)

    def run(self, batch: InputBatch, tokens: mx.array, rows: Int32) -> tuple[mx.array, mx.array]:
        """Logits [requests, V] of ``batch``, whose requests have one token each: ``tokens`` [T] at ``rows``.

        The second is known once all pages and states are written.
        """
        requests = batch.scheduled_requests
        num_rows = padded_rows(len(requests))
        index = np.zeros(num_rows, dtype=np.int32)
        index[: len(requests)] = rows
        positions = on_device(padded_positions(batch.positions, num_rows))
        places = [self._places(requests, group, num_rows) for group in range(len(self._groups))]
        memory: Memory = [
            group.pages if isinstance(group, KernelGroupCache) else group.states for group in self._groups
        ]
        logits, *written = self._compute(picked(tokens, index), positions, places, memory)
        newest = written[0] if written else logits[:1, :1]
        return (logits if num_rows == len(requests) else logits[: len(requests)]), newest

    def forget_tables(self) -> None:
        """Blocks may have moved: write all tables again."""
        self._tables, self._slots = {}, {}

    def _places(self, requests: Sequence[ScheduledRequest], group: int, num_rows: int) -> mx.array:
        """A group's block tables [rows, width], or its slots [2, rows or more]."""
        if isinstance(self._groups[group], KernelStateGroup):
            return self._slots.setdefault(group, SlotRows()).update(requests, group, num_rows)
        return self._block_tables(requests, group, num_rows)

    def _block_tables(self, requests: Sequence[ScheduledRequest], group: int, num_rows: int) -> mx.array:
        width = padded_width(max(len(scheduled.block_tables[group]) for scheduled in requests))
        key = group, num_rows, width
        if key not in self._tables:
            # One per group: a size that is left behind comes back with other requests.
            self._tables = {other: tables for other, tables in self._tables.items() if other[0] != group}
            self._tables[key] = BlockTables(num_rows, width)
        return self._tables[key].update(requests, group)

    def _logits(self, tokens: mx.array, positions: mx.array, places: list[mx.array], memory: Memory) -> list[mx.array]:
        """The graph of a step: token ids [rows], and what :meth:`run` made of the rest.

        Gives logits, and where layers leave states to be written what is known once they are.
        """
        num_rows = tokens.shape[0]
        for group, place, some in zip(self._groups, places, memory, strict=True):
            if isinstance(group, KernelStateGroup):
                group.begin_call(StateRows.of(place, num_rows, tokens), some)
            else:
                group.begin_call(DecodeRows.of(num_rows, positions, place), some)
        try:
            logits: mx.array = self._model(tokens[:, None], cache=self._caches)
            states = [group.written for group in self._groups if isinstance(group, KernelStateGroup)]
        finally:
            for group in self._groups:
                group.finish()
        logits = logits.reshape(num_rows, logits.shape[-1])
        written = [some for some in states if some is not None]
        return [logits, *([reduce(after, written, logits[:1, :1])] if written else [])]
