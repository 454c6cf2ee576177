"""Steps over pages and slots: read by kernels on a GPU, else in one flat call, or in rectangles."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.memory.cache_spec import SlidingWindowSpec, StateSpec, merge_specs
from engine.memory.planner import next_pool_size
from engine.runner.backends import RowsInOrder
from engine.runner.decode_step import DecodeStep
from engine.runner.device.memory import clear_cache
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv import attention_patch, capped_attention
from engine.runner.kv.attention_calls import KernelChoice
from engine.runner.kv.attention_patch import RowSelector
from engine.runner.kv.attention_path import AttentionPath
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kernel_cache import KernelGroupCache, after
from engine.runner.kv.kv_pool import Pool
from engine.runner.kv.kv_spec import CacheTree, flatten, group_leaves
from engine.runner.kv.paged_cache import GroupCache, LayerCache, PagedGroupCache, make_group_cache
from engine.runner.kv.state_cache import KernelStateCache, KernelStateGroup
from engine.runner.kv.state_layers import StateLayers

Calls = Literal["flat", "rectangles", "sequences"]
IN_PLACE = KernelGroupCache, KernelStateGroup
"""Groups whose memory kernels write, which MLX does not see."""


class PagedBackend:
    """KV in pages, states in slots.

    A ``flat`` step is one pass over the weights. Layers that carry a state from token to token, and
    attention that does not go through mlx-lm's one function, need ``rectangles``: one call for all
    decodes, one for each chunk of a prompt. A few models take no batch at all: ``sequences``. With
    ``kernels`` calls are rectangles too, and the decodes' is ``compiled`` where kernels serve all groups.
    """

    paged = True

    def __init__(
        self, model: nn.Module, tree: CacheTree, block_size: int, *, calls: Calls,
        kv_cache_dtype: str = "auto", max_views: int, max_rows: int | None = None,
        kernels: KernelChoice | None = None, compiled: bool = False, why_reference: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.calls = calls
        self.max_rows = max_rows
        self.block_size = block_size
        self.groups = group_leaves(flatten(tree))
        self.kv_cache_dtype = kv_cache_dtype
        self.max_views = max_views
        self.kernels = kernels
        self._why_reference = tuple(why_reference) or ("",) * len(self.groups)
        self._group_caches = [self._group_cache(number) for number in range(len(self.groups))]
        self.pools = [cache.pool for cache in self._group_caches]
        views = {leaf: view for cache in self._group_caches for leaf, view in cache.views.items()}
        self._caches: list[LayerCache | KernelStateCache | CacheList] = [
            CacheList(*(views[leaf] for leaf in entry)) if isinstance(entry, tuple) else views[entry] for entry in tree
        ]
        self._selector = RowSelector(model)
        self._modules = attention_patch.install(model) if calls == "flat" or kernels is not None else ()
        self._capped = capped_attention.install(model) if kernels is not None else SwappedModules()
        states = [cache for cache in self._group_caches if isinstance(cache, KernelStateGroup)]
        self._state_layers = StateLayers(model, states[0].kernels) if states else None
        self._decode_step: DecodeStep | None = None
        if kernels is not None and kernels.serves_all:
            groups = [cache for cache in self._group_caches if isinstance(cache, IN_PLACE)]
            self._decode_step = DecodeStep(model, self._caches, groups, compiled=compiled)
        self._newest: mx.array | None = None
        """With kernels: known once every call so far has written its pages."""
        self._before: tuple[list[object], mx.array | None] | None = None
        self.free_memory: Callable[[], int] | None = None
        """Bytes that pools may grow by; None: as much as they like."""

    @property
    def attention_paths(self) -> tuple[AttentionPath, ...]:
        """See :class:`engine.runner.backends.Backend`."""
        groups = [merge_specs([leaf.spec for leaf in leaves]) for leaves in self.groups]
        served = [self._served(number) for number in range(len(groups))]
        left = "" if self._state_layers is None else self._state_layers.problem
        return tuple(
            AttentionPath.of_group(group, "paged", left if isinstance(group, StateSpec) else "")
            if kernels
            else AttentionPath.of_group(group, "reference", why)
            for group, kernels, why in zip(groups, served, self._why_reference, strict=True)
        )

    def _served(self, number: int) -> bool:
        """Whether kernels read and write the pages of a group."""
        return self.kernels is not None and not self.kernels.reasons[number]

    def _group_cache(self, number: int) -> GroupCache:
        leaves = self.groups[number]
        spec = leaves[0].spec
        if self.kernels is not None and self._served(number) and isinstance(spec, StateSpec):
            return KernelStateGroup(leaves, self.kernels.kernels.states)
        if self.kernels is not None and self._served(number):
            window = spec.window if isinstance(spec, SlidingWindowSpec) else None
            return KernelGroupCache(leaves, self.block_size, window, self.kernels.kernels, self.kv_cache_dtype)
        return make_group_cache(spec, leaves, block_size=self.block_size, kv_cache_dtype=self.kv_cache_dtype)

    def make_room(self, batch: InputBatch, limits: Sequence[int]) -> None:
        """Grow the pools so that the blocks of ``batch`` exist; never over ``limits`` (blocks, by group)."""
        for group, (pool, limit) in enumerate(zip(self.pools, limits, strict=True)):
            # Of a sequence's pages only those of this step's tokens may be new.
            size = self.block_size if self.groups[group][0].spec.paged else 0
            new = [one.block_tables[group][one.start // size if size else 0 :] for one in batch.scheduled_requests]
            highest = max(max(blocks, default=-1) for blocks in new)
            if highest >= pool.num_blocks:
                self._wait_for_kernels()
                pool.grow(self._new_size(pool, highest + 1, limit))

    def _new_size(self, pool: Pool, needed: int, limit: int) -> int:
        """Blocks to grow ``pool`` to: more than ``needed`` where memory allows."""
        size = next_pool_size(pool.num_blocks, needed, limit)
        if self.free_memory is None or not pool.num_blocks:
            return size
        per_block = pool.nbytes // pool.num_blocks
        return size if (size - pool.num_blocks) * per_block <= self.free_memory() // 2 else needed

    def resize(self, limits: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """See :class:`engine.runner.backends.Backend`."""
        self._before = None
        self._wait_for_kernels()
        self._forget_tables()
        for pool, limit, moved in zip(self.pools, limits, moves, strict=True):
            if pool.num_blocks > limit:
                pool.shrink(limit, moved)
        clear_cache()

    def forward(self, batch: InputBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`engine.runner.backends.Backend`. Blocks must be within the pools."""
        self._before = self._snapshot(), self._newest
        one_pass = self.calls == "flat" and (self.max_rows is None or batch.num_rows <= self.max_rows)
        if one_pass and self.kernels is None:
            if sum(map(len, wanted)) == batch.num_rows:
                return self._call(batch, tokens[:, None], None, flat=True)
            rows = np.concatenate(
                [first + local for first, local in zip(batch.first_rows, wanted, strict=True)], dtype=np.int32
            )
            return self._call(batch, tokens[:, None], rows, flat=True)
        found = RowsInOrder(wanted)
        decodes = [i for i, one in enumerate(batch.scheduled_requests) if len(wanted[i]) == 1 and self._decodes(one)]
        size = self.max_rows or max(1, len(decodes))
        for some in (decodes[i : i + size] for i in range(0, len(decodes), size)):
            part = batch if len(some) == len(batch.scheduled_requests) else batch.part(some)
            found.add(some, self._decode(part, tokens, batch.rows_of(some)))
        for i in sorted(set(range(len(batch.scheduled_requests))).difference(decodes), key=lambda i: batch.order[i]):
            found.add([i], self._one_sequence(batch.part([i]), tokens, batch.first_rows[i], wanted[i]))
        return found.logits()

    def _snapshot(self) -> list[object]:
        """The pools that a call makes anew; what kernels write is not undone, but never submitted either."""
        return [None if isinstance(cache, IN_PLACE) else cache.pool.snapshot() for cache in self._group_caches]

    def settle(self) -> None:
        """Give up :meth:`undo`: pages that are still referred to would be copied, not written in place."""
        self._before = None

    def undo(self) -> bool:
        """See :class:`engine.runner.backends.Backend`."""
        if self._before is None:
            return False
        snapshots, self._newest = self._before
        for pool, snapshot in zip(self.pools, snapshots, strict=True):
            if snapshot is not None:
                pool.restore(snapshot)
        self._before = None
        return True

    def blank(self, blocks: Sequence[Int32]) -> None:
        """See :class:`engine.runner.backends.Backend`; kernels read nothing without weight, and no state is shared."""
        for cache, some in zip(self._group_caches, blocks, strict=True):
            if isinstance(cache, PagedGroupCache):
                cache.pool.blank(some)

    def reset(self) -> None:
        """Empty pools, which grow again when used."""
        self.release()
        clear_cache()

    def barrier(self) -> list[mx.array]:
        """Arrays that are known once the last call has written its memory."""
        reference = [cache.pool for cache in self._group_caches if not isinstance(cache, IN_PLACE)]
        written = [array for pool in reference for array in pool.barrier()]
        return written if self._newest is None else [*written, self._newest]

    def forget(self, request: Request) -> None:
        """Nothing to drop: pages and slots belong to the block pools."""

    def release(self) -> None:
        """Give the pools' memory back; they grow again when used."""
        self._before = self._newest = None
        self._forget_tables()
        for pool in self.pools:
            pool.release()

    def close(self) -> None:
        """Release the pools, leave the model and its modules as they were."""
        self.release()
        self._selector.remove()
        attention_patch.remove(self._modules)
        self._capped.undo()
        if self._state_layers is not None:
            self._state_layers.remove()
        self._modules = ()
        self._decode_step = None

    def _decodes(self, scheduled: ScheduledRequest) -> bool:
        """Whether a request joins the one call for decodes, which comes first.

        A last bit of a prompt keeps its place in the schedule, and so does a request that was just admitted: what it
        found in the cache may be written by a chunk before it.
        """
        in_reply = scheduled.start >= scheduled.request.num_prompt_tokens and not scheduled.begins
        return self.calls != "sequences" and scheduled.num_tokens == 1 and in_reply

    def _decode(self, batch: InputBatch, tokens: mx.array, rows: Int32) -> mx.array:
        """Logits [requests, V] of ``batch``, requests of one token each: ``tokens`` [T] at ``rows``."""
        step = self._decode_step
        if step is None or (step.has_states and batch.scheduled_requests[0].start == 0):
            return self._call(batch, tokens[mx.array(rows)][:, None], None)
        logits, self._newest = step.run(batch, after(tokens, self._newest), rows)
        return logits

    def _one_sequence(self, batch: InputBatch, tokens: mx.array, first: int, wanted: Int32) -> mx.array:
        """Logits of the ``wanted`` rows of ``batch``, a chunk of one sequence: ``tokens`` [T] from ``first``."""
        num_tokens = batch.scheduled_requests[0].num_tokens
        if num_tokens == 1 and self.kernels is not None:  # what comes after a single token comes after its logits
            logits = self._decode(batch, tokens, np.array([first], dtype=np.int32))
            return logits[: len(wanted)]
        return self._call(batch, tokens[first : first + num_tokens][None], wanted)

    def _call(self, batch: InputBatch, tokens: mx.array, rows: Int32 | None, *, flat: bool = False) -> mx.array:
        """Logits [rows, V] of one call with token ids [T, 1] or [1, T]; ``rows`` None: of all."""
        if self.kernels is not None:
            tokens = after(tokens, self._newest)
        for group, cache in enumerate(self._group_caches):
            cache.begin(batch, group, tokens=tokens, flat=flat, max_views=self.max_views)
        pick = None if rows is None else mx.array(rows)
        if pick is not None:
            self._selector.pick = (lambda hidden: hidden[pick]) if flat else (lambda hidden: hidden[:, pick])
        try:
            logits: mx.array = self.model(tokens, cache=self._caches)
            self._note_newest(logits)
        finally:
            self._selector.pick = None
            for cache in self._group_caches:
                cache.finish()
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if pick is None or logits.shape[0] == len(pick) else logits[pick]

    def _note_newest(self, logits: mx.array) -> None:
        """What comes after this call comes after its last layer, or after that of a chunk that wants no logits."""
        if self.kernels is None:
            return
        served = [cache for cache in self._group_caches if isinstance(cache, KernelGroupCache)]
        states = [cache for cache in self._group_caches if isinstance(cache, KernelStateGroup)]
        # The last layer's comes after all others; holding each would hold every layer's context until then.
        chunks = [cache.collected for cache in served] + [cache.newest for cache in states]
        newest = [
            logits if logits.size else None,
            *(() if logits.size else chunks),
            *(cache.written for cache in states),
        ]
        self._newest = reduce(after, (some.reshape(-1)[:1] for some in newest if some is not None))

    def _wait_for_kernels(self) -> None:
        """Have all that was submitted write its pages: whoever moves them is not ordered after a kernel."""
        if self.kernels is not None and self._newest is not None:
            mx.eval(self._newest)
            mx.synchronize()

    def _forget_tables(self) -> None:
        if self._decode_step is not None:
            self._decode_step.forget_tables()
