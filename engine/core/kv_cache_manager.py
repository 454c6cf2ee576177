"""KV memory of sequences: block tables, prefix hits, one admission decision over all groups.

A *group* is the set of layers that need the same kind of memory for a sequence: pages for all
tokens, pages for a window of them, or one slot for a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.core.block_pool import Block, BlockHash, BlockPool, hash_block
from engine.request import Request

RUN_ROOM_TOKENS = 512
"""How much room to grow a new sequence looks for, so that its blocks stay in one run."""


class KVCacheGroup(Protocol):
    """What the manager asks of a group of layers."""

    pool: BlockPool
    block_size: int

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """Most leading tokens, up to ``limit``, that this group could reuse (a multiple of its block size)."""

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """Free blocks that :meth:`allocate` would take, counting those it must wake from the cache."""

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Give ``request`` blocks for its first ``num_tokens`` tokens, ``num_cached`` of them reused."""

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks within the first ``num_tokens`` tokens findable."""

    def free(self, request: Request) -> None:
        """Take back everything that ``request`` holds."""

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Whether ``parent`` still holds what follows its first ``num_tokens`` tokens needs."""

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Share what the parent's first ``num_tokens`` tokens left with ``child``."""

    def block_table(self, request: Request) -> list[int]:
        """Block numbers of ``request`` in order."""


@dataclass(slots=True)
class _Sequence:
    """What a request holds: blocks in order, the hashes known so far, the room kept for growth."""

    blocks: list[Block | None] = field(default_factory=list)
    """None where a window has left its block behind."""
    hashes: list[BlockHash] = field(default_factory=list)
    num_registered: int = 0
    reserved: range = range(0)


