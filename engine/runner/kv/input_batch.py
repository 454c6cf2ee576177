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
class StepBatch:
    """The shares of a step in row order, and the row that each begins at."""

    shares: tuple[ScheduledRequest, ...]
    first_rows: tuple[int, ...]
    order: tuple[int, ...]
    """The place of each share in the schedule: a later share may build on what an earlier one writes."""

    @classmethod
    def build(cls, scheduled: Sequence[ScheduledRequest]) -> "StepBatch":
        """Order ``scheduled``: single tokens first, then chunks."""
        order = sorted(range(len(scheduled)), key=lambda i: scheduled[i].num_tokens > 1)
        shares = [scheduled[i] for i in order]
        starts = np.cumsum([0, *(share.num_tokens for share in shares)])
        return cls(tuple(shares), tuple(int(start) for start in starts[:-1]), tuple(order))

    def part(self, indices: Sequence[int]) -> "StepBatch":
        """Some of the shares as a batch of their own."""
        return StepBatch.build([self.shares[i] for i in indices])

    @property
    def num_rows(self) -> int:
        """Tokens in the step (T)."""
        return sum(share.num_tokens for share in self.shares)

    @property
    def num_single(self) -> int:
        """Leading shares of one token."""
        return sum(share.num_tokens == 1 for share in self.shares)

    @cached_property
    def token_ids(self) -> Int32:
        """Token ids [T]; 0 where the value is still on the device."""
        tokens = np.zeros(self.num_rows, dtype=np.int32)
        for share, row in zip(self.shares, self.first_rows, strict=True):
            known = share.request.all_token_ids[share.start : share.end]
            tokens[row : row + len(known)] = known
        return tokens

    @cached_property
    def positions(self) -> Int32:
        """Position of each row's token in its sequence [T]."""
        return np.concatenate([np.arange(share.start, share.end, dtype=np.int32) for share in self.shares])

    def slots(self, block_size: int, group: int = 0) -> Int32:
        """Slot of each row's KV in the pool [T]: block number x block size + place in the block."""
        parts = []
        for share in self.shares:
            table = np.asarray(share.block_tables[group], dtype=np.int32)
            positions = np.arange(share.start, share.end, dtype=np.int32)
            parts.append(table[positions // block_size] * block_size + positions % block_size)
        return np.concatenate(parts)
