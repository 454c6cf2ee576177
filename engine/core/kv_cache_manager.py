"""KV memory of sequences: prefix hits and one admission decision over all groups of layers."""

import math
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.core.block_pool import BlockPool
from engine.core.cache_groups import KVCacheGroup, make_cache_group
from engine.core.request import Request
from engine.core.state_group import StateGroup
from engine.memory.cache_spec import KVCacheSpec


class KVCacheManager:
    """All groups together: a request is admitted where every group has room."""

    def __init__(self, groups: Sequence[KVCacheGroup]) -> None:
        self.groups = tuple(groups)
        self._boundary = math.lcm(*(group.block_size for group in self.groups))
        self.granularity = math.gcd(*(group.block_size for group in self.groups))
        """Only at multiples of so many tokens does a sequence need a block, or fill one."""
        self._pages = [group for group in self.groups if not group.recurrent]
        self._states = [group for group in self.groups if isinstance(group, StateGroup)]
        self._moving = [group for group in self.groups if group.moves_on]

    @classmethod
    def of_specs(cls, planned: Iterable[tuple[KVCacheSpec, int]], *, enable_caching: bool) -> Self:
        """Planned groups, each with its number of blocks."""
        return cls(
            [make_cache_group(spec, BlockPool(number, enable_caching=enable_caching)) for spec, number in planned]
        )

    def num_cached_tokens(self, request: Request) -> int:
        """Leading tokens that every group could reuse. Requests for prompt logprobs reuse none that give one.

        Groups of states then know where to take checkpoints while ``request`` runs.
        """
        limit = request.num_tokens - 1  # the last token is always left to compute
        if request.params.prompt_logprobs is not None:
            limit = min(limit, request.scored_from - 1)  # a token's logprob comes from the one before it
        if limit <= 0 or request.traceless:
            return 0
        shared = self._common_prefix(request, limit, self._pages)
        cached = self._common_prefix(request, shared, self.groups) if self._states else shared
        for group in self._states:
            group.choose_checkpoints(request, cached, shared, self._boundary)
        return cached

    @staticmethod
    def _common_prefix(request: Request, limit: int, groups: Sequence[KVCacheGroup]) -> int:
        while True:
            found = limit
            for group in groups:
                found = group.num_cached_tokens(request, found)
            if found == limit or found == 0:
                return found
            limit = found  # a group that could do with less may now find less

    @property
    def moves_on(self) -> bool:
        """Whether :meth:`free_out_of_window` ever frees anything."""
        return bool(self._moving)

    def free_out_of_window(self, request: Request) -> None:
        """Free what the next token of ``request`` no longer needs."""
        for group in self._moving:
            group.free_out_of_window(request)

    def allocate(self, request: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Cover the first ``num_tokens`` tokens in all groups, or change nothing and say False."""
        for group in self.groups:
            if not group.pool.can_allocate(group.num_blocks_needed(request, num_tokens, num_cached)):
                return False
        for group in self.groups:
            group.allocate(request, num_tokens, num_cached)
        return True

    def chunk_end(self, request: Request, end: int) -> int:
        """Where the next chunk should end, at most ``end``: a group may want to keep what is there then."""
        for group in self._states:
            end = group.chunk_end(request, end)
        return end

    def fork(self, parent: Request, child: Request) -> int:
        """Share the parent's prompt with ``child``, but for its last token; gives the tokens shared."""
        num_tokens = (child.num_prompt_tokens - 1) // self._boundary * self._boundary
        if not all(group.can_fork(parent, num_tokens) for group in self.groups):
            return 0
        for group in self.groups:
            group.fork(parent, child, num_tokens)
        return num_tokens

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Make computed full blocks findable; there is nothing to do before ``granularity`` tokens more."""
        known = min(num_tokens, len(request.all_token_ids))
        request.num_findable_tokens = max(request.num_findable_tokens, known // self.granularity * self.granularity)
        if request.traceless:
            return
        for group in self.groups:
            group.cache_blocks(request, num_tokens)

    def free(self, request: Request) -> None:
        """Take everything back; safe to call twice."""
        request.num_findable_tokens = 0
        for group in self.groups:
            group.free(request)

    def block_tables(self, request: Request) -> tuple[Sequence[int], ...]:
        """One block table per group."""
        if len(self.groups) == 1:
            return (self.groups[0].block_table(request),)
        return tuple([group.block_table(request) for group in self.groups])

    def reset_prefix_cache(self) -> None:
        """Forget cached contents, for example after a step that failed."""
        for group in self.groups:
            group.pool.reset_cache()

    def free_blocks(self) -> list[NDArray[np.int32]]:
        """The blocks that no sequence holds, by group, cached ones included."""
        states = (group.pool.states() for group in self.groups)
        return [np.flatnonzero(some < BlockPool.HELD).astype(np.int32) for some in states]

    @property
    def usage(self) -> float:
        """Share of the fullest pool that sequences hold, 0 to 1."""
        return max(group.pool.num_held_blocks / group.pool.num_blocks for group in self.groups)
