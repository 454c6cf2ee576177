"""Slots for the running state of recurrent layers, and the checkpoints that make their prefixes reusable.

A state stands for all tokens before it and for no fewer, so it can be found again only where one was
kept. Keeping one costs no copy: the slot that holds it is left alone from then on, and the sequence
reads it once more and writes to another.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from engine.core.block_pool import Block, BlockHash, BlockPool
from engine.core.cache_groups import GENERATION_PROMPT_TOKENS, KVCacheGroup, block_hashes, make_cache_group
from engine.core.request import Request
from engine.memory.cache_spec import StateSpec


@dataclass(slots=True)
class _State:
    """A sequence's slot, the checkpoint that the current step starts from, if any, and the last one in its reply."""

    current: Block
    source: Block | None = None
    in_reply: Block | None = None


@dataclass(slots=True)
class _Checkpoint:
    """How a kept state was used. ``expendable``: it lies in a reply, or a later checkpoint of its chat replaces it."""

    last_used: int
    """How many sequences had begun then."""
    num_used: int = 0
    expendable: bool = False


@dataclass(frozen=True, slots=True)
class _CheckpointTarget:
    """Where a request should leave checkpoints: in its prompt, and at every so many tokens of its reply."""

    start: int
    shared: int
    boundary: int
    positions: set[int] = field(default_factory=set)


