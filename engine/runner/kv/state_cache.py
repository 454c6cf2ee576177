"""A group's states when kernels read and write them in place, and its layers' caches as an mlx-lm model sees them.

As with pages (:mod:`engine.runner.kv.kernel_cache`) MLX does not see that a kernel writes: what reads a state comes
after the call before by the call's tokens, and what writes it after what read it. A layer that this project computes
itself takes arrays and slots as they are; any other gets its states read into rows, and leaves rows to be written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from engine.core.step import ScheduledRequest
from engine.runner.kernels.state_kernels import StateKernels
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kernel_cache import after, on_device
from engine.runner.kv.kv_pool import StatePool
from engine.runner.kv.kv_spec import CacheLeaf

_FEWEST_ROWS = 8
"""See :mod:`engine.runner.kv.kernel_cache`: a kernel's arrays are never tiny."""


def slot_rows(scheduled_requests: Sequence[ScheduledRequest], group: int, num_rows: int) -> Int32:
    """Slots [2, num_rows or more] that rows read and write, -1 where there is none.

    A sequence reads its table's first slot and writes to its last; from its first token on it reads none.
    """
    slots = np.full((2, max(num_rows, _FEWEST_ROWS)), -1, dtype=np.int32)
    for row, scheduled in enumerate(scheduled_requests):
        table = scheduled.block_tables[group]
        slots[:, row] = table[0] if scheduled.start else -1, table[-1]
    return slots


@dataclass(frozen=True, slots=True)
class StateRows:
    """The sequences of a call.

    ``slots`` int32 [2, rows or more]: what each reads and writes. ``ordered``: the same, known once the call before
    is done. ``begins``: they have no state yet.
    """

    slots: mx.array
    ordered: mx.array
    num_rows: int
    begins: bool = False

    @classmethod
    def of(cls, slots: mx.array, num_rows: int, tokens: mx.array, *, begins: bool = False) -> "StateRows":
        """For the call that computes ``tokens``, which come after the call before."""
        return cls(slots, after(slots, tokens), num_rows, begins)


class KernelStateCache(ArraysCache):  # type: ignore[misc]
    """The recurrent state of one layer in slots that kernels read and write.

    To a model mlx-lm's ``ArraysCache``; see :class:`engine.runner.kv.paged_cache.StateLayerCache`.
    """

    def __init__(self, group: "KernelStateGroup") -> None:
        super().__init__(size=0)
        self._group = group
        self._states: list[mx.array] = []
        self._read: dict[int, mx.array] = {}
        self._new: dict[int, mx.array] = {}
        self.mixed: mx.array | None = None
        """What a layer's first launch gave in this call, for its second."""

    def begin(self, states: list[mx.array]) -> None:
        """A call is built now, over ``states`` [slots, …] of this layer."""
        self._states, self._read, self._new, self.mixed = states, {}, {}, None

    @property
    def states(self) -> list[mx.array]:
        """The layer's states [slots, …], for kernels; what moves them on tells :meth:`moved_on`."""
        return self._states

    @property
    def rows(self) -> StateRows:
        """The sequences of the call."""
        rows = self._group.rows
        assert rows is not None, "no step is being computed"
        return rows

    def moved_on(self, output: mx.array) -> None:
        """The launch that gave ``output`` has written the layer's states."""
        self._group.newest = output

    def __getitem__(self, entry: int) -> mx.array | None:
        if entry >= len(self._states):
            raise IndexError(entry)  # models unpack their states
        if entry in self._new:
            return self._new[entry]
        rows = self.rows
        if rows.begins:
            return None
        if entry not in self._read:
            self._read[entry] = self._group.kernels.read_slots(self._states[entry], rows.ordered, rows.num_rows)
        return self._read[entry]

    def __setitem__(self, entry: int, value: mx.array) -> None:
        states, group = self._states[entry], self._group
        new = self._new[entry] = value.astype(states.dtype)
        group.written = group.newest = group.kernels.write_slots(
            new, states, self.rows.ordered, read=self._read.get(entry), after=group.written
        )

    def make_mask(self, num_tokens: int) -> None:
        """Every token of a call counts."""

    def advance(self, num_tokens: int) -> None:
        """Nothing to move: there is no padding."""

    def finish(self) -> None:
        """The call is built: forget what it was about."""
        self._states, self._read, self._new, self.mixed = [], {}, {}, None


class KernelStateGroup:
    """One slot per sequence, read and written by kernels."""

    def __init__(self, leaves: Sequence[CacheLeaf], kernels: StateKernels) -> None:
        self.pool = StatePool(leaves)
        self.kernels = kernels
        self.views = {leaf: KernelStateCache(self) for leaf in leaves}
        self.rows: StateRows | None = None
        self.written: mx.array | None = None
        """Known once all states that layers left in rows are in their slots: nothing else waits for that."""
        self.newest: mx.array | None = None
        """The output of the call's last launch that wrote a state."""

    @property
    def states(self) -> list[list[mx.array]]:
        """States [slots, …] of all layers."""
        return self.pool.arrays

    def begin(self, batch: InputBatch, group: int, *, tokens: mx.array, **_reading: object) -> None:
        """See :class:`engine.runner.kv.paged_cache.GroupCache`."""
        requests = batch.scheduled_requests
        begins = requests[0].start == 0
        assert len(requests) == 1 or not begins, "sequences begin one by one"
        slots = on_device(slot_rows(requests, group, len(requests)))
        self.begin_call(StateRows.of(slots, len(requests), tokens, begins=begins), self.pool.arrays)

    def begin_call(self, rows: StateRows, states: Sequence[list[mx.array]]) -> None:
        """A call is built now, over ``states`` of all layers."""
        self.rows, self.written, self.newest = rows, None, None
        for view, some in zip(self.views.values(), states, strict=True):
            view.begin(some)

    def finish(self) -> None:
        """See :class:`engine.runner.kv.paged_cache.GroupCache`."""
        self.rows = self.written = self.newest = None
        for view in self.views.values():
            view.finish()
