"""The memory of one cache group: pages for layers that keep tokens, slots for layers that keep a state."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kv.kv_pages import Pages
from engine.runner.kv.kv_spec import CacheLeaf, LayerShape


class Pool(Protocol):
    """The blocks of a group in device memory; their numbers are the bookkeeping's."""

    num_blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""

    def grow(self, num_blocks: int) -> None:
        """Make room for ``num_blocks`` blocks; those that are there keep their numbers and contents."""

    def shrink(self, num_blocks: int, moves: Mapping[int, int]) -> None:
        """Keep ``num_blocks`` blocks, after moving {old: new}."""

    def snapshot(self) -> object:
        """The blocks as they are, for :meth:`restore`; while it is kept, writing copies them."""

    def restore(self, snapshot: object) -> None:
        """Go back to a :meth:`snapshot`."""

    def barrier(self) -> list[mx.array]:
        """Small arrays that are known once all layers are written."""

    def release(self) -> None:
        """Give all memory back."""


class KVPool:
    """The pages of a group's layers. Starts small and grows; blocks keep their numbers."""

    def __init__(self, layers: Sequence[LayerShape], block_size: int, kv_cache_dtype: str = "auto") -> None:
        self.layers = tuple(layers)
        self.block_size = block_size
        self.num_blocks = 0
        self.keys = [Pages(one.num_kv_heads, one.key_dim, one.dtype, kv_cache_dtype) for one in layers]
        self.values = [Pages(one.num_value_heads, one.value_dim, one.dtype, kv_cache_dtype) for one in layers]

    @property
    def pages(self) -> list[Pages]:
        """Keys and values of all layers."""
        return [*self.keys, *self.values]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pages.nbytes for pages in self.pages)

    def grow(self, num_blocks: int) -> None:
        """See :class:`Pool`; layer by layer, so that only one is held twice."""
        if num_blocks <= self.num_blocks:
            return
        for pages in self.pages:
            pages.grow(num_blocks * self.block_size)
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int, moves: Mapping[int, int]) -> None:
        """See :class:`Pool`; array by array, so that only one is held twice."""
        blocks = _sources(num_blocks, moves)
        slots = mx.array((blocks[:, None] * self.block_size + np.arange(self.block_size, dtype=np.int32)).reshape(-1))
        for pages in self.pages:
            pages.keep(slots)
        self.num_blocks = num_blocks

    def blank(self, blocks: NDArray[np.int32]) -> None:
        """Let ``blocks``, which nobody holds, contain zeros."""
        blocks = blocks[blocks < self.num_blocks]
        if not len(blocks):
            return
        slots = mx.array((blocks[:, None] * self.block_size + np.arange(self.block_size, dtype=np.int32)).reshape(-1))
        for pages in self.pages:
            for array in pages.arrays:
                array[:, :, slots] = 0

    def snapshot(self) -> object:
        """See :class:`Pool`."""
        return [pages.snapshot() for pages in self.pages]

    def restore(self, snapshot: object) -> None:
        """See :class:`Pool`."""
        assert isinstance(snapshot, list)
        for pages, arrays in zip(self.pages, snapshot, strict=True):
            pages.arrays = arrays

    def barrier(self) -> list[mx.array]:
        """See :class:`Pool`; holding a page would make MLX copy it."""
        return [array[0, 0, 0].sum() for pages in (self.keys[-1], self.values[-1]) for array in pages.arrays]

    def release(self) -> None:
        """Give all pages back."""
        for pages in self.pages:
            pages.arrays = []
        self.num_blocks = 0


class StatePool:
    """Slots of a group's states, one per sequence: per layer and state an array [slots, …]."""

    def __init__(self, leaves: Sequence[CacheLeaf]) -> None:
        self._leaves = tuple(leaves)
        self.num_blocks = 0
        self.arrays: list[list[mx.array]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(array.nbytes for states in self.arrays for array in states)

    def grow(self, num_blocks: int) -> None:
        """Make room for ``num_blocks`` sequences."""
        if num_blocks <= self.num_blocks:
            return
        for i, leaf in enumerate(self._leaves):
            fresh = [mx.zeros((num_blocks - self.num_blocks, *shape), dtype) for shape, dtype in leaf.states]
            if i == len(self.arrays):
                self.arrays.append(fresh)
            else:
                self.arrays[i] = [mx.concatenate([old, new]) for old, new in zip(self.arrays[i], fresh, strict=True)]
            mx.eval(self.arrays[i])
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int, moves: Mapping[int, int]) -> None:
        """See :class:`Pool`."""
        slots = mx.array(_sources(num_blocks, moves))
        for states in self.arrays:
            states[:] = [mx.take(array, slots, axis=0) for array in states]
            mx.eval(states)
        self.num_blocks = num_blocks

    def snapshot(self) -> object:
        """See :class:`Pool`."""
        return [[copy(array) for array in states] for states in self.arrays]

    def restore(self, snapshot: object) -> None:
        """See :class:`Pool`."""
        assert isinstance(snapshot, list)
        self.arrays = snapshot

    def barrier(self) -> list[mx.array]:
        """See :class:`Pool`."""
        return [array.reshape(-1)[:1].sum() for array in self.arrays[-1]]

    def release(self) -> None:
        """Give all slots back."""
        self.arrays, self.num_blocks = [], 0


def _sources(num_blocks: int, moves: Mapping[int, int]) -> NDArray[np.int32]:
    """The old block in the place of each block of a smaller pool, given {old: new}."""
    blocks = np.arange(num_blocks, dtype=np.int32)
    for old, new in moves.items():
        blocks[new] = old
    return blocks
