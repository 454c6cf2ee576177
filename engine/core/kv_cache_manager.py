"""KV memory of sequences: block tables, prefix hits, one admission decision over all groups.

A *group* is the set of layers that need the same kind of memory for a sequence (full attention
here; sliding windows, state slots and latent pages join as further classes with the same methods).
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

    def num_cached_tokens(self, request: Request) -> int:
        """Leading tokens of ``request`` that this group could reuse (a multiple of its block size)."""

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """Free blocks that :meth:`allocate` would take, counting those it must wake from the cache."""

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Give ``request`` blocks for its first ``num_tokens`` tokens, ``num_cached`` of them reused."""

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks within the first ``num_tokens`` tokens findable."""

    def free(self, request: Request) -> None:
        """Take back everything that ``request`` holds."""

    def fork(self, parent: Request, child: Request) -> int:
        """Share the parent's full prompt blocks with ``child``; gives the tokens they cover."""

    def block_table(self, request: Request) -> list[int]:
        """Block numbers of ``request`` in order."""


@dataclass(slots=True)
class _Sequence:
    """What a request holds: blocks in order, the hashes known so far, the room kept for growth."""

    blocks: list[Block] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_registered: int = 0
    reserved: range = range(0)


class FullAttentionGroup:
    """A page for every token."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._sequences: dict[Request, _Sequence] = {}

    def num_cached_tokens(self, request: Request) -> int:
        """Longest cached prefix, whole blocks only; the last token is always left to compute."""
        return len(self._find_prefix(request)) * self.block_size

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """New blocks, plus cached ones that leave the free queue when shared."""
        needed = -(-num_tokens // self.block_size)
        held = self._sequences.get(request)
        if held is not None and held.blocks:
            return max(0, needed - len(held.blocks))
        prefix = self._find_prefix(request)[: num_cached // self.block_size]
        return needed - len(prefix) + sum(block.ref_count == 0 for block in prefix)

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Share the cached prefix first, then take new blocks, in a run where possible."""
        sequence = self._sequences.setdefault(request, _Sequence())
        if not sequence.blocks and num_cached:
            prefix = self._find_prefix(request)[: num_cached // self.block_size]
            self.pool.share(prefix)
            sequence.blocks = prefix
            sequence.num_registered = len(prefix)
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
            tokens = request.all_token_ids[i * self.block_size : (i + 1) * self.block_size]
            self.pool.cache(sequence.blocks[i], hashes[i], tokens)
        sequence.num_registered = max(sequence.num_registered, num_full)

    def free(self, request: Request) -> None:
        """Let go of the blocks and of the room kept for growth."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.pool.release(sequence.reserved)
            self.pool.free(sequence.blocks)

    def fork(self, parent: Request, child: Request) -> int:
        """Share the parent's full blocks that lie within the prompt, but for the last token."""
        source = self._sequences[parent]
        count = (child.num_prompt_tokens - 1) // self.block_size
        shared = source.blocks[:count]
        self.pool.share(shared)
        self._sequences[child] = _Sequence(shared, source.hashes[:count], min(source.num_registered, count))
        return count * self.block_size

    def block_table(self, request: Request) -> list[int]:
        """Block numbers of ``request`` in order."""
        return [block.block_id for block in self._sequences[request].blocks]

    def _extend(self, request: Request, sequence: _Sequence, missing: int) -> None:
        last = sequence.blocks[-1].block_id if sequence.blocks else None
        room = self._room(request, len(sequence.blocks) + missing)
        sequence.blocks = sequence.blocks + self.pool.allocate(missing, after=last, room=room)
        end = sequence.blocks[-1].block_id + 1
        if end not in sequence.reserved:
            self.pool.release(sequence.reserved)
            sequence.reserved = self.pool.reserve(end, room)

    def _room(self, request: Request, num_blocks: int) -> int:
        """Blocks that the sequence may still want, within reason."""
        longest = request.num_prompt_tokens + request.max_tokens
        wanted = -(-longest // self.block_size) - num_blocks
        return max(0, min(wanted, RUN_ROOM_TOKENS // self.block_size))

    def _find_prefix(self, request: Request) -> list[Block]:
        if not self.pool.enable_caching:
            return []
        sequence = self._sequences.setdefault(request, _Sequence())
        limit = (request.num_tokens - 1) // self.block_size
        found: list[Block] = []
        for i in range(limit):
            block_hash = self._hashes(request, sequence, i + 1)[i]
            tokens = request.all_token_ids[i * self.block_size : (i + 1) * self.block_size]
            block = self.pool.find_cached(block_hash, tokens)
            if block is None:
                break
            found.append(block)
        return found

    def _hashes(self, request: Request, sequence: _Sequence, count: int) -> list[BlockHash]:
        hashes = sequence.hashes
        while len(hashes) < count:
            start = len(hashes) * self.block_size
            tokens = request.all_token_ids[start : start + self.block_size]
            hashes.append(hash_block(hashes[-1] if hashes else None, tokens, request.cache_salt))
        return hashes


class KVCacheManager:
    """All groups together: a request is admitted where every group has room."""

    def __init__(self, groups: Sequence[KVCacheGroup]) -> None:
        self.groups = tuple(groups)

    def num_cached_tokens(self, request: Request) -> int:
        """Leading tokens that every group could reuse. Requests for prompt logprobs reuse none."""
        if request.params.prompt_logprobs is not None:
            return 0
        return min(group.num_cached_tokens(request) for group in self.groups)

    def allocate(self, request: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Cover the first ``num_tokens`` tokens in all groups, or change nothing and say False."""
        for group in self.groups:
            if not group.pool.can_allocate(group.num_blocks_needed(request, num_tokens, num_cached)):
                return False
        for group in self.groups:
            group.allocate(request, num_tokens, num_cached)
        return True

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a lone sequence of ``num_tokens`` tokens fits."""
        return all(-(-num_tokens // group.block_size) <= group.pool.num_blocks for group in self.groups)

    def fork(self, parent: Request, child: Request) -> int:
        """Share the parent's prompt with ``child``; gives the tokens that need no computing."""
        return min(group.fork(parent, child) for group in self.groups)

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
