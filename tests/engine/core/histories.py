"""Any history of requests, as rules for hypothesis; what must hold is asserted after each."""

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.block_pool import BlockPool, hash_block
from engine.core.cache_groups import FullAttentionGroup, KVCacheGroup, SlidingWindowGroup
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import Request, RequestStatus
from engine.core.scheduler import Scheduler, StepMemory, must_end
from engine.core.state_group import StateGroup
from engine.core.step import SchedulerOutput
from engine.memory.cache_spec import FullAttentionSpec, SlidingWindowSpec
from engine.params.sampling_params import SamplingParams
from tests.engine.core.device import Device, Tokens
from tests.engine.core.stand_ins import WaitingGuide

VOCAB = 3
"""So few tokens that sequences have much in common."""
LONGEST = 48
"""Of a sequence; the smallest pools hold one."""
SALTS = (None, None, "salt")
WHICH = st.integers(0, 9)
"""Of those that there are."""
KINDS = (("full",), ("full", "window"), ("window",), ("full", "state"), ("full", "window", "state"), ("state",))
PREFIXES = tuple([tuple([(7 * i * i + i // 3 + number * (i > cut)) % VOCAB for i in range(40)])
                  for number, cut in ((0, 99), (1, 9), (1, 17), (2, 30))])  # fmt: skip


class ScarceMemory(StepMemory):
    """Memory for a chunk of any length, for a short one, or, every third time at most, for none."""

    def __init__(self) -> None:
        self.most = LONGEST

    def begin(self) -> None:
        self.left = self.most

    def affordable(self, num_tokens: int, start: int) -> int:
        given = min(num_tokens, self.left)
        self.left -= given
        return given


class Histories(RuleBasedStateMachine):
    """The scheduler over every kind of cache, on :class:`tests.engine.core.device.Device`, a step in flight."""

    num_rules = 0

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        draw = data.draw
        kinds = draw(st.sampled_from(KINDS), label="kinds")
        self.budget = draw(st.sampled_from((4, 7, 16, 64)), label="budget")
        self.window = draw(st.sampled_from((3, 6, 10)), label="window")
        self.size = draw(st.sampled_from((1, 2, 4)), label="block size")
        caching = draw(st.sampled_from((True, True, True, False)), label="caching")
        self.max_num_seqs = min(draw(st.sampled_from((1, 2, 5)), label="max_num_seqs"), self.budget)
        self.memory = draw(st.sampled_from((None, ScarceMemory())), label="memory")
        self.groups = [self._group(kind, 1, caching) for kind in kinds]
        for group, size in zip(self.groups, self._sizes(data), strict=True):
            group.pool.resize(size)
        limits = {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.budget}
        grid = draw(st.sampled_from((1, 4)), label="chunk grid")
        self.scheduler = Scheduler(KVCacheManager(self.groups), **limits, memory=self.memory, chunk_grid=grid)
        self.tokens = Tokens(VOCAB)
        self.device = Device(self.tokens, self.groups)
        self.in_flight = SchedulerOutput()
        self.requests: list[Request] = []
        self.names = 0

    def _group(self, kind: str, num_blocks: int, caching: bool) -> KVCacheGroup:
        pool = BlockPool(num_blocks, enable_caching=caching)
        if kind == "window":
            return SlidingWindowGroup(pool, self.size, self.window)
        if kind == "state":
            return StateGroup(pool, self.size, min_tokens=2 * self.size, min_shared_tokens=2 * self.size)
        return FullAttentionGroup(pool, self.size)

    def _sizes(self, data: Any) -> list[int]:
        """Numbers of blocks: for one sequence of full length at least, for all that may run at most, and some more."""
        sizes = []
        for group in self.groups:
            if isinstance(group, StateGroup):
                least, most = self.max_num_seqs, 2 * self.max_num_seqs + 3
            else:
                spec: Any = FullAttentionSpec((0,), 1, block_size=self.size)
                if isinstance(group, SlidingWindowGroup):
                    spec = SlidingWindowSpec((0,), 1, window=self.window).for_steps(self.size, self.budget)
                least = spec.blocks_of(1, LONGEST)
                most = spec.blocks_of(self.max_num_seqs, LONGEST) + 5
            sizes.append(data.draw(st.integers(least, most), label="blocks"))
        return sizes

    @property
    def alive(self) -> list[Request]:
        return [request for request in self.requests if not request.finished]

    @rule(
        prefix=st.integers(0, len(PREFIXES) - 1), length=st.integers(1, 36),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=4),
        n=st.sampled_from((1, 1, 1, 2, 3)), max_tokens=st.integers(1, 8), priority=st.sampled_from((0, 0, 0, 1, -1)),
        salt=st.sampled_from(SALTS), traceless=st.sampled_from((False, False, False, True)),
        scored=st.sampled_from((None, None, None, 1, 5)),
        ends=st.sampled_from((None, None, None, 2, 4)), served=st.booleans(),
    )  # fmt: skip
    def add(self, prefix, length, tail, n, max_tokens, priority, salt, traceless, scored, ends, served) -> None:
        prompt = [*PREFIXES[prefix][:length], *tail]
        # It may go on where an earlier one ended, as the next turn of a chat does.
        earlier = [request for request in self.requests if request.num_prompt_tokens < 20 and request.output_token_ids]
        if earlier and length % 3 == 0:
            prompt = [*earlier[length % len(earlier)].all_token_ids, *tail, 1]
        params = SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=None if scored is None else 0)
        parent, self.names = None, self.names + 1
        for index in range(n):
            guide = None if ends is None else WaitingGuide(first=index % 2, last=3, stop=ends)
            request = Request(
                f"{self.names}/{index}", prompt, params, max_tokens=max_tokens, priority=priority, cache_salt=salt,
                index=index, guide=guide, scored_from=scored or 1, arrival_time=float(self.names), served=served,
                traceless=traceless,
            )  # fmt: skip
            self.scheduler.add(request, fork_of=parent)
            self.requests.append(request)
            parent = parent or request

    @rule(number=st.integers(1, 4))
    def step(self, number: int) -> None:
        for _ in range(number):
            self._step()

    @precondition(lambda self: self.memory is not None)
    @rule(most=st.sampled_from((0, 1, 3, LONGEST)))
    def step_with_memory_for(self, most: int) -> None:
        self.memory.most = most
        self._step()
        self.memory.most = LONGEST

    @rule()
    def read_what_is_in_flight(self) -> None:
        """As before a change of the plan: nothing is being computed then."""
        self._read()

    @precondition(lambda self: self.alive)
    @rule(which=WHICH, all_of_them=st.booleans())
    def abort(self, which: int, all_of_them: bool) -> None:
        request = self.alive[which % len(self.alive)]
        siblings = [one for one in self.alive if one.request_id.split("/")[0] == request.request_id.split("/")[0]]
        for one in siblings if all_of_them else [request]:
            self.scheduler.finish(one, RequestStatus.FINISHED_ABORTED)
            self.scheduler.finish(one, RequestStatus.FINISHED_ABORTED)  # twice is once

    @precondition(lambda self: self.scheduler.running)
    @rule(which=WHICH)
    def preempt(self, which: int) -> None:
        self.scheduler.preempt(self.scheduler.running[which % len(self.scheduler.running)])

    @precondition(lambda self: self.alive)
    @rule(which=WHICH, max_tokens=st.integers(1, 12))
    def change_a_limit(self, which: int, max_tokens: int) -> None:
        """As the live settings do."""
        request = self.alive[which % len(self.alive)]
        request.max_tokens = min(max_tokens, LONGEST - request.num_prompt_tokens)

    @rule()
    def forget_prefixes(self) -> None:
        self.scheduler.kv.reset_prefix_cache()

    @rule()
    def lose_the_pages(self) -> None:
        """As after a step that failed: see ``LLMEngine.start_over``."""
        self.in_flight = SchedulerOutput()
        for request in list(self.scheduler.running):
            request.num_pending = 0
            self.scheduler.preempt(request)
        for request in self.scheduler.waiting:  # preempted while its token was in flight, which is lost now
            request.num_pending = 0
        self.scheduler.kv.reset_prefix_cache()
        self.device.forget_all()

    @rule(data=st.data(), seqs=st.integers(1, 5))
    def change_the_plan(self, data: Any, seqs: int) -> None:
        """As ``engine.runtime.replan``: refused where requests under way hold more."""
        self._read()
        before, self.max_num_seqs = self.max_num_seqs, min(seqs, self.budget)
        sizes = self._sizes(data)
        for request in self.scheduler.running:
            self.scheduler.kv.free_out_of_window(request)
        if must_end(self.scheduler.running, self.groups, sizes, self.max_num_seqs):
            self.max_num_seqs = before
            return
        moves = [group.pool.resize(size) for group, size in zip(self.groups, sizes, strict=True)]
        self.scheduler.max_num_seqs = self.max_num_seqs
        self.device.move(sizes, moves)

    @rule()
    def let_all_end(self) -> None:
        """Nobody starves: the most urgent request moves on with every step, whatever gives way for it."""
        if self.memory is not None:
            self.memory.most = LONGEST
        most = 10 + sum(request.num_prompt_tokens + request.max_tokens + 3 for request in self.alive)
        for _ in range(most):
            if not self.alive:
                break
            self._step()
        assert not self.alive, f"{len(self.alive)} requests did not end in {most} steps"
        self._read()
        for request in self.requests[-20:]:
            self._check_output(request)
        del self.requests[:-20]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.let_all_end()
        for group in self.groups:
            group.pool.check()
            assert group.pool.num_held_blocks == 0

    def _step(self) -> None:
        decoding = [one for one in self.scheduler.running if one.num_tokens - one.num_computed_tokens == 1
                    and not one.guide_waits and not one.last_token_in_flight]  # fmt: skip
        output = self.scheduler.schedule() if self.scheduler.has_work else SchedulerOutput()
        chosen = [scheduled.request for scheduled in output.scheduled_requests]
        assert output.num_tokens <= self.budget
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(output.preempted)
        for request in decoding:  # a decode never waits for a prefill
            assert request in chosen or request in output.preempted
        for scheduled in output.scheduled_requests:
            assert scheduled.num_tokens > 0
            assert scheduled.end <= scheduled.request.num_tokens
            assert scheduled.pending == (scheduled.end > len(scheduled.request.all_token_ids))
        self.device.run(output)
        self._read()
        self.in_flight = output

    def _read(self) -> None:
        last, self.in_flight = self.in_flight, SchedulerOutput()
        for scheduled in last.sampling:
            if not scheduled.request.finished:
                self.scheduler.update(scheduled, self.device.sampled(scheduled.request, scheduled.end))

    def _check_output(self, request: Request) -> None:
        """What came is what the 'model' says after this prompt, alone."""
        states = self.tokens.of(request.prompt_token_ids)
        for token in request.output_token_ids:
            assert token == self.tokens.next_token(request, states[-1])
            states.append(self.tokens.after(states[-1], token))

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        type(self).num_rules += 1
        for group in self.groups:
            self._check_pool(group)
        for number in range(len(self.groups)):
            self._check_cached(number)

    def _check_pool(self, group: KVCacheGroup) -> None:
        pool = group.pool
        pool.check()
        counts: Counter[int] = Counter()
        for request in self.requests:
            held = group.held_blocks(request)
            assert len(set(held)) == len(held), "a block is in two places of one sequence"
            counts.update(held)
            assert not held or request.status is RequestStatus.RUNNING, f"{request.status} holds {held}"
        assert counts == {block.block_id: block.ref_count for block in pool._held.values()}
        assert all(number == block.block_id for number, block in (*pool._held.items(), *pool._evictable.items()))
        assert max(counts, default=0) < pool.num_blocks
        states = Counter(pool.states().tolist())
        assert states[pool.FREE] == pool.num_free_blocks - pool.num_free_cached
        assert states[pool.CACHED] == pool.num_free_cached
        assert states[pool.HELD] + states[pool.SHARED] == len(counts) == pool.num_held_blocks
        assert states[pool.SHARED] == sum(count > 1 for count in counts.values())

    def _check_cached(self, number: int) -> None:
        """Every hash names the content that its block has, and the prefix before it."""
        group, memory = self.groups[number], self.device.memory[number]
        for block_hash, block in group.pool._cached.items():
            content = memory[block.block_id]
            last = content[0 if group.recurrent else group.block_size - 1]
            whole = self.tokens.leading_to(last)
            assert tuple(whole if group.recurrent else whole[-group.block_size :]) == block.token_ids
            assert block_hash in (_hash_of(whole, group.block_size, salt) for salt in SALTS[1:3])

    @invariant()
    def requests_are_where_they_belong(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= self.max_num_seqs
        queue = self.scheduler.waiting
        assert len(waiting) == len(queue) == queue.num_ready + queue.num_aside
        assert Counter(self.alive) == Counter([*running, *waiting])
        for request in running:
            assert request.num_computed_tokens <= request.num_tokens
            for group in self.groups:
                if not group.recurrent:
                    assert len(group.block_table(request)) * group.block_size >= request.num_computed_tokens
        for request in waiting:
            assert (request.num_computed_tokens, request.num_findable_tokens) == (0, 0)
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def _hash_of(tokens: list[int], size: int, salt: str | None) -> bytes:
    found = None
    for first in range(0, len(tokens), size):
        found = hash_block(found, tokens[first : first + size], salt)
    assert found is not None
    return found
