"""A group's pages when kernels read and write them in place, and its layers' caches as an mlx-lm model sees them.

MLX does not see that a kernel writes to the pages, so nothing else may touch them while a step is
in flight: a decode row's keys and values enter with its attention, a chunk's when its context is
collected, and everything that a call computes comes after the call before it (:func:`after`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.runner.kernels.joined_attention import HeadConstants
from engine.runner.kernels.page_format import PageArrays, PagePair, as_pages
from engine.runner.kernels.paged_attention import arrival_counters
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.attention_metadata import SequenceRead
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kv_pages import Pages
from engine.runner.kv.kv_pool import KVPool
from engine.runner.kv.kv_spec import CacheLeaf
from engine.runner.kv.paged_cache import PagedLayerCache

_MIN_POSITIONS = 8
"""MLX keeps arrays of up to 8 bytes in host memory on CUDA, where each block of a kernel would wait for them, and on
Metal those of fewer than 8 elements are of another kind, which takes a kernel of its own that no check has seen."""


def after(tokens: mx.array, earlier: mx.array | None) -> mx.array:
    """``tokens``, computed once ``earlier`` is there: a real operation, since only those are ordered on a GPU."""
    if earlier is None:
        return tokens
    return mx.where(earlier.reshape(-1)[:1] == 0, tokens, tokens)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One new token of each of several sequences.

    ``positions`` int32 [rows or more] (-1: a padding row), ``offset`` [rows] the same for rotary embeddings,
    ``block_tables`` int32 [rows, blocks].
    """

    positions: mx.array
    offset: mx.array
    block_tables: mx.array

    @classmethod
    def of(cls, num_rows: int, positions: mx.array, block_tables: mx.array) -> "DecodeRows":
        """From what :func:`on_device` gives."""
        return cls(positions, positions[:num_rows], block_tables)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one sequence, and the positions that they attend to."""

    read: SequenceRead
    block_table: mx.array
    span: mx.array

    @classmethod
    def of(cls, read: SequenceRead, block_table: Sequence[int]) -> "Chunk":
        """``block_table`` is the whole sequence's."""
        span = np.array([read.begin, read.start, 0, 0], dtype=np.int32)
        table = np.zeros(max(len(block_table), _MIN_POSITIONS), dtype=np.int32)
        table[: len(block_table)] = block_table
        return cls(read, on_device(table), on_device(span))


def on_device(numbers: Int32) -> mx.array:
    """``numbers`` in the device's own memory: an array made from the host's is read over the bus on CUDA.

    They come inverted and are inverted back, which is one operation that MLX has compiled already.
    """
    return mx.bitwise_invert(mx.array(~numbers))


def padded_positions(positions: Int32, num_rows: int) -> Int32:
    """``positions`` for ``num_rows`` rows, and for as many as kernels want at least; -1 where there is no row."""
    padded = np.full(max(num_rows, _MIN_POSITIONS), -1, dtype=np.int32)
    padded[: len(positions)] = positions
    return padded