class StateGroup:
    """One slot per sequence, whatever its length, and as many checkpoints as slots are left.

    In a prompt a checkpoint is taken where the next turn of a chat comes back to (the last block boundary
    before what opens the reply) and where pages of other layers match ``min_shared_tokens`` further than any
    checkpoint (a prefix that two requests share: the third finds it). A chunk then ends there, which costs
    one more small pass over the weights; so while sequences hold most slots, and checkpoints do not last,
    the next turn's is taken only where it saves ``min_tokens``.

    A reply leaves its state behind at every boundary that it passes, which costs no pass: a turn that repeats
    it verbatim begins there. Only the last one is kept, and only in a slot that nothing better is in: an empty
    one, an expendable checkpoint's, or one that nobody came back to while as many sequences began as there
    are slots. Others find these gone first, too.
    """

    recurrent: ClassVar[bool] = True
    moves_on: ClassVar[bool] = True

    def __init__(self, pool: BlockPool, block_size: int, *, min_tokens: int = 64, min_shared_tokens: int = 64) -> None:
        self.pool = pool
        self.block_size = block_size
        self.min_tokens = min_tokens
        self.min_shared_tokens = min_shared_tokens
        self._states: dict[Request, _State] = {}
        self._targets: dict[Request, _CheckpointTarget] = {}
        self._checkpoints: dict[Block, _Checkpoint] = {}
        self._num_begun = 0

    def num_cached_tokens(self, request: Request, limit: int) -> int:
        """The last checkpoint within ``limit`` tokens."""
        if not self.pool.enable_caching:
            return 0
        hashes = block_hashes(request, self.block_size, limit // self.block_size)
        for count in range(limit // self.block_size, 0, -1):
            if self.pool.is_cached(hashes[count - 1]) and self._checkpoint(request, count * self.block_size):
                return count * self.block_size
        return 0

    def choose_checkpoints(self, request: Request, num_cached: int, num_shared: int, boundary: int) -> None:
        """Choose checkpoints for a request that starts from ``num_cached`` tokens.

        ``num_shared``: leading tokens that all other groups have. Every ``boundary`` tokens, blocks of all groups end.
        """
        if not self.pool.enable_caching:
            return
        end = max(0, request.num_prompt_tokens - GENERATION_PROMPT_TOKENS) // boundary * boundary
        shared = min(num_shared // boundary * boundary, end)
        target = self._targets[request] = _CheckpointTarget(num_cached, shared, boundary)
        if shared - num_cached >= self.min_shared_tokens:
            target.positions.add(shared)
        lasting = 2 * len(self._states) <= self.pool.num_blocks
        if end - max(num_cached, *target.positions, 0) >= (boundary if lasting else self.min_tokens):
            target.positions.add(end)

    def num_blocks_needed(self, request: Request, num_tokens: int, num_cached: int) -> int:
        """A slot for a sequence that begins, or that leaves its own as a checkpoint; and the checkpoint it wakes."""
        if request in self._states:
            return int(self._leaves_checkpoint(request))
        source = self._checkpoint(request, num_cached) if num_cached else None
        return 1 + int(source is not None and source.ref_count == 0 and not self._must_reuse(source))

    def free_out_of_window(self, request: Request) -> None:
        """Free the checkpoint that the last step started from."""
        state = self._states.get(request)
        if state is not None and state.source is not None:
            self.pool.free([state.source])
            state.source = None

    def allocate(self, request: Request, num_tokens: int, num_cached: int) -> None:
        """Take a slot for a sequence that begins or that leaves a checkpoint."""
        state = self._states.get(request)
        if state is None:
            self._states[request] = self._begin(request, num_cached)
        elif self._leaves_checkpoint(request):
            self._leave_checkpoint(request, state)

    def chunk_end(self, request: Request, end: int) -> int:
        """The next checkpoint that is wanted and not there yet, if it comes before ``end``."""
        target, start = self._targets.get(request), request.num_computed_tokens
        if target is None:
            return end
        wanted = (position for position in target.positions if start < position < end)
        return min((p for p in wanted if not self.pool.is_cached(self._hash(request, p))), default=end)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """States are kept when a sequence moves on from them, not before they are written."""

    def free(self, request: Request) -> None:
        """Free the slot and the checkpoint that the last step started from."""
        self._targets.pop(request, None)
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

    def _begin(self, request: Request, num_cached: int) -> _State:
        self._num_begun += 1
        source = self._checkpoint(request, num_cached) if num_cached else None
        if source is None:
            return _State(self._take_slot())
        reused = self._must_reuse(source)
        self.pool.share([source])
        if reused:
            self.pool.uncache(source)
            return _State(source)
        used = self._checkpoints[source]
        used.last_used, used.num_used = self._num_begun, used.num_used + 1
        self._replace_checkpoints(request, num_cached)
        return _State(self._take_slot(), source)

    def _leave_checkpoint(self, request: Request, state: _State) -> None:
        position, target = request.num_computed_tokens, self._targets[request]
        kept, checkpoint = state.current, _Checkpoint(self._num_begun)
        self.pool.cache(kept, self._hash(request, position), request.all_token_ids[:position])
        if position in target.positions:
            target.positions.discard(position)
            checkpoint.num_used = int(position == target.shared)  # another prompt begins with it, too
            self._replace_checkpoints(request, target.start + 1)
        else:
            if state.in_reply is not None and self._can_go(state.in_reply):
                self.pool.uncache(state.in_reply)
            checkpoint.expendable = True
            state.in_reply = kept
        self._checkpoints = {block: one for block, one in self._checkpoints.items() if self.pool.keeps(block)}
        self._checkpoints[kept] = checkpoint
        state.source, state.current = kept, self._take_slot()

    def _leaves_checkpoint(self, request: Request) -> bool:
        """Whether the state is where a checkpoint is wanted, none is there yet, and a slot is left to go on in."""
        position, target = request.num_computed_tokens, self._targets.get(request)
        if target is None or position > len(request.all_token_ids) or position % target.boundary:
            return False
        if position in target.positions:
            room = self.pool.can_allocate(1)
        else:  # one slot more is left for a sequence that waits
            room = position >= request.num_prompt_tokens and self.pool.can_allocate(2) and self._has_room()
        return room and not self.pool.is_cached(self._hash(request, position))

    def _must_reuse(self, source: Block) -> bool:
        """Whether a sequence must go on in its checkpoint's own slot, since there is no other."""
        return source.ref_count == 0 and not self.pool.can_allocate(2)

    def _take_slot(self) -> Block:
        if not self._num_empty:
            block = next(filter(self._can_go, self._checkpoints), None)
            if block is not None:
                self.pool.uncache(block)
        return self.pool.allocate(1)[0]

    def _has_room(self) -> bool:
        return self._num_empty > 0 or any(map(self._can_go, self._checkpoints))

    @property
    def _num_empty(self) -> int:
        return self.pool.num_free_blocks - self.pool.num_free_cached

    def _can_go(self, block: Block) -> bool:
        """Whether a checkpoint may give way before others that were not used for longer."""
        if block.ref_count or not self.pool.keeps(block):
            return False
        checkpoint = self._checkpoints[block]
        forgotten = self._num_begun - checkpoint.last_used > self.pool.num_blocks
        return forgotten or (checkpoint.expendable and checkpoint.num_used < 2)

    def _replace_checkpoints(self, request: Request, num_tokens: int) -> None:
        """Let later checkpoints replace those before ``num_tokens`` of the request's tokens, unless many used them."""
        for end in range(self.block_size, num_tokens, self.block_size):
            block = self._checkpoint(request, end) if self.pool.is_cached(self._hash(request, end)) else None
            if block is not None:
                self._checkpoints[block].expendable = True

    def _checkpoint(self, request: Request, num_tokens: int) -> Block | None:
        """The state after the request's first ``num_tokens`` tokens, verified."""
        return self.pool.find_cached(self._hash(request, num_tokens), request.all_token_ids[:num_tokens])

    def _hash(self, request: Request, num_tokens: int) -> BlockHash:
        count = num_tokens // self.block_size
        return block_hashes(request, self.block_size, count)[count - 1]


@make_cache_group.register
def _state(spec: StateSpec, pool: BlockPool) -> KVCacheGroup:
    return StateGroup(pool, spec.block_size)
