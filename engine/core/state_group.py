"""Slots for the running state of recurrent layers, and the checkpoints that make their prefixes reusable.

A state stands for all tokens before it and for no fewer, so it can be found again only where one was
kept. Keeping one costs no copy: the slot that holds it is left alone from then on, and the sequence
reads it once more and writes to another.
"""

from dataclasses import dataclass

from engine.core.block_pool import Block, BlockHash, BlockPool
from engine.core.cache_groups import GENERATION_PROMPT_TOKENS, block_hashes
from engine.request import Request


@dataclass(slots=True)
class _State:
    """A sequence's slot, and the checkpoint that the step under way starts from, if it does."""

    current: Block
    source: Block | None = None


class StateGroup:
    """One slot per sequence, whatever its length, and as many checkpoints as slots are left.

    A checkpoint is taken at the last block boundary before a prompt's end, where the next turn of a chat
    comes back to, and where pages of other layers match further than any checkpoint (a prefix that two
    requests share). A chunk then ends there, which costs one more pass over the weights: only where at least
    ``min_tokens`` (resp. ``min_shared_tokens``) are saved.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, min_tokens: int = 64, min_shared_tokens: int = 256) -> None:
        self.pool = pool
        self.block_size = block_size
        self.min_tokens = min_tokens
        self.min_shared_tokens = min_shared_tokens
        self._states: dict[Request, _State] = {}
        self._wanted: dict[Request, set[int]] = {}

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """The last checkpoint within ``limit`` tokens, of those that leave a slot to go on in."""
        if not self.pool.enable_caching:
            return 0
        hashes = block_hashes(request, self.block_size, limit // self.block_size)
        for count in range(limit // self.block_size, 0, -1):
            if not self.pool.is_cached(hashes[count - 1]):
                continue
            found = self._checkpoint(request, count * self.block_size)
            if found is not None and (found.ref_count or self.pool.can_allocate(2)):
                return count * self.block_size
        return 0

    def aim(self, request: Request, num_cached: int, num_shared: int, boundary: int) -> None:
        """Choose checkpoints for a request that starts from ``num_cached`` tokens.

        ``num_shared``: leading tokens that all other groups have. Every ``boundary`` tokens, blocks of all groups end.
        """
        if not self.pool.enable_caching:
            return
        end = (request.num_prompt_tokens - GENERATION_PROMPT_TOKENS) // boundary * boundary
        wanted = set()
        if end - num_cached >= self.min_tokens:
            wanted.add(end)
        if num_shared - num_cached >= self.min_shared_tokens and end - num_shared >= self.min_tokens:
            wanted.add(num_shared)
        self._wanted[request] = wanted

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """A slot for a sequence that begins, or that leaves its own as a checkpoint; and the checkpoint it wakes."""
        if request in self._states:
            return int(self._leaves_checkpoint(request))
        source = self._checkpoint(request, num_cached) if num_cached else None
        return 1 + int(source is not None and source.ref_count == 0)

    def leave_behind(self, request: Request) -> None:
        """Let go of the checkpoint that the last step started from."""
        state = self._states.get(request)
        if state is not None and state.source is not None:
            self.pool.free([state.source])
            state.source = None

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Take a slot for a sequence that begins or that leaves a checkpoint."""
        state = self._states.get(request)
        if state is None:
            source = self._checkpoint(request, num_cached) if num_cached else None
            if source is not None:
                self.pool.share([source])
            self._states[request] = _State(self.pool.allocate(1)[0], source)
        elif self._leaves_checkpoint(request):
            position = request.num_computed_tokens
            self.pool.cache(state.current, self._hash(request, position), request.all_token_ids[:position])
            self._wanted[request].discard(position)
            state.source, state.current = state.current, self.pool.allocate(1)[0]

    def chunk_end(self, request: Request, end: int) -> int:
        """The next wanted checkpoint, if it comes before ``end``."""
        start = request.num_computed_tokens
        return min((position for position in self._wanted.get(request, ()) if start < position < end), default=end)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """States are kept when a sequence moves on from them, not before they are written."""

    def free(self, request: Request) -> None:
        """Let go of the slot and of the checkpoint that the last step started from."""
        self._wanted.pop(request, None)
        state = self._states.pop(request, None)
        if state is not None:
            self.pool.free([block for block in (state.source, state.current) if block is not None])

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Only before the first token: a running state has moved on; its checkpoints are found as a prefix."""
        return num_tokens == 0

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Nothing to share."""

    def block_table(self, request: Request) -> list[int]:
        """The slot that the next step reads and the slot that it writes."""
        state = self._states[request]
        return [(state.source or state.current).block_id, state.current.block_id]

    def held_blocks(self, request: Request) -> list[int]:
        """The slots that ``request`` holds now."""
        return sorted(set(self.block_table(request))) if request in self._states else []

    def _leaves_checkpoint(self, request: Request) -> bool:
        """Whether the state is where a checkpoint is wanted, none is there yet, and a slot is left to go on in."""
        position = request.num_computed_tokens
        if position not in self._wanted.get(request, ()) or not self.pool.can_allocate(1):
            return False
        return not self.pool.is_cached(self._hash(request, position))

    def _checkpoint(self, request: Request, num_tokens: int) -> Block | None:
        """The state after the request's first ``num_tokens`` tokens, verified."""
        return self.pool.find_cached(self._hash(request, num_tokens), request.all_token_ids[:num_tokens])

    def _hash(self, request: Request, num_tokens: int) -> BlockHash:
        count = num_tokens // self.block_size
        return block_hashes(request, self.block_size, count)[count - 1]