class FullAttentionGroup:
    """A page for every token."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._sequences: dict[Request, _Sequence] = {}

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """Longest cached prefix in whole blocks."""
        count = 0
        while (count + 1) * self.block_size <= limit and self._cached_block(request, count) is not None:
            count += 1
        return count * self.block_size

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """New blocks, plus cached ones that leave the free ones when shared."""
        needed = -(-num_tokens // self.block_size)
        held = self._sequences.get(request)
        if held is not None and held.blocks:
            return max(0, needed - len(held.blocks))
        prefix = self._prefix(request, num_cached)
        waking = sum(block is not None and block.ref_count == 0 for block in prefix)
        return needed - len(prefix) + waking

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Share the cached prefix first, then take new blocks, in a run where possible."""
        sequence = self._sequences.setdefault(request, _Sequence())
        if not sequence.blocks and num_cached:
            sequence.blocks = self._prefix(request, num_cached)
            self.pool.share(_present(sequence.blocks))
            sequence.num_registered = len(sequence.blocks)
        missing = -(-num_tokens // self.block_size) - len(sequence.blocks)
        if missing > 0:
            self._extend(request, sequence, missing)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Register full blocks of known tokens under their chained hashes."""
        sequence = self._sequences.get(request)
        if sequence is None or not self.pool.enable_caching:
            return
        num_full = min(num_tokens, len(request.all_token_ids)) // self.block_size
        hashes = self._hashes(request, sequence, num_full)
        for i in range(sequence.num_registered, num_full):
            block = sequence.blocks[i]
            if block is not None:
                self.pool.cache(block, hashes[i], self._tokens(request, i))
        sequence.num_registered = max(sequence.num_registered, num_full)

    def free(self, request: Request) -> None:
        """Let go of the blocks and of the room kept for growth."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.pool.release(sequence.reserved)
            self.pool.free(_present(sequence.blocks))

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Whether all blocks of the first ``num_tokens`` tokens are held."""
        return None not in self._sequences[parent].blocks[: num_tokens // self.block_size]

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Share the blocks of the parent's first ``num_tokens`` tokens."""
        source, count = self._sequences[parent], num_tokens // self.block_size
        shared = source.blocks[:count]
        self.pool.share(_present(shared))
        self._sequences[child] = _Sequence(shared, source.hashes[:count], min(source.num_registered, count))

    def block_table(self, request: Request) -> list[int]:
        """Block numbers of ``request`` in order; 0 for those left behind, which nobody reads."""
        return [0 if block is None else block.block_id for block in self._sequences[request].blocks]

    def _prefix(self, request: Request, num_tokens: int) -> list[Block | None]:
        """The cached blocks of the first ``num_tokens`` tokens."""
        return [self._cached_block(request, i) for i in range(num_tokens // self.block_size)]

    def _extend(self, request: Request, sequence: _Sequence, missing: int) -> None:
        last = sequence.blocks[-1].block_id if sequence.blocks and sequence.blocks[-1] is not None else None
        room = self._room(request, len(sequence.blocks) + missing)
        taken = self.pool.allocate(missing, after=last, room=room)
        sequence.blocks = [*sequence.blocks, *taken]
        end = taken[-1].block_id + 1
        if end not in sequence.reserved:
            self.pool.release(sequence.reserved)
            sequence.reserved = self.pool.reserve(end, room)

    def _room(self, request: Request, num_blocks: int) -> int:
        """Blocks that the sequence may still want, within reason."""
        longest = request.num_prompt_tokens + request.max_tokens
        wanted = -(-longest // self.block_size) - num_blocks
        return max(0, min(wanted, RUN_ROOM_TOKENS // self.block_size))

    def _cached_block(self, request: Request, index: int) -> Block | None:
        if not self.pool.enable_caching:
            return None
        sequence = self._sequences.setdefault(request, _Sequence())
        block_hash = self._hashes(request, sequence, index + 1)[index]
        return self.pool.find_cached(block_hash, self._tokens(request, index))

    def _tokens(self, request: Request, index: int) -> list[int]:
        return request.all_token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _hashes(self, request: Request, sequence: _Sequence, count: int) -> list[BlockHash]:
        hashes = sequence.hashes
        while len(hashes) < count:
            tokens = self._tokens(request, len(hashes))
            hashes.append(hash_block(hashes[-1] if hashes else None, tokens, request.cache_salt))
        return hashes


class SlidingWindowGroup(FullAttentionGroup):
    """Pages of the last ``window`` tokens; those behind it are let go, also while a long prompt runs.

    A prefix is cached for this group if the blocks of the window before its end are.
    """

    def __init__(self, pool: BlockPool, block_size: int, window: int) -> None:
        super().__init__(pool, block_size)
        self.window = window

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """Longest prefix before whose end a window is cached, from the back."""
        found = 0
        for index in range(limit // self.block_size - 1, -1, -1):
            if self._cached_block(request, index) is None:
                found = 0
                continue
            found += 1
            end = (index + found) * self.block_size
            if index <= self._first_block(end):
                return end
        return 0

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """As for full attention, after letting go of what the next token no longer sees."""
        self.leave_behind(request)
        super().allocate(request, num_tokens, num_cached)

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """As for full attention, after letting go of what the next token no longer sees."""
        self.leave_behind(request)
        return super().num_blocks_needed(request, num_tokens, num_cached)

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Whether the blocks of the window before the fork are held."""
        first = self._first_block(num_tokens)
        return None not in self._sequences[parent].blocks[first : num_tokens // self.block_size]

    def leave_behind(self, request: Request) -> None:
        """Free the blocks that lie wholly before the window of the next token to compute."""
        sequence = self._sequences.get(request)
        if sequence is None:
            return
        first = min(self._first_block(request.num_computed_tokens), len(sequence.blocks))
        behind = [block for block in sequence.blocks[:first] if block is not None]
        if behind:
            self.pool.free(behind)
            sequence.blocks = [*[None] * first, *sequence.blocks[first:]]

    def _prefix(self, request: Request, num_tokens: int) -> list[Block | None]:
        first = self._first_block(num_tokens)
        return [*[None] * first, *super()._prefix(request, num_tokens)[first:]]

    def _first_block(self, num_tokens: int) -> int:
        """The first block that the token at position ``num_tokens`` sees."""
        return max(0, num_tokens - self.window + 1) // self.block_size


class StateGroup:
    """One slot per sequence, whatever its length: the running state of recurrent layers.

    A state stands for all tokens before it and for no fewer, so prefixes and forks are not reused.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._slots: dict[Request, list[Block]] = {}

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """None."""
        return 0

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """A slot for a sequence that begins."""
        return 0 if request in self._slots else 1

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Take a slot for a sequence that begins."""
        if request not in self._slots:
            self._slots[request] = self.pool.allocate(1)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """States are not kept."""

    def free(self, request: Request) -> None:
        """Let go of the slot."""
        self.pool.free(self._slots.pop(request, []))

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Only before the first token."""
        return num_tokens == 0

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Nothing to share."""

    def block_table(self, request: Request) -> list[int]:
        """The slot's number."""
        return [block.block_id for block in self._slots[request]]


def _present(blocks: Sequence[Block | None]) -> list[Block]:
    return [block for block in blocks if block is not None]


class KVCacheManager:
    """All groups together: a request is admitted where every group has room."""

    def __init__(self, groups: Sequence[KVCacheGroup]) -> None:
        self.groups = tuple(groups)

    def num_cached_tokens(self, request: Request) -> int:
        """Leading tokens that every group could reuse. Requests for prompt logprobs reuse none."""
        if request.params.prompt_logprobs is not None:
            return 0
        limit = request.num_tokens - 1  # the last token is always left to compute
        while True:
            found = limit
            for group in self.groups:
                found = group.num_cached_tokens(request, found)
            if found == limit or found == 0:
                return found
            limit = found  # a group that could do with less may now find less

    def allocate(self, request: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Cover the first ``num_tokens`` tokens in all groups, or change nothing and say False."""
        for group in self.groups:
            if not group.pool.can_allocate(group.num_blocks_needed(request, num_tokens, num_cached)):
                return False
        for group in self.groups:
            group.allocate(request, num_tokens, num_cached)
        return True

    def fork(self, parent: Request, child: Request) -> int:
        """Share the parent's prompt with ``child``, but for its last token; gives the tokens shared."""
        size = max(group.block_size for group in self.groups)
        num_tokens = (child.num_prompt_tokens - 1) // size * size
        if not all(group.can_fork(parent, num_tokens) for group in self.groups):
            return 0
        for group in self.groups:
            group.fork(parent, child, num_tokens)
        return num_tokens

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Make computed full blocks findable."""
        for group in self.groups:
            group.cache_blocks(request, num_tokens)

    def free(self, request: Request) -> None:
        """Take everything back; safe to call twice."""
        for group in self.groups:
            group.free(request)

    def block_tables(self, request: Request) -> tuple[list[int], ...]:
        """One block table per group."""
        return tuple(group.block_table(request) for group in self.groups)

    def reset_prefix_cache(self) -> None:
        """Forget cached contents, for example after a step that failed."""
        for group in self.groups:
            group.pool.reset_cache()

    @property
    def usage(self) -> float:
        """Share of the fullest pool that sequences hold, 0 to 1."""
        return max(group.pool.num_held_blocks / group.pool.num_blocks for group in self.groups)
