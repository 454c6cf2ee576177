"""Kinds of KV memory, as bookkeeping: which blocks a sequence holds in a group of layers, and which can be reused.

Pages of all tokens (:class:`FullAttentionGroup`) or of a window of them (:class:`SlidingWindowGroup`);
states are in :mod:`engine.core.state_group`.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import ClassVar, Protocol

from engine.core.block_pool import Block, BlockHash, BlockPool, hash_block
from engine.core.request import Request
from engine.memory.cache_spec import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

RUN_ROOM_TOKENS = 512
"""How much room to grow a new sequence looks for, so that its blocks stay in one run."""
GENERATION_PROMPT_TOKENS = 8
"""The last tokens of a prompt open the reply, often with a thought that later turns leave out: the next turn of a
chat shares what lies before them."""


class KVCacheGroup(Protocol):
    """What the manager asks of a group of layers."""

    recurrent: ClassVar[bool]
    """Whether prefixes are reused from checkpoints only, which are chosen when a request begins."""
    moves_on: ClassVar[bool]
    """Whether :meth:`free_out_of_window` ever frees anything."""
    pool: BlockPool
    block_size: int

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """Most leading tokens, up to ``limit``, that this group could reuse (a multiple of its block size)."""

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """Free blocks that :meth:`allocate` would take, counting those it must wake from the cache."""

    def free_out_of_window(self, request: Request) -> None:
        """Free what the next token to compute no longer needs."""

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

    def block_table(self, request: Request) -> Sequence[int]:
        """Block numbers of ``request`` in order, which may grow later: whoever keeps them copies them."""

    def held_blocks(self, request: Request) -> list[int]:
        """The blocks that ``request`` holds now, none before it starts."""


@singledispatch
def make_cache_group(spec: KVCacheSpec, pool: BlockPool) -> KVCacheGroup:
    """The bookkeeping of a group of layers; each kind registers its own, beside its class."""
    raise AssertionError(f"no bookkeeping for {pool.num_blocks} blocks of kind {spec.kind}")


@dataclass(slots=True)
class _Sequence:
    """What a request holds: blocks in order, how many of them are findable, the room kept for growth."""

    blocks: list[Block | None] = field(default_factory=list)
    """None where a block was freed, since the window has moved past it."""
    num_registered: int = 0
    reserved: range = range(0)
    table: "array[int]" = field(default_factory=lambda: array("i"))
    """The blocks' numbers; 0 for those freed behind a window, which nobody reads."""

    def extend(self, blocks: Iterable[Block | None]) -> None:
        """Hold more blocks."""
        self.blocks.extend(blocks)
        self.table.extend([0 if block is None else block.block_id for block in self.blocks[len(self.table) :]])

    def renumber(self) -> None:
        """Blocks have other numbers now."""
        for i, block in enumerate(self.blocks):
            self.table[i] = 0 if block is None else block.block_id


