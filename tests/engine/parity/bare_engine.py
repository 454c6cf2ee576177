"""Scheduler and runner around a model object: no tokenizer, no thread, small pools."""

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.generate import generate_step

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import FullAttentionGroup, KVCacheGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.state_group import StateGroup
from engine.memory.cache_spec import SlidingWindowSpec, StateSpec
from engine.params.sampling_params import SamplingParams
from engine.runner.device.devices import describe_device
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.kv_spec import num_logits
from engine.runner.model_runner import ModelRunner
from engine.runner.paged_backend import PagedBackend
from engine.runner.warm_up import choose_backend

BLOCK_SIZE = 8


class BareEngine:
    """Greedy generation through the real scheduler, caches and runner, one step in flight."""

    def __init__(
        self,
        model: Any,
        *,
        paged: bool = True,
        max_views: int | None = None,
        max_rows: int | None = None,
        kv_cache_dtype: str = "auto",
        kernels: AttentionKernels | None = None,
    ) -> None:
        self.vocab_size = num_logits(model)
        self.backend, self.note = choose_backend(
            model, paged=paged, block_size=BLOCK_SIZE, kv_cache_dtype=kv_cache_dtype, device=describe_device().kind,
            vocab_size=self.vocab_size, kernels=kernels,
        )  # fmt: skip
        if isinstance(self.backend, PagedBackend):
            self.backend.max_views = self.backend.max_views if max_views is None else max_views
            self.backend.max_rows = max_rows or self.backend.max_rows
        self.start()

    def start(self, *, num_blocks: int = 400, chunk: int = 512, caching: bool = True, num_seqs: int = 40) -> Self:
        """Empty caches and pools of a chosen size."""
        caching = caching and self.backend.paged
        groups: list[KVCacheGroup] = []
        for spec in (
            [each[0].spec for each in self.backend.groups] if isinstance(self.backend, PagedBackend) else [None]
        ):
            if isinstance(spec, StateSpec):
                groups.append(StateGroup(BlockPool(num_seqs + 8, enable_caching=caching), BLOCK_SIZE, min_tokens=8))
            elif isinstance(spec, SlidingWindowSpec):
                pool = BlockPool(num_blocks, enable_caching=caching)
                groups.append(SlidingWindowGroup(pool, BLOCK_SIZE, spec.window))
            else:
                groups.append(FullAttentionGroup(BlockPool(num_blocks, enable_caching=caching), BLOCK_SIZE))
        kv = KVCacheManager(groups)
        self.scheduler = Scheduler(kv, max_num_seqs=num_seqs, max_num_batched_tokens=chunk)
        self.runner = ModelRunner(self.backend, self.vocab_size, max_blocks=[g.pool.num_blocks for g in groups])
        return self

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, n: int = 1) -> list[Request]:
        """All requests at once; blocks must all come back."""
        requests = []
        params = SamplingParams(temperature=0, max_tokens=num_tokens)
        for number, prompt in enumerate(prompts):
            parent = None
            for index in range(n):
                request = Request(str(number), list(prompt), params, max_tokens=num_tokens, index=index)
                self.scheduler.add(request, fork_of=parent if self.backend.paged else None)
                requests.append(request)
                parent = parent or request
        in_flight = None
        while self.scheduler.has_work or in_flight is not None:
            scheduled = self.scheduler.schedule()
            following = self.runner.execute(scheduled) if scheduled.scheduled_requests else None
            if following is not None:
                following.submit()
            if in_flight is not None:
                for token in in_flight.read(str).tokens:
                    if self.scheduler.update(token.scheduled, token.token_id) is not None:
                        self.runner.forget(token.scheduled.request)
            in_flight = following
        for group in self.scheduler.kv.groups:
            group.pool.check()
            assert group.pool.num_held_blocks == 0
        return requests


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The oracle."""
    return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=num_tokens)]
