"""A group's memory on the device, and as an mlx-lm model sees it: one cache object per layer.

mlx-lm's models run unmodified on these. In a *flat* call every row is a sequence with one new
token, and attention, which enters through :mod:`engine.runner.kv.attention_patch`, reads the pages
itself. In a *rectangular* call (layers with a recurrent state, or attention of the model's own) the
caches give back what was read, as mlx-lm's own do.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Protocol

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from engine.memory.cache_spec import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec, StateSpec
from engine.runner.kv.attention_metadata import AttentionMetadata, RowsRead, SequenceRead
from engine.runner.kv.input_batch import InputBatch
from engine.runner.kv.kv_pool import KVPool, Pool, StatePool
from engine.runner.kv.kv_spec import CacheLeaf, UnsupportedCacheError

_lent: dict[int, "PagedLayerCache"] = {}
"""Id of the keys that a flat call was handed -> their cache, while the call is built (the cache holds them as long)."""


def owner(keys: mx.array) -> "PagedLayerCache | None":
    """The cache of the layer whose keys another layer attends to in a flat call."""
    return _lent.get(id(keys))


class PagedLayerCache:
    """Keys and values of one layer in pages."""

    def __init__(self, pool: KVPool, index: int, window: int | None) -> None:
        self._pool = pool
        self._index = index
        self._window = window
        self._dtype = mx.float32
        self._new: tuple[mx.array, mx.array] | None = None
        self.metadata: AttentionMetadata | None = None
        self.flat = False

    @property
    def offset(self) -> mx.array | int:
        """Position of the call's tokens: one per row, or of the first of a sequence."""
        step = self._step
        return step.positions if self.flat or step.num_calls > 1 else step.start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the call's keys and values; gives what a rectangular call attends to."""
        pool, index, step = self._pool, self._index, self._step
        pool.keys[index] = step.write(pool.keys[index], keys)
        pool.values[index] = step.write(pool.values[index], values)
        self._dtype = keys.dtype
        if self.flat:
            self._lend(keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What the call attends to, for this layer and those that share its keys.

        Flat rows get their own new ones back: attention finds the pages by them.
        """
        if self._new is not None:
            return self._new
        pages = self._pool.keys[self._index], self._pool.values[self._index]
        keys, values = (self._step.read(self._step.parts[0], some).astype(self._dtype) for some in pages)
        return keys, values

    def finish(self) -> None:
        """The call is built: forget what it was about."""
        self._forget_new()
        self.metadata = None

    def _lend(self, keys: mx.array, values: mx.array) -> None:
        """Be found by ``keys`` until the call is built."""
        self._forget_new()
        self._new = keys, values
        _lent[id(keys)] = self

    def _forget_new(self) -> None:
        if self._new is not None:
            _lent.pop(id(self._new[0]), None)
            self._new = None

    @property
    def keys(self) -> mx.array:
        """The pages of the keys: what some models make later arrays wait for."""
        return self._pool.keys[self._index].arrays[0]

    @keys.setter
    def keys(self, pages: mx.array) -> None:
        self._pool.keys[self._index].arrays[0] = pages

    @property
    def values(self) -> mx.array:
        """The pages of the values, as :attr:`keys`."""
        return self._pool.values[self._index].arrays[0]

    @values.setter
    def values(self, blank: mx.array) -> None:
        """A model that never reads these values blanks them so that they are never computed; pages stay as written."""

    @property
    def start_position(self) -> int:
        """First position that a call of one sequence reads: chunked attention masks from there."""
        part = self._step.parts[0]
        if not isinstance(part, SequenceRead):
            raise UnsupportedCacheError("chunked attention over several sequences")
        return part.begin

    def maybe_trim_front(self) -> None:
        """Nothing to trim: the block pool takes back what lies behind the window."""

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What the call's rows may see; flat rows mask themselves."""
        self._check_window(window_size)
        if self.flat:
            return None
        assert num_tokens * self._step.num_calls == self._step.num_rows, "the call has another shape"
        part = self._step.parts[0]
        return part.seen if isinstance(part, RowsRead) else part.mask(as_array=return_array)

    def _check_window(self, window_size: int | None) -> None:
        if window_size is not None and window_size != self._window:
            raise UnsupportedCacheError(f"a window of {window_size} tokens over a cache of {self._window or 'all'}")

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """Attention of ``queries`` [T, heads, 1, dim] over the layer's pages."""
        keys, values = self._pool.keys[self._index], self._pool.values[self._index]
        return self._step.attend(queries, keys, values, scale, sinks)

    @property
    def _step(self) -> AttentionMetadata:
        assert self.metadata is not None, "no step is being computed"
        return self.metadata


class StateLayerCache(ArraysCache):  # type: ignore[misc]
    """The recurrent state of one layer, for the sequences of a rectangular call.

    To a model mlx-lm's ``ArraysCache`` (some look at the type): an entry is None for a sequence that
    begins. Lengths and padding are never needed, since every call holds whole rows.
    """

    def __init__(self, pool: StatePool, index: int) -> None:
        super().__init__(size=0)
        self._pool = pool
        self._index = index
        self._reads: mx.array | None = None
        self._writes: mx.array | None = None
        self._begins = False
        self._written: set[int] = set()

    def start(self, reads: mx.array, writes: mx.array, *, begins: bool) -> None:
        """The next call computes the sequences with states in slots ``reads`` [B] and leaves them in ``writes`` [B].

        ``begins``: from their first token. The two differ where the state before is kept as a checkpoint.
        """
        self._reads, self._writes, self._begins, self._written = reads, writes, begins, set()

    def __getitem__(self, entry: int) -> mx.array | None:
        if entry >= len(self._pool.arrays[self._index]):
            raise IndexError(entry)  # models unpack their states
        if self._begins and entry not in self._written:
            return None
        slots = self._writes if entry in self._written else self._reads
        assert slots is not None, "no step is being computed"
        return self._pool.arrays[self._index][entry][slots]

    def __setitem__(self, entry: int, value: mx.array) -> None:
        assert self._writes is not None, "no step is being computed"
        states = self._pool.arrays[self._index]
        states[entry][self._writes] = value.astype(states[entry].dtype)
        self._written.add(entry)

    def make_mask(self, num_tokens: int) -> None:
        """Every token of a call counts."""

    def advance(self, num_tokens: int) -> None:
        """Nothing to move: there is no padding."""


LayerCache = PagedLayerCache | StateLayerCache


class GroupCache(Protocol):
    """A group's blocks on the device, and the caches that its layers are called with."""

    @property
    def pool(self) -> Pool:
        """The blocks."""

    @property
    def views(self) -> Mapping[CacheLeaf, LayerCache]:
        """The layers' caches."""

    def begin(self, batch: InputBatch, group: int, *, tokens: mx.array, flat: bool, max_views: int) -> None:
        """A call for ``batch`` is built now; the group is number ``group`` in block tables.

        ``tokens`` are what it computes: known once the call before has written what MLX does not see. ``max_views``:
        see :data:`engine.runner.kv.attention_metadata.MAX_VIEWS`.
        """

    def finish(self) -> None:
        """The call is built."""


@singledispatch
def make_group_cache(
    spec: KVCacheSpec, leaves: Sequence[CacheLeaf], *, block_size: int, kv_cache_dtype: str
) -> GroupCache:
    """The memory of one group's ``leaves``; each kind registers its own, beside its class."""
    raise AssertionError(f"no memory for {len(leaves)} caches of kind {spec.kind} ({block_size=}, {kv_cache_dtype=})")


class PagedGroupCache:
    """Keys and values in pages; layers of a group have one layout of the call's tokens."""

    def __init__(self, leaves: Sequence[CacheLeaf], block_size: int, kv_cache_dtype: str, window: int | None) -> None:
        self.pool = KVPool([leaf.shape for leaf in leaves if leaf.shape is not None], block_size, kv_cache_dtype)
        self.views = {leaf: PagedLayerCache(self.pool, index, window) for index, leaf in enumerate(leaves)}
        self._window = window

    def begin(self, batch: InputBatch, group: int, *, flat: bool, max_views: int, **_order: object) -> None:
        """See :class:`GroupCache`: where the call's tokens are written, and what they attend to.

        A rectangular call has one read, so no more than one view.
        """
        max_views = max_views if flat else min(max_views, 1)
        metadata = AttentionMetadata(batch, self.pool.block_size, group=group, window=self._window, max_views=max_views)
        for view in self.views.values():
            view.metadata, view.flat = metadata, flat

    def finish(self) -> None:
        """See :class:`GroupCache`."""
        for view in self.views.values():
            view.finish()


@make_group_cache.register
def _full_attention(
    _spec: FullAttentionSpec, leaves: Sequence[CacheLeaf], *, block_size: int, kv_cache_dtype: str
) -> GroupCache:
    return PagedGroupCache(leaves, block_size, kv_cache_dtype, None)


@make_group_cache.register
def _sliding_window(
    spec: SlidingWindowSpec, leaves: Sequence[CacheLeaf], *, block_size: int, kv_cache_dtype: str
) -> GroupCache:
    return PagedGroupCache(leaves, block_size, kv_cache_dtype, spec.window)


class StateGroupCache:
    """One slot per sequence."""

    def __init__(self, leaves: Sequence[CacheLeaf]) -> None:
        self.pool = StatePool(leaves)
        self.views = {leaf: StateLayerCache(self.pool, index) for index, leaf in enumerate(leaves)}

    def begin(self, batch: InputBatch, group: int, *, flat: bool, **_reading: object) -> None:
        """See :class:`GroupCache`: a sequence reads its table's first slot and writes to its last."""
        assert not flat, "a state goes from token to token: such layers need calls of whole sequences"
        tables = [scheduled.block_tables[group] for scheduled in batch.scheduled_requests]
        reads, writes = mx.array([table[0] for table in tables]), mx.array([table[-1] for table in tables])
        for view in self.views.values():
            view.start(reads, writes, begins=batch.scheduled_requests[0].start == 0)

    def finish(self) -> None:
        """See :class:`GroupCache`."""


@make_group_cache.register
def _state(_spec: StateSpec, leaves: Sequence[CacheLeaf], **_pages: object) -> GroupCache:
    return StateGroupCache(leaves)
