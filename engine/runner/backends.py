"""From token rows to logits, over pages or over mlx-lm's own contiguous caches.

Both answer the same three calls, so the scheduler and the sampler know no difference.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from engine.request import Request
from engine.runner import attention_seam
from engine.runner.attention_seam import RowSelector
from engine.runner.kv_spec import LayerShape
from engine.runner.paged_cache import KVPool, PagedLayerCache, StepLayout
from engine.runner.step_batch import Int32, StepBatch


class Backend(Protocol):
    """What :class:`engine.runner.model_runner.ModelRunner` asks of KV memory and model together."""

    paged: bool

    def forward(self, batch: StepBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """Logits [sum of wanted, V] of the ``wanted`` rows of each share, for token ids [T]. Lazy."""

    def forget(self, request: Request) -> None:
        """Drop what is kept outside the block pool for ``request``."""

    def settle(self) -> None:
        """The last :meth:`forward` is about to be evaluated."""

    def undo(self) -> bool:
        """Take back the last :meth:`forward`, of which nothing was evaluated; False if that is impossible."""

    def reset(self) -> None:
        """Start from empty memory, after a failure."""

    def close(self) -> None:
        """Give all memory back and undo every change to the model's modules."""


class PagedBackend:
    """One pass over the weights per step, KV in pages."""

    paged = True

    def __init__(self, model: nn.Module, layers: Sequence[LayerShape], block_size: int, *,
                 kv_dtype: mx.Dtype | None = None, prefer_views: bool) -> None:  # fmt: skip
        self.model = model
        self.pool = KVPool(layers, block_size, kv_dtype)
        self._caches = [PagedLayerCache(self.pool, i) for i in range(len(layers))]
        self._prefer_views = prefer_views
        self._selector = RowSelector(model)
        self._modules = attention_seam.install(model)
        self._before: tuple[list[mx.array], list[mx.array]] | None = None

    def forward(self, batch: StepBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`Backend`. Blocks must be within the pool."""
        # Copies of the handles, not of the pages: writing changes an array object in place.
        self._before = ([copy(page) for page in self.pool.keys], [copy(page) for page in self.pool.values])
        layout = StepLayout(batch, self.pool.block_size, prefer_views=self._prefer_views)
        for cache in self._caches:
            cache.layout = layout
        rows = np.concatenate(
            [first + local for first, local in zip(batch.first_rows, wanted, strict=True)], dtype=np.int32
        )
        pick = None if len(rows) == batch.num_rows else mx.array(rows)
        self._selector.pick = None if pick is None else (lambda hidden: hidden[pick])
        try:
            logits: mx.array = self.model(tokens[:, None], cache=self._caches)[:, 0]
        finally:
            self._selector.pick = None
            for cache in self._caches:
                cache.layout = None
        return logits if pick is None or logits.shape[0] == len(rows) else logits[pick]

    def settle(self) -> None:
        """Give up :meth:`undo`: pages that are still referred to would be copied, not written in place."""
        self._before = None

    def undo(self) -> bool:
        """See :class:`Backend`."""
        if self._before is None:
            return False
        self.pool.keys, self.pool.values = self._before
        self._before = None
        return True

    def reset(self) -> None:
        """Empty pages of the same number."""
        self._before = None
        num_blocks = self.pool.num_blocks
        self.pool.release()
        self.pool.grow(num_blocks)

    def forget(self, request: Request) -> None:
        """Pages belong to the block pool: nothing to drop."""

    def close(self) -> None:
        """Release the pages, unwrap the attention."""
        self._before = None
        self.pool.release()
        attention_seam.remove(self._modules)
        self._modules = ()


class ContiguousBackend:
    """mlx-lm's own caches: one set per request while it prefills, merged for the requests that decode."""

    paged = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own: dict[Request, list[Any]] = {}
        self._batch: list[Request] = []
        self._batch_caches: list[Any] = []
        self._selector = RowSelector(model)

    def forward(self, batch: StepBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`Backend`: one call for all decodes, one for each prefill chunk."""
        decoding = [i for i, share in enumerate(batch.shares) if self._decodes(share.request, share.num_tokens)]
        logits: dict[int, mx.array] = {}
        if decoding:
            rows = [batch.first_rows[i] for i in decoding]
            requests = [batch.shares[i].request for i in decoding]
            found = self._decode(requests, tokens[mx.array(rows)])
            logits = {index: found[row : row + 1] for row, index in enumerate(decoding)}
        for i, share in enumerate(batch.shares):
            if i not in logits:
                some = tokens[batch.first_rows[i] : batch.first_rows[i] + share.num_tokens]
                logits[i] = self._prefill(share.request, share.start, some, wanted[i])
            elif not len(wanted[i]):
                del logits[i]
        parts = [logits[i] for i in sorted(logits) if len(wanted[i])]
        return mx.concatenate(parts, axis=0) if parts else mx.zeros((0, 1))

    def forget(self, request: Request) -> None:
        """Drop the request's caches."""
        self._own.pop(request, None)
        if request in self._batch:
            self._keep([other for other in self._batch if other is not request])

    def settle(self) -> None:
        """Nothing can be undone here, so nothing is kept for it."""

    def undo(self) -> bool:
        """See :class:`Backend`."""
        return False

    def reset(self) -> None:
        """Drop all caches."""
        self.close()

    def close(self) -> None:
        """Drop all caches."""
        self._own, self._batch, self._batch_caches = {}, [], []

    def _decodes(self, request: Request, num_tokens: int) -> bool:
        mergeable = request in self._batch or (
            request in self._own and all(hasattr(cache, "merge") for cache in self._own[request])
        )
        return num_tokens == 1 and mergeable

    def _prefill(self, request: Request, start: int, tokens: mx.array, wanted: Int32) -> mx.array:
        if start == 0:
            self._own[request] = make_prompt_cache(self.model)
        pick = mx.array(wanted)
        self._selector.pick = lambda hidden: hidden[:, pick]
        try:
            logits: mx.array = self.model(tokens[None], cache=self._own[request])[0]
        finally:
            self._selector.pick = None
        # Chunks are computed now, in order: a lazy chain of them would hold every activation.
        mx.async_eval(logits, [cache.state for cache in self._own[request]])  # type: ignore[no-untyped-call]
        return logits if logits.shape[0] == len(wanted) else logits[pick]

    def _decode(self, requests: list[Request], tokens: mx.array) -> mx.array:
        if set(requests) != set(self._batch):
            self._keep([request for request in self._batch if request in requests])
            self._join([request for request in requests if request not in self._batch])
        order = [requests.index(request) for request in self._batch]
        logits: mx.array = self.model(tokens[mx.array(order)][:, None], cache=self._batch_caches)[:, -1]
        back = np.argsort(np.array(order)).astype(np.int32)
        return logits[mx.array(back)]

    def _keep(self, requests: list[Request]) -> None:
        """Take the other requests out of the batch, each with its own caches again unless it is over."""
        for row, request in enumerate(self._batch):
            if request not in requests and not request.finished and request.num_computed_tokens:
                self._own[request] = [cache.extract(row) for cache in self._batch_caches]
        rows = [self._batch.index(request) for request in requests]
        self._batch = requests
        if not rows:
            self._batch_caches = []
        for cache in self._batch_caches:
            cache.filter(mx.array(rows))

    def _join(self, requests: list[Request]) -> None:
        if not requests:
            return
        owned = [self._own.pop(request) for request in requests]
        merged = [caches[0].merge(list(caches)) for caches in zip(*owned, strict=True)]
        if self._batch:
            for cache, other in zip(self._batch_caches, merged, strict=True):
                cache.extend(other)
        else:
            self._batch_caches = merged
        self._batch = [*self._batch, *requests]
