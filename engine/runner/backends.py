"""From token rows to logits, over pages or over mlx-lm's own contiguous caches.

Both answer the calls of :class:`Backend`, so the scheduler and the sampler see no difference.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.runner.kv.attention_patch import RowSelector
from engine.runner.kv.attention_path import AttentionPath
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kv_spec import ModelCaches


class Backend(Protocol):
    """What :class:`engine.runner.model_runner.ModelRunner` asks of KV memory and model together."""

    model: nn.Module
    paged: bool
    block_size: int

    @property
    def attention_paths(self) -> tuple[AttentionPath, ...]:
        """Which way each kind of layer takes, in the order of the plan's groups."""

    def forward(self, batch: InputBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """Logits [sum of wanted, V] of the ``wanted`` rows of each scheduled request, for token ids [T]. Lazy."""

    def forget(self, request: Request) -> None:
        """Drop what is kept outside the block pool for ``request``."""

    def make_room(self, batch: InputBatch, limits: Sequence[int]) -> None:
        """Have memory for the blocks of ``batch``; ``limits`` are the planned blocks, by group."""

    def resize(self, limits: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """Have no more than ``limits`` blocks, by group, after moving {old: new}; nothing may be in flight."""

    def blank(self, blocks: Sequence[Int32]) -> None:
        """Let ``blocks``, by group, which nobody holds, contain nothing that could be read with no weight and harm."""

    def barrier(self) -> list[mx.array]:
        """Arrays that are known once the last :meth:`forward` has written its memory."""

    def settle(self) -> None:
        """The last :meth:`forward` is about to be evaluated."""

    def undo(self) -> bool:
        """Take back the last :meth:`forward`, of which nothing was evaluated; False if that is impossible."""

    def reset(self) -> None:
        """Start from empty memory, after a failure."""

    def close(self) -> None:
        """Give all memory back and undo every change to the model's modules."""


class RowsInOrder:
    """The logits of a step, from calls in any order, in the order of its scheduled requests."""

    def __init__(self, wanted: Sequence[Int32]) -> None:
        self._counts = [len(rows) for rows in wanted]
        self._order: list[int] = []
        self._parts: list[mx.array] = []

    def add(self, indices: Sequence[int], logits: mx.array) -> None:
        """The ``logits`` [rows, V] of scheduled requests by index, each with as many rows as it wants."""
        self._order += indices
        if logits.shape[0]:
            self._parts.append(logits)

    def logits(self) -> mx.array:
        """All rows [sum of wanted, V]."""
        if not self._parts:
            return mx.zeros((0, 1))
        joined = self._parts[0] if len(self._parts) == 1 else mx.concatenate(self._parts)
        order = [index for index in self._order if self._counts[index]]
        if order == sorted(order):
            return joined
        ends = np.cumsum([self._counts[index] for index in order])
        rows = {index: np.arange(end - self._counts[index], end) for index, end in zip(order, ends, strict=True)}
        return joined[mx.array(np.concatenate([rows[index] for index in sorted(order)]).astype(np.int32))]


class ContiguousBackend:
    """mlx-lm's own caches: one set per request while it prefills, merged for the requests that decode.

    ``batches`` False keeps them apart: some models take no batch of different lengths. ``why``: what a user is told
    of why there are no pages.
    """

    paged = False
    block_size = 16

    def __init__(self, model: nn.Module, why: str = "") -> None:
        self.model = model
        self.batches = True
        groups = ModelCaches(model).groups(self.block_size, 1, paged=False)
        self.attention_paths = tuple(AttentionPath.of_group(group, "contiguous", why) for group in groups)
        self._own: dict[Request, list[Any]] = {}
        self._batch: list[Request] = []
        self._batch_caches: list[Any] = []
        self._selector = RowSelector(model)

    def forward(self, batch: InputBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`Backend`: one call for all decodes, one for each prefill chunk."""
        decoding = [i for i, scheduled in enumerate(batch.scheduled_requests) if self._decodes(scheduled)]
        found = RowsInOrder(wanted)
        if decoding:
            rows = [batch.first_rows[i] for i in decoding]
            requests = [batch.scheduled_requests[i].request for i in decoding]
            found.add(decoding, self._decode(requests, tokens[mx.array(rows)]))
        for i, scheduled in enumerate(batch.scheduled_requests):
            if i not in decoding:
                some = tokens[batch.first_rows[i] : batch.first_rows[i] + scheduled.num_tokens]
                found.add([i], self._prefill(scheduled.request, scheduled.start, some, wanted[i]))
        return found.logits()

    def forget(self, request: Request) -> None:
        """Drop the request's caches."""
        self._own.pop(request, None)
        if request in self._batch:
            self._keep([other for other in self._batch if other is not request])

    def make_room(self, batch: InputBatch, limits: Sequence[int]) -> None:
        """mlx-lm's caches grow by themselves."""

    def resize(self, limits: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """Blocks are bookkeeping here."""

    def blank(self, blocks: Sequence[Int32]) -> None:
        """No cache is used again."""

    def barrier(self) -> list[mx.array]:
        """Chunks are computed as they come: nothing to wait for."""
        return []

    def settle(self) -> None:
        """Nothing can be undone here, so nothing is kept for it."""

    def undo(self) -> bool:
        """See :class:`Backend`."""
        return False

    def reset(self) -> None:
        """Drop all caches."""
        self._own, self._batch, self._batch_caches = {}, [], []

    def close(self) -> None:
        """Drop all caches, leave the model as it was."""
        self.reset()
        self._selector.remove()

    def _decodes(self, scheduled: ScheduledRequest) -> bool:
        """Whether a request joins the batch: it stays there, so a chunk of one token before others does not."""
        request = scheduled.request
        mergeable = request in self._batch or (
            self.batches and request in self._own and all(hasattr(cache, "merge") for cache in self._own[request])
        )
        return scheduled.num_tokens == 1 and scheduled.samples and mergeable

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
