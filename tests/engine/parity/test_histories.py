"""Random histories with the whole engine on tiny models: what each request says is what mlx-lm says of it, alone."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.core.request import NewRequest
from engine.errors import MemoryInUseError
from engine.memory.step_cost import AdmissionControl, StepCost
from engine.params.live_sampling import LiveSampling
from engine.params.sampling_params import SamplingParams
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.metrics import EngineMetrics
from engine.runtime.replan import _drain, _refuse_if_in_use, _resize
from engine.runtime.stream import RequestStream
from engine.text.tokens.detokenizer import Detokenizer
from tests.benchmarks.step_host import word_tokenizer
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine, greedy
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model
from tests.nightly import NIGHTLY, size

LONGEST = 96
MOST_TOKENS = 10
MOST_SEQS = 5
PROMPTS = tuple([tuple([10 + (7 * i * i + i // 3 + number * (i > cut)) % (VOCAB - 20) for i in range(70)])
                 for number, cut in ((0, 99), (1, 9), (1, 17), (2, 40))])  # fmt: skip
DEFAULT = SamplingParams(temperature=0, ignore_eos=True, max_tokens=MOST_TOKENS)


@cache
def model_and_engine(name: str) -> tuple[Any, BareEngine]:
    model = tiny_model(name)
    return model, BareEngine(model)


@cache
def alone(name: str, prompt: tuple[int, ...]) -> list[int]:
    """The oracle."""
    return greedy(model_and_engine(name)[0], prompt, MOST_TOKENS)


class EngineHistories(RuleBasedStateMachine):
    """Requests that come and go, small caches, changes of plan and settings; ``model`` is set by subclasses."""

    model = "llama"
    num_rules = num_answers = num_preempted = num_cached = 0

    @initialize(
        chunk=st.sampled_from((8, 24, 64)), seqs=st.integers(1, MOST_SEQS), few=st.booleans(),
        caching=st.sampled_from((True, True, False)), submit_first=st.booleans(),
    )  # fmt: skip
    def start(self, chunk: int, seqs: int, few: bool, caching: bool, submit_first: bool) -> None:
        bare = model_and_engine(self.model)[1]
        bare.backend.reset()
        # One sequence of full length, of which a step may run ahead of its window.
        self.fewest = -(-LONGEST // BLOCK_SIZE) + 1
        bare.start(num_blocks=self.fewest if few else 200, chunk=chunk, caching=caching, num_seqs=seqs)
        tokenizer = word_tokenizer()
        self.engine = LLMEngine(
            bare.scheduler, bare.runner, lambda prompt, params: Detokenizer(tokenizer, prompt, params),
            tokenizer.token_text, EngineMetrics("histories"), submit_first=submit_first,
            admission=AdmissionControl(StepCost(0.0), 0, lambda: 1 << 40), max_model_len=LONGEST,
        )  # fmt: skip
        self.streams: dict[str, RequestStream] = {}
        self.names = 0

    @property
    def alive(self) -> list[RequestStream]:
        return [stream for stream in self.streams.values() if not stream.finished]

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), length=st.integers(1, 70), n=st.sampled_from((1, 1, 1, 3)),
        max_tokens=st.integers(1, MOST_TOKENS), own=st.booleans(), priority=st.sampled_from((0, 0, -1)),
        served=st.booleans(),
    )  # fmt: skip
    def add(self, prompt: int, length: int, n: int, max_tokens: int, own: bool, priority: int, served: bool) -> None:
        tokens = list(PROMPTS[prompt][:length])
        if length % 4 == 0 and (over := [stream for stream in self.streams.values() if stream.finished]):
            turn = over[-1]  # the next turn of a chat
            tokens = [*turn.prompt_token_ids, *turn.snapshot().outputs[0].token_ids, 11][:70]
        params = DEFAULT.replace(n=n, max_tokens=max_tokens) if own else DEFAULT.replace(n=n)
        self._add(tokens, params, priority=priority, served=served)

    @rule(first=st.integers(0, 3), length=st.integers(20, 60))
    def add_a_crowd(self, first: int, length: int) -> None:
        """More than small pools hold."""
        for number in range(4):
            self._add([10 + (first + 31 * number + i * (number + 2)) % (VOCAB - 20) for i in range(length)], DEFAULT)

    def _add(self, tokens: list[int], params: SamplingParams, **standing: Any) -> None:
        self.names += 1
        name = str(self.names)
        stream = self.streams[name] = RequestStream(name, None, tokens, params, lambda: None)
        limit = min(params.max_tokens or MOST_TOKENS, LONGEST - len(tokens))
        self.engine.add_request(NewRequest(name, tokens, params, limit, frozenset(), seed=0, **standing), stream)

    @rule(number=st.integers(1, 5))
    def step(self, number: int) -> None:
        for _ in range(number):
            if self.engine.has_work:
                self.engine.step()

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        self.engine.abort_request(self.alive[which % len(self.alive)].request_id)

    @rule(blocks=st.integers(0, 30), seqs=st.integers(1, MOST_SEQS))
    def change_the_plan(self, blocks: int, seqs: int) -> None:
        groups = self.engine.scheduler.kv.groups
        sizes = {id(group): seqs + blocks if group.recurrent else self.fewest + blocks for group in groups}
        plan: Any = SimpleNamespace(
            groups=groups, num_blocks_of=lambda group: sizes[id(group)], max_num_seqs=seqs, max_model_len=LONGEST,
            fraction=0.5,
        )  # fmt: skip
        for group in groups:
            group.block_name = "blocks"
        try:
            _drain(self.engine)
            _refuse_if_in_use(self.engine, plan)
        except MemoryInUseError:
            return
        _resize(self.engine, plan)

    @rule(max_tokens=st.integers(1, MOST_TOKENS))
    def change_the_settings(self, max_tokens: int) -> None:
        self.engine.follow(LiveSampling(DEFAULT.replace(max_tokens=max_tokens), None, LONGEST))

    @rule()
    def forget_prefixes(self) -> None:
        self.engine.scheduler.kv.reset_prefix_cache()

    @rule()
    def lose_the_pages(self) -> None:
        self.engine.start_over()

    @rule()
    def let_all_end(self) -> None:
        most = 20 + sum(len(stream.prompt_token_ids) + stream.params.n * (MOST_TOKENS + 3) for stream in self.alive)
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.engine.step()
        assert not self.alive, "requests starve"
        while self.streams:
            self._check(self.streams.popitem()[1])

    def _check(self, stream: RequestStream) -> None:
        expected = alone(self.model, tuple(stream.prompt_token_ids))
        for output in stream.result().outputs:
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason in ("length", "abort")
            assert output.token_ids or output.finish_reason == "abort"
        type(self).num_answers += 1
        type(self).num_cached += stream.num_cached_tokens > 0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.let_all_end()
            type(self).num_preempted += self.engine.scheduler.num_preemptions
            self._check_pools()
            assert all(group.pool.num_held_blocks == 0 for group in self.engine.scheduler.kv.groups)

    @invariant()
    def _check_pools(self) -> None:
        if hasattr(self, "engine"):
            type(self).num_rules += 1
            for group in self.engine.scheduler.kv.groups:
                group.pool.check()


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
def test_in_any_history_each_request_says_what_it_says_alone(name: str) -> None:
    """Whatever shares its batch, is found in the cache, takes its blocks, is aborted beside it or changed under it."""
    machine = type(f"Histories_{name}", (EngineHistories,), {"model": name, "num_rules": 0})
    long_or_brief = settings(
        max_examples=size(4, 100), stateful_step_count=size(40, 50), deadline=None, derandomize=not NIGHTLY,
        database=None, suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine, settings=long_or_brief)
        assert machine.num_rules >= size(100, 4_000)
        assert min(machine.num_answers, machine.num_cached, machine.num_preempted) > 0
    finally:
        model_and_engine(name)[1].backend.close()
        model_and_engine.cache_clear()
