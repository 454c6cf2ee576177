"""Steps over pages and slots: in one flat call where the model allows it, else in rectangles."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.memory.planner import next_pool_size
from engine.runner.backends import join_rows
from engine.runner.device.memory import clear_cache
from engine.runner.kv import attention_patch
from engine.runner.kv.attention_patch import RowSelector
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kv_pool import Pool
from engine.runner.kv.kv_spec import CacheTree, flatten, group_leaves
from engine.runner.kv.paged_cache import LayerCache, make_group_cache

Calls = Literal["flat", "rectangles", "sequences"]


class PagedBackend:
    """KV in pages, states in slots.

    A ``flat`` step is one pass over the weights. Layers that carry a state from token to token, and
    attention that does not go through mlx-lm's one function, need ``rectangles``: one call for all
    decodes, one for each chunk of a prompt. A few models take no batch at all: ``sequences``.
    """

    paged = True

    def __init__(
        self, model: nn.Module, tree: CacheTree, block_size: int, *, calls: Calls,
        kv_cache_dtype: str = "auto", max_views: int, max_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.calls = calls
        self.max_rows = max_rows
        self.block_size = block_size
        self.groups = group_leaves(flatten(tree))
        self.kv_cache_dtype = kv_cache_dtype
        self.max_views = max_views
        self._group_caches = [
            make_group_cache(leaves[0].spec, leaves, block_size=block_size, kv_cache_dtype=kv_cache_dtype)
            for leaves in self.groups
        ]
        self.pools = [cache.pool for cache in self._group_caches]
        views = {leaf: view for cache in self._group_caches for leaf, view in cache.views.items()}
        self._caches: list[LayerCache | CacheList] = [
            CacheList(*(views[leaf] for leaf in entry)) if isinstance(entry, tuple) else views[entry] for entry in tree
        ]
        self._selector = RowSelector(model)
        self._modules = attention_patch.install(model) if calls == "flat" else ()
        self._before: list[object] | None = None
        self.free_memory: Callable[[], int] | None = None
        """Bytes that pools may grow by; None: as much as they like."""

    def make_room(self, batch: InputBatch, limits: Sequence[int]) -> None:
        """Grow the pools so that the blocks of ``batch`` exist; never over ``limits`` (blocks, by group)."""
        for group, (pool, limit) in enumerate(zip(self.pools, limits, strict=True)):
            highest = max(max(scheduled.block_tables[group], default=-1) for scheduled in batch.scheduled_requests)
            if highest >= pool.num_blocks:
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
        for pool, limit, moved in zip(self.pools, limits, moves, strict=True):
            if pool.num_blocks > limit:
                pool.shrink(limit, moved)
        clear_cache()

    def forward(self, batch: InputBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`engine.runner.backends.Backend`. Blocks must be within the pools."""
        self._before = [pool.snapshot() for pool in self.pools]
        if self.calls == "flat" and (self.max_rows is None or batch.num_rows <= self.max_rows):
            rows = np.concatenate(
                [first + local for first, local in zip(batch.first_rows, wanted, strict=True)], dtype=np.int32
            )
            return self._call(batch, tokens[:, None], None if len(rows) == batch.num_rows else rows, flat=True)
        decodes = [i for i, scheduled in enumerate(batch.scheduled_requests) if self._decodes(scheduled)]
        logits: dict[int, mx.array] = {}
        size = self.max_rows or max(1, len(decodes))
        for some_decodes in (decodes[i : i + size] for i in range(0, len(decodes), size)):
            index = mx.array([batch.first_rows[i] for i in some_decodes])
            found = self._call(batch.part(some_decodes), tokens[index][:, None], None)
            logits |= {i: found[row : row + 1] for row, i in enumerate(some_decodes)}
        for i in sorted(range(len(batch.scheduled_requests)), key=lambda i: batch.order[i]):
            if i not in logits:
                some = tokens[batch.first_rows[i] : batch.first_rows[i] + batch.scheduled_requests[i].num_tokens]
                logits[i] = self._call(batch.part([i]), some[None], wanted[i])
        return join_rows(logits, wanted)

    def settle(self) -> None:
        """Give up :meth:`undo`: pages that are still referred to would be copied, not written in place."""
        self._before = None

    def undo(self) -> bool:
        """See :class:`engine.runner.backends.Backend`."""
        if self._before is None:
            return False
        for pool, snapshot in zip(self.pools, self._before, strict=True):
            pool.restore(snapshot)
        self._before = None
        return True

    def reset(self) -> None:
        """Empty pools, which grow again when used."""
        self.release()
        clear_cache()

    def barrier(self) -> list[mx.array]:
        """Arrays that are known once the last call has written its memory."""
        return [array for pool in self.pools for array in pool.barrier()]

    def forget(self, request: Request) -> None:
        """Nothing to drop: pages and slots belong to the block pools."""

    def release(self) -> None:
        """Give the pools' memory back; they grow again when used."""
        self._before = None
        for pool in self.pools:
            pool.release()

    def close(self) -> None:
        """Release the pools, leave the model and its modules as they were."""
        self.release()
        self._selector.remove()
        attention_patch.remove(self._modules)
        self._modules = ()

    def _decodes(self, scheduled: ScheduledRequest) -> bool:
        """Whether a request joins the one call for decodes; a last bit of a prompt keeps its place in the schedule."""
        in_reply = scheduled.start >= scheduled.request.num_prompt_tokens
        return self.calls != "sequences" and scheduled.num_tokens == 1 and in_reply

    def _call(self, batch: InputBatch, tokens: mx.array, rows: Int32 | None, *, flat: bool = False) -> mx.array:
        """Logits [rows, V] of one call with token ids [T, 1] or [1, T]; ``rows`` None: of all."""
        for group, cache in enumerate(self._group_caches):
            cache.begin(batch, group, flat=flat, max_views=self.max_views)
        pick = None if rows is None else mx.array(rows)
        if pick is not None:
            self._selector.pick = (lambda hidden: hidden[pick]) if flat else (lambda hidden: hidden[:, pick])
        try:
            logits: mx.array = self.model(tokens, cache=self._caches)
        finally:
            self._selector.pick = None
            for cache in self._group_caches:
                cache.finish()
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if pick is None or logits.shape[0] == len(pick) else logits[pick]
