"""One step as rows of tokens: which request each row belongs to, and where its KV goes.

All tokens of a step form one rectangle of ``T`` rows with one token each, decodes first. A row has
its own position (RoPE takes an array of offsets), so decodes and prefill chunks share one pass
over the weights and a model never learns what a phase is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.core.step import ScheduledRequest

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class InputBatch:
    """The scheduled requests of a step in row order, and the row that each begins at."""

    scheduled_requests: tuple[ScheduledRequest, ...]
    first_rows: tuple[int, ...]
    order: tuple[int, ...]
    """The place of each in the schedule: a later one may build on what an earlier one writes."""

    @classmethod
    def build(cls, schedule: Sequence[ScheduledRequest]) -> "InputBatch":
        """Order ``schedule``: single tokens first, then chunks."""
        order = sorted(range(len(schedule)), key=lambda i: schedule[i].num_tokens > 1)
        scheduled_requests = [schedule[i] for i in order]
        starts = np.cumsum([0, *(scheduled.num_tokens for scheduled in scheduled_requests)])
        return cls(tuple(scheduled_requests), tuple(int(start) for start in starts[:-1]), tuple(order))

    def part(self, indices: Sequence[int]) -> "InputBatch":
        """Some of the scheduled requests as a batch of their own."""
        return InputBatch.build([self.scheduled_requests[i] for i in indices])

    def rows_of(self, indices: Sequence[int]) -> Int32:
        """The first row of each of some scheduled requests."""
        return np.array([self.first_rows[i] for i in indices], dtype=np.int32)

    @property
    def num_rows(self) -> int:
        """Tokens in the step (T)."""
        return sum(scheduled.num_tokens for scheduled in self.scheduled_requests)

    @property
    def num_single(self) -> int:
        """Leading requests of one token."""
        return sum(scheduled.num_tokens == 1 for scheduled in self.scheduled_requests)

    @cached_property
    def token_ids(self) -> Int32:
        """Token ids [T]; 0 where the value is still on the device."""
        tokens = np.zeros(self.num_rows, dtype=np.int32)
        for scheduled, row in zip(self.scheduled_requests, self.first_rows, strict=True):
            known = scheduled.request.all_token_ids[scheduled.start : scheduled.end]
            tokens[row : row + len(known)] = known
        return tokens

    @cached_property
    def positions(self) -> Int32:
        """Position of each row's token in its sequence [T]."""
        return np.concatenate(
            [np.arange(scheduled.start, scheduled.end, dtype=np.int32) for scheduled in self.scheduled_requests]
        )

    def slots(self, block_size: int, group: int = 0) -> Int32:
        """Slot of each row's KV in the pool [T]: block number x block size + place in the block."""
        parts = []
        for scheduled in self.scheduled_requests:
            table = np.asarray(scheduled.block_tables[group], dtype=np.int32)
            positions = np.arange(scheduled.start, scheduled.end, dtype=np.int32)
            parts.append(table[positions // block_size] * block_size + positions % block_size)
        return np.concatenate(parts)
