"""A device that remembers what it was told to write: proof that what a step reads is what its tokens left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.core.cache_groups import FullAttentionGroup, KVCacheGroup, SlidingWindowGroup
from engine.core.request import Request
from engine.core.step import SchedulerOutput

State = int
"""Stands for all tokens up to a place: another one for every other sequence of tokens."""
NOTHING: State = 0


@dataclass
class Tokens:
    """States by what led to them, and back."""

    vocab: int
    _after: dict[tuple[State, int], State] = field(default_factory=dict)
    _before: list[tuple[State, int]] = field(default_factory=lambda: [(NOTHING, -1)])

    def after(self, state: State, token: int) -> State:
        """The state behind one token more."""
        known = self._after.get((state, token))
        if known is None:
            known = self._after[state, token] = len(self._before)
            self._before.append((state, token))
        return known

    def leading_to(self, state: State) -> list[int]:
        """All tokens up to a state."""
        tokens = []
        while state != NOTHING:
            state, token = self._before[state]
            tokens.append(token)
        return tokens[::-1]

    def of(self, tokens: Sequence[int]) -> list[State]:
        """The states behind each of ``tokens``."""
        states, state = [], NOTHING
        for token in tokens:
            state = self.after(state, token)
            states.append(state)
        return states

    def next_token(self, request: Request, state: State) -> int:
        """What the 'model' says there; siblings say other things."""
        return (state * 2654435761 + request.index * 97 + state // 7) % 1009 % self.vocab


class Device:
    """Pages and slots of every group. A step reads what was there before it, and within pages what it writes itself."""

    def __init__(self, tokens: Tokens, groups: Sequence[KVCacheGroup]) -> None:
        self.tokens, self.groups = tokens, groups
        self.memory: list[dict[int, dict[int, State]]] = [{} for _ in groups]
        self._states: dict[Request, list[State]] = {}

    def states_of(self, request: Request, end: int) -> list[State]:
        """The states behind the request's first ``end`` tokens, those in flight included."""
        states = self._states.setdefault(request, [])
        sequence = request.all_token_ids
        while len(states) < end:
            before = states[-1] if states else NOTHING
            place = len(states)
            token = sequence[place] if place < len(sequence) else self.tokens.next_token(request, before)
            states.append(self.tokens.after(before, token))
        return states

    def run(self, step: SchedulerOutput) -> None:
        """Compute a step; asserts that all that it reads is right, and that no two rows write to one place."""
        for number, group in enumerate(self.groups):
            if group.recurrent:
                self._run_states(number, step)
            else:
                self._run_pages(number, step)

    def sampled(self, request: Request, end: int) -> int:
        """The token that a step gave which ended at ``end``."""
        return self.tokens.next_token(request, self.states_of(request, end)[end - 1])

    def forget_all(self) -> None:
        """The pages are lost."""
        self.memory = [{} for _ in self.groups]

    def move(self, sizes: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """Blocks move into pools of other sizes, all at once."""
        for number, (size, moved) in enumerate(zip(sizes, moves, strict=True)):
            old = self.memory[number]
            kept = {block: content for block, content in old.items() if block < size}
            kept |= {new: old[before] for before, new in moved.items() if before in old}
            self.memory[number] = kept

    def _run_pages(self, number: int, step: SchedulerOutput) -> None:
        memory, size = self.memory[number], self.groups[number].block_size
        written: dict[tuple[int, int], Request] = {}
        for scheduled in step.scheduled_requests:
            states = self.states_of(scheduled.request, scheduled.end)
            table = scheduled.block_tables[number]
            for place in range(scheduled.start, scheduled.end):
                at = (table[place // size], place % size)
                assert at not in written, f"{scheduled.request.request_id} and {written[at].request_id} write to {at}"
                written[at] = scheduled.request
                memory.setdefault(at[0], {})[at[1]] = states[place]
        for scheduled in step.scheduled_requests:
            states, table = self.states_of(scheduled.request, scheduled.end), scheduled.block_tables[number]
            for place in range(first_visible(self.groups[number], scheduled.start), scheduled.end):
                read = memory.get(table[place // size], {}).get(place % size)
                assert read == states[place], (
                    f"group {number}: {scheduled.request.request_id} reads {read} at {place}, not {states[place]}"
                )

    def _run_states(self, number: int, step: SchedulerOutput) -> None:
        memory, writes = self.memory[number], {}
        for scheduled in step.scheduled_requests:
            states = self.states_of(scheduled.request, scheduled.end)
            reads, writes_to = scheduled.block_tables[number]
            if scheduled.start:
                read = memory.get(reads, {}).get(0)
                assert read == states[scheduled.start - 1], f"{scheduled.request.request_id} reads another's state"
            assert writes_to not in writes, f"two write to slot {writes_to}"
            writes[writes_to] = states[scheduled.end - 1]
        read_only = {scheduled.block_tables[number][0] for scheduled in step.scheduled_requests
                     if scheduled.block_tables[number][0] != scheduled.block_tables[number][1]}  # fmt: skip
        assert not read_only & writes.keys(), "a checkpoint is written to"
        memory.update({slot: {0: state} for slot, state in writes.items()})


def first_visible(group: KVCacheGroup, start: int) -> int:
    """The first token that the one at ``start`` sees."""
    assert isinstance(group, FullAttentionGroup)
    return max(0, start - group.window + 1) if isinstance(group, SlidingWindowGroup) else 0
