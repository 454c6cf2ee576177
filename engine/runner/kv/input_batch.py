"""One step as rows of tokens: which request each row belongs to, and where its KV goes.

All tokens of a step form one rectangle of ``T`` rows with one token each, decodes first. A row has
its own position (RoPE takes an array of offsets), so decodes and prefill chunks share one pass
over the weights and a model never learns what a phase is.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.core.step import ScheduledRequest

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class InputBatch:
    """The scheduled requests of a step in row order, and the row that each begins at.

    What is derived is computed once, for all requests together.
    """

    scheduled_requests: tuple[ScheduledRequest, ...]
    first_rows: tuple[int, ...]
    order: tuple[int, ...]
    """The place of each in the schedule: a later one may build on what an earlier one writes."""
    num_rows: int
    """Tokens in the step (T)."""
    num_single: int
    """Leading requests of one token."""
    _tables: dict[int, Int32] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(cls, schedule: Sequence[ScheduledRequest]) -> "InputBatch":
        """Order ``schedule``: single tokens first, then chunks."""
        counts = [scheduled.num_tokens for scheduled in schedule]
        num_single, every = counts.count(1), range(len(schedule))
        if num_single == len(schedule):
            return cls(tuple(schedule), tuple(every), tuple(every), len(schedule), num_single)
        order = sorted(every, key=lambda i: counts[i] > 1)
        ends = np.cumsum([counts[i] for i in order]).tolist()
        return cls(tuple(schedule[i] for i in order), (0, *ends[:-1]), tuple(order), ends[-1], num_single)

    def part(self, indices: Sequence[int]) -> "InputBatch":
        """Some of the scheduled requests as a batch of their own."""
        return InputBatch.build([self.scheduled_requests[i] for i in indices])

    def rows_of(self, indices: Sequence[int]) -> Int32:
        """The first row of each of some scheduled requests."""
        return np.array([self.first_rows[i] for i in indices], dtype=np.int32)

    @property
    def decodes_only(self) -> bool:
        """Whether every request has one token in the step."""
        return self.num_rows == len(self.scheduled_requests)

    @cached_property
    def token_ids(self) -> Int32:
        """Token ids [T]; 0 where the value is still on the device."""
        tokens = np.zeros(self.num_rows, dtype=np.int32)
        for scheduled, row in zip(self.scheduled_requests, self.first_rows, strict=True):
            if not scheduled.pending:  # else its one token is
                known = scheduled.request.all_token_ids[scheduled.start : scheduled.end]
                tokens[row : row + len(known)] = known
        return tokens

    @cached_property
    def positions(self) -> Int32:
        """Position of each row's token in its sequence [T]."""
        starts = np.array([scheduled.start for scheduled in self.scheduled_requests], dtype=np.int32)
        if self.decodes_only:
            return starts
        before_first_row: Int32 = starts - np.array(self.first_rows, dtype=np.int32)
        positions: Int32 = np.arange(self.num_rows, dtype=np.int32)
        positions += before_first_row[self._request_of_row]
        return positions

    def slots(self, block_size: int, group: int = 0) -> Int32:
        """Slot of each row's KV in the pool [T]: block number x block size + place in the block."""
        block, place = np.divmod(self.positions, np.int32(block_size))
        slots: Int32 = self.tables(group)[self._request_of_row, block] * np.int32(block_size) + place
        return slots

    def tables(self, group: int = 0) -> Int32:
        """The requests' block tables [requests, longest], 0 behind the end of each."""
        found = self._tables.get(group)
        if found is None:
            found = self._tables[group] = _padded([one.block_tables[group] for one in self.scheduled_requests])
        return found

    @cached_property
    def _request_of_row(self) -> Int32:
        """The place in the batch of each row's request [T]."""
        every = np.arange(len(self.scheduled_requests), dtype=np.int32)
        if self.decodes_only:
            return every
        return np.repeat(every, [scheduled.num_tokens for scheduled in self.scheduled_requests])


def _padded(tables: Sequence[Sequence[int]]) -> Int32:
    """``tables`` as rows of equal length, filled up with 0."""
    lengths = np.array([len(table) for table in tables])
    flat = b"".join([table if isinstance(table, array) else array("i", table) for table in tables])
    padded = np.zeros((len(tables), int(lengths.max(initial=0))), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.frombuffer(flat, dtype=np.int32)
    return padded


def picked(tokens: mx.array, rows: Int32) -> mx.array:
    """``tokens[rows]`` for a few token ids [T].

    Of operations that MLX brings compiled: its gather and its scatter of integers are compiled when they are first
    needed, which takes seconds on CUDA.
    """
    if len(rows) == tokens.shape[0] and (rows == np.arange(len(rows))).all():
        return tokens
    return mx.where(mx.array(rows)[:, None] == mx.arange(tokens.shape[0]), tokens, 0).sum(axis=1)


def placed(tokens: mx.array, rows: Int32, length: int) -> mx.array:
    """Zeros [length] with ``tokens`` in ``rows``; see :func:`picked`."""
    return mx.where(mx.arange(length)[:, None] == mx.array(rows), tokens, 0).sum(axis=1)
