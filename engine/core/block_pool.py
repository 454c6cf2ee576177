"""The pool of KV blocks: who holds which block, which contents are cached, what to evict next.

Blocks are numbers; their bytes live in ``engine.runner``. A block is *held* (``ref_count`` > 0),
*cached* (free, but its content is known by hash and may be found again) or *free*. Held + cached +
free is always the whole pool.

Besides vLLM's pool this one prefers *runs*: consecutive block numbers for one sequence, since
attention over a run needs no gather. A new sequence looks for room to grow, and marks it as
reserved so that others start elsewhere; when memory is short reserved blocks are taken like any.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BlockHash = bytes

_TAKEN, _AVAILABLE, _RESERVED = 0, 1, 2
"""States of a block number; cached free blocks count as taken, since a run must not evict them."""


def hash_block(parent: BlockHash | None, token_ids: Sequence[int], salt: str | None = None) -> BlockHash:
    """Content address of a full block: 16 bytes over the parent's hash, the tokens and the salt."""
    root = blake2b((salt or "").encode(), digest_size=16).digest()
    digest = blake2b(parent or root, digest_size=16)
    digest.update(np.asarray(token_ids, dtype=np.int32).tobytes())
    return digest.digest()


@dataclass(eq=False, slots=True)
class Block:
    """One KV block. ``token_ids`` is kept while cached, so that a hit is verified, not trusted.

    For a page its own tokens, for a state all tokens before it.
    """

    block_id: int
    ref_count: int = 0
    block_hash: BlockHash | None = None
    token_ids: tuple[int, ...] = ()