class KernelLayerCache(PagedLayerCache):
    """Keys and values of one layer in pages that kernels read and write."""

    def __init__(self, pool: KVPool, index: int, window: int | None, kernels: AttentionKernels) -> None:
        super().__init__(pool, index, window)
        self._kernels = kernels
        self._call: DecodeRows | Chunk | None = None
        self._pages: PagePair | None = None
        shape = pool.layers[index]
        self.latent = shape.is_latent
        """Whether a key is what all heads share, and a value what is rotated of it: see :meth:`attend_latent`."""
        self._identity = mx.eye(shape.value_dim if self.latent else 1, dtype=shape.dtype)[None, None]
        mx.eval(self._identity)  # a constant of compiled steps
        self._arrivals = arrival_counters()  # one more; two layers' launches need not follow each other
        self.collected: mx.array | None = None
        """Keys of the last chunk: what comes after them comes after the chunk was written."""

    def begin(self, call: DecodeRows | Chunk, pages: PagePair) -> None:
        """A call is built now, over ``pages`` (keys and values)."""
        self._call, self.collected = call, None
        self._pages = as_pages(pages[0]), as_pages(pages[1])
        self.flat = isinstance(call, DecodeRows)

    @property
    def offset(self) -> mx.array | int:
        """Position of the call's tokens: one per row, or of the first of a chunk."""
        call = self._call
        assert call is not None, "no step is being computed"
        return call.offset if isinstance(call, DecodeRows) else call.read.start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """A decode row's keys and values wait for its attention; a chunk's are written, and come with their context.

        Of latent rows the second is what is rotated. A model multiplies its queries for that by what it gets here, and
        adds the products to its scores as a mask: from an identity they come back as they are, for the kernel.
        """
        call, pages = self._call, self._pages
        assert call is not None, "no step is being computed"
        assert pages is not None, "no pages to write to"
        if isinstance(call, Chunk):
            length = call.read.end - call.read.begin
            keys, values = self._kernels.collect(
                keys, values, *pages, call.block_table, call.span, block_size=self._pool.block_size, length=length
            )
            self.collected = keys
        elif self.latent:
            self._lend(keys, values)
            return keys, self._identity
        self._lend(keys, values)
        return keys, values

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What a chunk's rows may see; decode rows see what their kernel shows them."""
        self._check_window(window_size)
        if isinstance(self._call, Chunk):
            assert num_tokens == self._call.read.num_rows, "the call has another shape"
            return self._call.read.mask(as_array=return_array)
        return None

    @property
    def start_position(self) -> int:
        """See :class:`PagedLayerCache`."""
        assert isinstance(self._call, Chunk), "chunked attention over several sequences"
        return self._call.read.begin

    def attend(
        self, queries: mx.array, scale: float, sinks: mx.array | None = None, softcap: float | None = None
    ) -> mx.array:
        """Attention of ``queries`` [rows, heads, 1, dim] over the layer's pages, and the new token into them."""
        call, pages, new = self._call, self._pages, self._new
        assert isinstance(call, DecodeRows), "a chunk attends to what was collected"
        assert pages is not None, "no pages to write to"
        assert new is not None, "attention before its keys and values"
        return self._kernels.paged_attention(
            queries, *new, *pages, call.block_tables, call.positions, scale=scale,
            block_size=self._pool.block_size, window=self._window, sinks=sinks, softcap=softcap,
            arrivals=self._arrivals,
        )  # fmt: skip

    def attend_latent(self, queries: mx.array, scale: float, rope_queries: mx.array) -> mx.array:
        """Attention of ``queries`` [rows, heads, 1, R] over latent pages, and the new token into them.

        ``rope_queries`` [rows, heads, 1, P]: see :func:`engine.runner.kernels.latent_attention.latent_attention`.
        """
        call, new = self._call, self._new
        assert isinstance(call, DecodeRows), "a chunk attends to what was collected"
        assert new is not None, "attention before its keys and values"
        assert self._pages is not None, "no pages to write to"
        latents, ropes = self._pages
        assert isinstance(latents, mx.array), "packed latent pages"
        assert isinstance(ropes, mx.array), "packed latent pages"
        return self._kernels.latent_attention(
            queries, rope_queries, *new, latents, ropes, call.block_tables, call.positions, scale=scale,
            block_size=self._pool.block_size, arrivals=self._arrivals,
        )  # fmt: skip

    def attend_joined(self, joined: mx.array, constants: HeadConstants, *, heads: int, scale: float) -> mx.array:
        """Attention [rows, heads * dim] from the layer's ``joined`` product [rows, (heads + 2 * kv_heads) * dim].

        See :func:`engine.runner.kernels.joined_attention.joined_attention`; the new token goes into its page.
        """
        call, pages = self._call, self._pages
        assert isinstance(call, DecodeRows), "a chunk attends to what was collected"
        assert pages is not None, "no pages to write to"
        return self._kernels.joined_attention(
            joined, *pages, call.block_tables, call.positions, constants, heads=heads, scale=scale,
            block_size=self._pool.block_size, window=self._window, arrivals=self._arrivals,
        )  # fmt: skip

    def finish(self) -> None:
        """The call is built: forget what it was about."""
        super().finish()
        self._call = self._pages = self.collected = None


class KernelGroupCache:
    """Pages of a group whose layers attend through kernels."""

    def __init__(
        self, leaves: Sequence[CacheLeaf], block_size: int, window: int | None, kernels: AttentionKernels,
        kv_cache_dtype: str = "auto",
    ) -> None:  # fmt: skip
        self.pool = KVPool([leaf.shape for leaf in leaves if leaf.shape is not None], block_size, kv_cache_dtype)
        self.views = {leaf: KernelLayerCache(self.pool, i, window, kernels) for i, leaf in enumerate(leaves)}
        self._window = window

    @property
    def pages(self) -> list[PagePair]:
        """Keys and values of all layers."""
        pool = self.pool
        return [(_arrays(keys), _arrays(values)) for keys, values in zip(pool.keys, pool.values, strict=True)]

    @property
    def collected(self) -> mx.array | None:
        """Keys of the last layer that wrote a chunk in this call."""
        found = (view.collected for view in reversed(self.views.values()) if view.collected is not None)
        return next(found, None)

    def begin(self, batch: InputBatch, group: int, **_reading: object) -> None:
        """See :class:`engine.runner.kv.paged_cache.GroupCache`: single tokens of sequences, or one chunk."""
        tables = [scheduled.block_tables[group] for scheduled in batch.scheduled_requests]
        if batch.num_single == len(tables):
            width = max(_MIN_POSITIONS, *(len(table) for table in tables))
            rows = np.zeros((len(tables), width), dtype=np.int32)
            for row, table in enumerate(tables):
                rows[row, : len(table)] = table
            positions = padded_positions(batch.positions, len(tables))
            self.begin_call(DecodeRows.of(len(tables), on_device(positions), on_device(rows)), self.pages)
            return
        assert len(tables) == 1, "chunks are computed one by one"
        read = SequenceRead.of(batch, 0, group, self._window, self.pool.block_size)
        self.begin_call(Chunk.of(read, tables[0]), self.pages)

    def begin_call(self, call: DecodeRows | Chunk, pages: Sequence[PagePair]) -> None:
        """A call is built now, over ``pages`` of all layers."""
        for view, some in zip(self.views.values(), pages, strict=True):
            view.begin(call, some)

    def finish(self) -> None:
        """See :class:`engine.runner.kv.paged_cache.GroupCache`."""
        for view in self.views.values():
            view.finish()


def _arrays(pages: Pages) -> PageArrays:
    return as_pages(pages.arrays[0] if pages.packing is None else tuple(pages.arrays))