class FullAttentionGroup:
    """A page for every token."""

    recurrent: ClassVar[bool] = False
    moves_on: ClassVar[bool] = False

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._sequences: dict[Request, _Sequence] = {}
        pool.on_renumbered = self._renumber

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
            sequence.extend(self._prefix(request, num_cached))
            self.pool.share(_present(sequence.blocks))
            sequence.num_registered = len(sequence.blocks)
        missing = -(-num_tokens // self.block_size) - len(sequence.blocks)
        if missing > 0:
            self._extend(request, sequence, missing)

    def free_out_of_window(self, request: Request) -> None:
        """Free the blocks that lie wholly before the window of the next token to compute.

        A long sequence leaves many that nobody may come back to: they go before what else is cached, except
        for the window before the prompt's end, where the next turn of a chat begins.
        """
        sequence = self._sequences.get(request)
        if sequence is None:
            return
        first = min(self._first_block(request.num_computed_tokens), len(sequence.blocks))
        if first == 0 or sequence.blocks[first - 1] is None:
            return
        turn = max(0, request.num_prompt_tokens - GENERATION_PROMPT_TOKENS - self.block_size)
        window = range(self._first_block(turn), request.num_prompt_tokens // self.block_size)
        behind = [(i in window, block) for i, block in enumerate(sequence.blocks[:first]) if block is not None]
        self.pool.free([block for kept, block in behind if kept])
        self.pool.free([block for kept, block in behind if not kept], evict_first=True)
        sequence.blocks[:first] = [None] * first
        sequence.table[:first] = array("i", bytes(first * sequence.table.itemsize))

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Register full blocks of known tokens under their chained hashes."""
        sequence = self._sequences.get(request)
        if sequence is None or not self.pool.enable_caching:
            return
        num_full = min(num_tokens, len(request.all_token_ids)) // self.block_size
        hashes = block_hashes(request, self.block_size, num_full)
        for i in range(sequence.num_registered, num_full):
            block = sequence.blocks[i]
            if block is not None:
                self.pool.cache(block, hashes[i], self._tokens(request, i))
        sequence.num_registered = max(sequence.num_registered, num_full)

    def free(self, request: Request) -> None:
        """Free the blocks and the room kept for growth."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.pool.release(sequence.reserved)
            self.pool.free(_present(sequence.blocks))

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Whether the blocks that the next token sees are held."""
        first = self._first_block(num_tokens)
        return None not in self._sequences[parent].blocks[first : num_tokens // self.block_size]

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Share the blocks of the parent's first ``num_tokens`` tokens."""
        source, count = self._sequences[parent], num_tokens // self.block_size
        shared = source.blocks[:count]
        self.pool.share(_present(shared))
        self._sequences[child] = _Sequence(shared, min(source.num_registered, count), table=source.table[:count])

    def block_table(self, request: Request) -> "array[int]":
        """Block numbers of ``request`` in order, kept up to date; 0 where freed behind a window, which nobody reads.

        Copy what is to be kept, through a buffer that is not: one that is exported forbids the array to grow.
        """
        return self._sequences[request].table

    def held_blocks(self, request: Request) -> list[int]:
        """The blocks that ``request`` holds now; those freed behind a window are not among them."""
        sequence = self._sequences.get(request)
        return [] if sequence is None else [block.block_id for block in sequence.blocks if block is not None]

    def _renumber(self) -> None:
        for sequence in self._sequences.values():
            sequence.renumber()

    def _prefix(self, request: Request, num_tokens: int) -> list[Block | None]:
        """The cached blocks of the first ``num_tokens`` tokens, as far as the next token sees them."""
        first = self._first_block(num_tokens)
        last = num_tokens // self.block_size
        return [*[None] * first, *(self._cached_block(request, i) for i in range(first, last))]

    def _extend(self, request: Request, sequence: _Sequence, missing: int) -> None:
        last = sequence.blocks[-1].block_id if sequence.blocks and sequence.blocks[-1] is not None else None
        room = self._room(request, len(sequence.blocks) + missing)
        taken = self.pool.allocate(missing, after=last, room=room)
        sequence.extend(taken)
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
        block_hash = block_hashes(request, self.block_size, index + 1)[index]
        return self.pool.find_cached(block_hash, self._tokens(request, index))

    def _tokens(self, request: Request, index: int) -> list[int]:
        return request.all_token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _first_block(self, num_tokens: int) -> int:
        """The first block that the token at position ``num_tokens`` sees."""
        return 0


class SlidingWindowGroup(FullAttentionGroup):
    """Pages of the last ``window`` tokens; those behind it are freed, also while a long prompt runs.

    A prefix is cached for this group if the blocks of the window before its end are.
    """

    moves_on: ClassVar[bool] = True

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

    def _first_block(self, num_tokens: int) -> int:
        """The first block that the token at position ``num_tokens`` sees."""
        return max(0, num_tokens - self.window + 1) // self.block_size


@make_cache_group.register
def _full_attention(spec: FullAttentionSpec, pool: BlockPool) -> KVCacheGroup:
    return FullAttentionGroup(pool, spec.block_size)


@make_cache_group.register
def _sliding_window(spec: SlidingWindowSpec, pool: BlockPool) -> KVCacheGroup:
    return SlidingWindowGroup(pool, spec.block_size, spec.window)


def _present(blocks: Sequence[Block | None]) -> list[Block]:
    return [block for block in blocks if block is not None]


def block_hashes(request: Request, block_size: int, count: int) -> list[BlockHash]:
    """Chained hashes of the request's first ``count`` full blocks, computed once for all groups."""
    hashes = request.block_hashes.setdefault(block_size, [])
    while len(hashes) < count:
        first = len(hashes) * block_size
        tokens = request.all_token_ids[first : first + block_size]
        hashes.append(hash_block(hashes[-1] if hashes else None, tokens, request.cache_salt))
    return hashes
