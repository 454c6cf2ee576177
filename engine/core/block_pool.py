"""The pool of KV blocks: who holds which block, which contents are cached, what to evict next.

Blocks are numbers; their bytes live in ``engine.runner``. A block is *held* (``ref_count`` > 0),
*cached* (free, but its content is known by hash and may be found again) or *free*. Held + cached +
free is always the whole pool.

Besides vLLM's pool this one prefers *runs*: consecutive block numbers for one sequence, since
attention over a run needs no gather. A new sequence looks for room to grow, and marks it as
reserved so that others start elsewhere; when memory is short reserved blocks are taken like any.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

BlockHash = bytes

_TAKEN, _AVAILABLE, _RESERVED = 0, 1, 2


def hash_block(parent: BlockHash | None, token_ids: Sequence[int], salt: str | None = None) -> BlockHash:
    """Content address of a full block: 16 bytes over the parent's hash, the tokens and the salt."""
    root = blake2b((salt or "").encode(), digest_size=16).digest()
    digest = blake2b(parent or root, digest_size=16)
    digest.update(np.asarray(token_ids, dtype=np.int32).tobytes())
    return digest.digest()


@dataclass(eq=False, slots=True)
class Block:
    """One KV block. ``token_ids`` is kept while cached, so that a hit is verified, not trusted."""

    block_id: int
    ref_count: int = 0
    block_hash: BlockHash | None = None
    token_ids: tuple[int, ...] = ()
    previous: "Block | None" = None
    next: "Block | None" = None


class _FreeQueue:
    """Doubly linked list of free blocks, least recently used first; removal anywhere is O(1)."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._head, self._tail = Block(-1), Block(-2)
        self._head.next, self._tail.previous = self._tail, self._head
        self._length = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._length

    def append(self, block: Block) -> None:
        assert self._tail.previous is not None
        self._insert(self._tail.previous, block)

    def append_left(self, block: Block) -> None:
        self._insert(self._head, block)

    def remove(self, block: Block) -> None:
        before, after = block.previous, block.next
        assert before is not None, f"block {block.block_id} is not in the free queue"
        assert after is not None, f"block {block.block_id} is not in the free queue"
        before.next, after.previous = after, before
        block.previous = block.next = None
        self._length -= 1

    def first(self) -> Block:
        assert self._head.next is not None
        return self._head.next

    def _insert(self, before: Block, block: Block) -> None:
        after = before.next
        assert after is not None
        before.next = after.previous = block
        block.previous, block.next = before, after
        self._length += 1


class BlockPool:
    """``num_blocks`` blocks with reference counts, a content cache and LRU eviction."""

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        assert num_blocks > 0, f"a pool needs blocks, got {num_blocks}"
        self.enable_caching = enable_caching
        self.blocks = [Block(i) for i in range(num_blocks)]
        self._free = _FreeQueue(self.blocks)
        self._cached: dict[BlockHash, Block] = {}
        self._state = bytearray([_AVAILABLE]) * num_blocks
        self.num_free_cached = 0

    @property
    def num_blocks(self) -> int:
        """Size of the pool."""
        return len(self.blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._free)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether :meth:`allocate` would succeed."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int, *, after: int | None = None, room: int = 0) -> list[Block]:
        """Take ``num_blocks`` blocks, evicting cached ones if need be.

        ``after`` continues the run that ends in that block; a new run is placed where ``room``
        further blocks are free behind it, and :meth:`reserve` keeps others from starting there.
        """
        assert self.can_allocate(num_blocks), f"{num_blocks} blocks wanted, {len(self._free)} free"
        start = None if after is None else after + 1
        taken = []
        for remaining in range(num_blocks, 0, -1):
            if start is None or not self._is_uncached_free(start):
                start = self._find_run(remaining, room)
            block = self._free.first() if start is None else self.blocks[start]
            taken.append(self._take(block))
            start = block.block_id + 1
        return taken

    def share(self, blocks: Iterable[Block]) -> None:
        """Hold ``blocks`` once more; cached ones leave the free queue."""
        for block in blocks:
            if block.ref_count == 0:
                self._free.remove(block)
                self.num_free_cached -= 1
                self._state[block.block_id] = _TAKEN
            block.ref_count += 1

    def free(self, blocks: Sequence[Block]) -> None:
        """Let go of ``blocks`` (a sequence's, in order). Its end is evicted before its beginning."""
        for block in reversed(blocks):
            assert block.ref_count > 0, f"block {block.block_id} freed twice"
            block.ref_count -= 1
            if block.ref_count:
                continue
            if block.block_hash is not None:
                self._free.append(block)
                self.num_free_cached += 1
            else:
                self._free.append_left(block)
                self._state[block.block_id] = _AVAILABLE

    def reserve(self, first: int, count: int) -> range:
        """Ask others not to start in the ``count`` blocks from ``first``; gives the range in force."""
        end = first
        while end < min(first + count, self.num_blocks) and self._state[end] == _AVAILABLE:
            self._state[end] = _RESERVED
            end += 1
        return range(first, end)

    def release(self, reserved: range) -> None:
        """Undo :meth:`reserve`."""
        for block_id in reserved:
            if self._state[block_id] == _RESERVED:
                self._state[block_id] = _AVAILABLE

    def find_cached(self, block_hash: BlockHash, token_ids: Sequence[int]) -> Block | None:
        """The block whose content is ``token_ids`` behind the hashed prefix, verified."""
        block = self._cached.get(block_hash)
        return block if block is not None and block.token_ids == tuple(token_ids) else None

    def cache(self, block: Block, block_hash: BlockHash, token_ids: Sequence[int]) -> None:
        """Make a full, held block findable. A second block of the same content stays private."""
        assert block.ref_count > 0, f"block {block.block_id} is not held"
        if self.enable_caching and block.block_hash is None and block_hash not in self._cached:
            block.block_hash, block.token_ids = block_hash, tuple(token_ids)
            self._cached[block_hash] = block

    def reset_cache(self) -> None:
        """Forget all cached contents; held blocks stay held."""
        for block in list(self._cached.values()):
            self._forget(block)
            if block.ref_count == 0:
                self.num_free_cached -= 1
                self._state[block.block_id] = _AVAILABLE

    def check(self) -> None:
        """Assert the pool's books: for tests, and cheap enough for an idle engine."""
        free = [b for b in self.blocks if b.ref_count == 0]
        assert len(free) == len(self._free), f"{len(free)} blocks unheld, {len(self._free)} in the queue"
        cached = sum(b.block_hash is not None for b in free)
        assert cached == self.num_free_cached, f"{cached} cached blocks, {self.num_free_cached} counted"
        for block in self.blocks:
            usable = block.ref_count == 0 and block.block_hash is None
            assert usable == (self._state[block.block_id] != _TAKEN), f"block {block.block_id} has a stale state"

    def _is_uncached_free(self, block_id: int) -> bool:
        return block_id < self.num_blocks and self._state[block_id] != _TAKEN

    def _find_run(self, length: int, room: int) -> int | None:
        for wanted in (length + room, length, 1):
            found = self._state.find(bytes([_AVAILABLE]) * wanted)
            if found >= 0:
                return found
        return None

    def _take(self, block: Block) -> Block:
        self._free.remove(block)
        if block.block_hash is not None:
            self._forget(block)
            self.num_free_cached -= 1
        self._state[block.block_id] = _TAKEN
        block.ref_count = 1
        return block

    def _forget(self, block: Block) -> None:
        assert block.block_hash is not None
        del self._cached[block.block_hash]
        block.block_hash, block.token_ids = None, ()