class BlockPool:
    """``num_blocks`` blocks with reference counts, a content cache and LRU eviction.

    Blocks that were never used cost nothing: a pool of millions is made at once.
    """

    FREE, CACHED, HELD, SHARED = range(4)
    """What :meth:`states` says of a block; a shared one is held several times."""

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        assert num_blocks > 0, f"a pool needs blocks, got {num_blocks}"
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self._state = bytearray([_AVAILABLE]) * num_blocks
        self._held: dict[int, Block] = {}
        self._evictable: OrderedDict[int, Block] = OrderedDict()
        self._cached: dict[BlockHash, Block] = {}
        self.on_renumbered: Callable[[], None] = lambda: None
        """Called after :meth:`resize` gave held blocks other numbers."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return self.num_blocks - len(self._held)

    @property
    def num_free_cached(self) -> int:
        """Free blocks whose content may be found again."""
        return len(self._evictable)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that sequences hold."""
        return len(self._held)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether :meth:`allocate` would succeed."""
        return num_blocks <= self.num_free_blocks

    def allocate(self, num_blocks: int, *, after: int | None = None, room: int = 0) -> list[Block]:
        """Take ``num_blocks`` blocks, evicting cached ones (least recently used first) if need be.

        ``after`` continues the run that ends in that block; a new run is placed where ``room``
        further blocks are free behind it, and :meth:`reserve` keeps others from starting there.
        """
        assert self.can_allocate(num_blocks), f"{num_blocks} blocks wanted, {self.num_free_blocks} free"
        following = None if after is None else after + 1
        taken = []
        for remaining in range(num_blocks, 0, -1):
            if following is None or not self._is_empty(following):
                following = self._find_run(remaining, room)
            block_id = self._evict() if following is None else following
            self._state[block_id] = _TAKEN
            block = self._held[block_id] = Block(block_id, ref_count=1)
            taken.append(block)
            following = block_id + 1
        return taken

    def share(self, blocks: Iterable[Block]) -> None:
        """Hold ``blocks`` once more; cached ones can then not be evicted."""
        for block in blocks:
            if block.ref_count == 0:
                self._held[block.block_id] = self._evictable.pop(block.block_id)
            block.ref_count += 1

    def free(self, blocks: Sequence[Block], *, evict_first: bool = False) -> None:
        """Give ``blocks`` back (a sequence's, in order). Its end is evicted before its beginning.

        ``evict_first``: and all of them before whatever else is cached.
        """
        for block in blocks if evict_first else reversed(blocks):
            assert block.ref_count > 0, f"block {block.block_id} freed twice"
            block.ref_count -= 1
            if block.ref_count:
                continue
            del self._held[block.block_id]
            if block.block_hash is not None:
                self._evictable[block.block_id] = block
                self._evictable.move_to_end(block.block_id, last=not evict_first)
            else:
                self._state[block.block_id] = _AVAILABLE

    def reserve(self, first: int, count: int) -> range:
        """Ask others not to start in the ``count`` blocks from ``first``; gives the range that is reserved."""
        end = first
        while end < min(first + count, self.num_blocks) and self._state[end] == _AVAILABLE:
            self._state[end] = _RESERVED
            end += 1
        return range(first, end)

    def release(self, reserved: range) -> None:
        """Undo :meth:`reserve`; what a smaller pool no longer has does not matter."""
        for block_id in reserved:
            if block_id < self.num_blocks and self._state[block_id] == _RESERVED:
                self._state[block_id] = _AVAILABLE

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Become a pool of ``num_blocks``; gives {old: new} numbers of the held blocks that moved.

        Holders keep their :class:`Block` objects, which have new numbers then. What is cached in the
        part given up is forgotten, and more of it where held blocks need the room.
        """
        assert num_blocks >= len(self._held), f"{num_blocks} blocks are too few for {len(self._held)} that are held"
        self._state += bytearray([_AVAILABLE]) * (num_blocks - self.num_blocks)
        for block_id in [block_id for block_id in self._evictable if block_id >= num_blocks]:
            self._forget(self._evictable.pop(block_id))
        leaving = [self._held.pop(block_id) for block_id in sorted(self._held) if block_id >= num_blocks]
        del self._state[num_blocks:]
        self.num_blocks = num_blocks
        moves: dict[int, int] = {}
        for run in _runs(leaving):  # neighbours stay neighbours where there is room
            for block, fresh in zip(run, self.allocate(len(run)), strict=True):
                moves[block.block_id] = block.block_id = fresh.block_id
                self._held[block.block_id] = block
        if moves:
            self.on_renumbered()
        return moves

    def is_cached(self, block_hash: BlockHash) -> bool:
        """Whether some block is cached under this hash; :meth:`find_cached` verifies its content."""
        return block_hash in self._cached

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

    def keeps(self, block: Block) -> bool:
        """Whether ``block`` can still be found by its content."""
        return block.block_hash is not None and self._cached.get(block.block_hash) is block

    def uncache(self, block: Block) -> None:
        """Forget what ``block`` contains: nobody finds it any more, and if nobody holds it it is free."""
        assert self.keeps(block), f"block {block.block_id} is not cached"
        self._forget(block)
        block.block_hash, block.token_ids = None, ()
        if self._evictable.pop(block.block_id, None) is not None:
            self._state[block.block_id] = _AVAILABLE

    def reset_cache(self) -> None:
        """Forget all cached contents; held blocks stay held."""
        for block in self._cached.values():
            block.block_hash, block.token_ids = None, ()
        self._cached = {}
        for block_id in self._evictable:
            self._state[block_id] = _AVAILABLE
        self._evictable.clear()

    def states(self) -> NDArray[np.int8]:
        """Per block what it is: free, cached, held or shared."""
        states = np.full(self.num_blocks, self.FREE, np.int8)
        states[np.fromiter(self._evictable, np.int64, len(self._evictable))] = self.CACHED
        held = np.fromiter(self._held, np.int64, len(self._held))
        counts = np.fromiter((block.ref_count for block in self._held.values()), np.int64, len(self._held))
        states[held] = np.where(counts > 1, self.SHARED, self.HELD)
        return states

    def check(self) -> None:
        """Assert the pool's books: for tests, and cheap enough for an idle engine."""
        assert not self._held.keys() & self._evictable.keys(), "a block is both held and free"
        assert all(block.ref_count > 0 for block in self._held.values()), "a held block has no holder"
        assert all(block.ref_count == 0 and block.block_hash for block in self._evictable.values())
        num_taken = self._state.count(_TAKEN)
        assert num_taken == len(self._held) + len(self._evictable), f"{num_taken} taken, books say otherwise"
        for block_hash, block in self._cached.items():
            assert block.block_hash == block_hash, f"block {block.block_id} is cached under another hash"

    def _is_empty(self, block_id: int) -> bool:
        return block_id < self.num_blocks and self._state[block_id] != _TAKEN

    def _find_run(self, length: int, room: int) -> int | None:
        """Where a run of empty blocks may start; None where only cached blocks are left."""
        for wanted in (length + room, length, 1):
            found = self._state.find(bytes([_AVAILABLE]) * wanted)
            if found >= 0:
                return found
        found = self._state.find(_RESERVED)
        return found if found >= 0 else None

    def _evict(self) -> int:
        block_id, block = self._evictable.popitem(last=False)
        self._forget(block)
        return block_id

    def _forget(self, block: Block) -> None:
        assert block.block_hash is not None, f"block {block.block_id} is evictable but has no content"
        del self._cached[block.block_hash]


def _runs(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks in order of their numbers, cut where a number is missing."""
    run: list[Block] = []
    for block in blocks:
        if run and block.block_id != run[-1].block_id + 1:
            yield run
            run = []
        run.append(block)
    if run:
        yield run
