"""An hour of an engine whose model and clock a script moves, and what is to be counted of it: by arithmetic alone.

The scheduler, the pages' bookkeeping, the engine and its metrics are the real ones. Times are seconds from the hour's
begin and multiples of 1/4, so that sums are exact. A step takes :data:`STEP`, from when its tokens are waited for.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import NewRequest, Request
from engine.core.scheduler import Scheduler
from engine.core.step import ScheduledRequest, SchedulerOutput
from engine.core.token_guide import TokenGuide
from engine.errors import GenerationError
from engine.memory.cache_spec import FullAttentionSpec
from engine.memory.step_cost import AdmissionControl, StepCost
from engine.params.sampling_params import SamplingParams
from engine.runner.model_runner import ModelRunner, SampledToken, StepResult
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.metrics import EngineMetrics
from engine.runtime.stream import RequestStream
from engine.text.tokens.detokenizer import Detokenizer, DetokenizerStep
from tests.engine.core.stand_ins import WaitingGuide

STEP, BLOCK_SIZE, NUM_BLOCKS, MOST_RUNNING = 0.25, 4, 12, 3
EOS, REPEATED, NO_TOKEN, WORD = 999, 998, -1, 500
BEGIN = 4096.0
"""What the clock says when the hour begins: exact, with quarters of a second."""


class Clock:
    """Time as the script has it."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> float:
        return self.now

    def at(self, second: float) -> None:
        """It is so many seconds after the hour's begin."""
        assert BEGIN + second >= self.now, "time goes forward"
        self.now = BEGIN + second


class ScriptedStep:
    """A step on a device that takes :data:`STEP` for it."""

    def __init__(self, scheduled: Sequence[ScheduledRequest], runner: "ScriptedRunner") -> None:
        self.scheduled_requests = tuple(scheduled)
        self.submitted = 0.0
        self._runner = runner

    def submit(self) -> None:
        self.submitted = self._runner.clock()

    def read(self, _token_text: Callable[[int], str]) -> StepResult:
        self._runner.clock.now += STEP
        sampling = [scheduled for scheduled in self.scheduled_requests if scheduled.samples]
        return StepResult([SampledToken(each, self._runner.token(each.request)) for each in sampling])


class ScriptedRunner:
    """Fits :class:`ModelRunner`. ``scripts``: the last tokens of completions, by name; all before them are words."""

    def __init__(self, clock: Clock) -> None:
        self.backend = SimpleNamespace(paged=True)
        self.clock = clock
        self.scripts: dict[str, Sequence[int]] = {}
        self.fails_after: float | None = None

    def execute(self, step: SchedulerOutput) -> ScriptedStep:
        if self.fails_after is not None:
            self.clock.now += self.fails_after
            self.fails_after = None
            raise RuntimeError("the script says so")
        return ScriptedStep(step.scheduled_requests, self)

    def token(self, request: Request) -> int:
        script = self.scripts.get(f"{request.request_id}/{request.index}", ())
        place = len(request.output_token_ids)
        return script[place] if place < len(script) else WORD

    def discard(self, _step: ScriptedStep) -> bool:
        return True

    def forget(self, _request: Request) -> None:
        """Nothing is kept."""

    def recover(self) -> None:
        """Nothing was lost."""

    def blank(self, _blocks: object) -> None:
        """There are no pages."""

    def close(self) -> None:
        """Nothing is held."""


class Wordless:
    """Fits :class:`Detokenizer`: texts do not matter here."""

    def next_text(self, _token: int) -> str | None:
        return "x"

    def step(self, tokens: Sequence[int], **_how: bool) -> DetokenizerStep:
        return DetokenizerStep("", None, len(tokens))


@dataclass
class Line:
    """What is to be counted of one completion. ``tokens`` are the times at which it had them."""

    name: str
    num_prompt: int
    arrived: float
    scheduled: float | None
    tokens: list[float]
    ended: float
    reason: str
    max_tokens: int
    cached: int = 0
    n: int = 1
    index: int = 0


@dataclass
class Hour:
    """The engine and its clock; ``ledger`` and ``steps`` (tokens of each) are filled in by who writes the script."""

    clock: Clock
    engine: LLMEngine
    runner: ScriptedRunner
    metrics: EngineMetrics
    ledger: list[Line] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    def ask(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int,
        *scripts: Sequence[int],
        guide: TokenGuide | None = None,
    ) -> None:
        """Queue a request with as many completions as ``scripts``; none: one of words alone."""
        params = SamplingParams(max_tokens=max_tokens, n=max(1, len(scripts)))
        self.runner.scripts |= {f"{name}/{index}": script for index, script in enumerate(scripts)}
        stream = RequestStream(name, None, list(prompt), params, lambda: None)
        make_guide = None if guide is None else lambda: guide
        new = NewRequest(name, list(prompt), params, max_tokens, frozenset({EOS}), seed=0, make_guide=make_guide)
        self.engine.add_request(new, stream)

    def step(self, times: int = 1) -> None:
        """Let the engine's thread do so many rounds; a round that fails ends as it does there."""
        for _ in range(times):
            try:
                self.engine.step()
            except RuntimeError as error:
                self.engine.fail_step(GenerationError(str(error)))

    def finish(self) -> None:
        """Go on until nothing is left to do."""
        while self.engine.has_work:
            self.step()

    def expect(self, *lines: Line, steps: Sequence[int]) -> None:
        """Write down what was to be counted."""
        self.ledger += lines
        self.steps += steps


def make_hour(monkeypatch: pytest.MonkeyPatch) -> Hour:
    """An engine of 12 pages for at most 3 completions at once, with nothing to do yet."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    runner, metrics = ScriptedRunner(clock), EngineMetrics("m", max_model_len=100)
    spec = FullAttentionSpec((0,), bytes_per_token=1, block_size=BLOCK_SIZE)
    kv = KVCacheManager.of_specs([(spec, NUM_BLOCKS)], enable_caching=True)
    engine = LLMEngine(
        Scheduler(kv, max_num_seqs=MOST_RUNNING, max_num_batched_tokens=64),
        cast(ModelRunner, runner),
        lambda _prompt, _params: cast(Detokenizer, Wordless()),
        str,
        metrics,
        submit_first=False,
        admission=AdmissionControl(StepCost(0.0), 0, lambda: 1 << 40),
        max_model_len=100,
    )
    metrics.set_cache_config(block_size=BLOCK_SIZE, num_gpu_blocks=NUM_BLOCKS)
    return Hour(clock, engine, runner, metrics)


def play(hour: Hour) -> Iterator[tuple[str, int, int, int]]:
    """The script. Gives, at some moments, what is going on and the state: running, waiting, pages held."""
    yield "nothing yet", 0, 0, 0
    hour.ask("alone", range(1, 9), 4)
    hour.clock.at(2)  # the thread was busy
    hour.step()
    yield "one runs", 1, 0, 2
    hour.finish()
    hour.expect(Line("alone", 8, 0, 2, [2.25, 2.5, 2.75, 3], 3, "length", 4), steps=[8 + 1, 1, 1, 1])

    hour.clock.at(100)
    hour.ask("found again", range(1, 13), 16, [WORD, WORD, EOS])
    hour.finish()
    line = Line("found again", 12, 100, 100, [100.25, 100.5, 100.75], 100.75, "stop", 16, cached=8)
    hour.expect(line, steps=[4 + 1, 1, 1])

    hour.clock.at(200)
    hour.ask("two completions", range(21, 27), 3, (), [WORD, EOS])
    hour.finish()
    both = {"num_prompt": 6, "arrived": 200, "scheduled": 200, "max_tokens": 3, "n": 2}
    first = Line("two completions", tokens=[200.25, 200.5, 200.75], ended=200.75, reason="length", **both)
    second = Line("two completions", tokens=[200.25, 200.5], ended=200.5, reason="stop", index=1, **both)
    hour.expect(first, second, steps=[6 + 2, 2, 1])

    yield from play_ends(hour)
    yield from play_preemption(hour)
    play_failing_step(hour)
    yield "a step failed", 0, 0, 0
    hour.clock.at(3600)
    yield "the hour is over", 0, 0, 0


def play_ends(hour: Hour) -> Iterator[tuple[str, int, int, int]]:
    """Three run and one waits; it is aborted, then one of the three, another has no token, the last repeats itself."""
    hour.clock.at(300)
    guide = WaitingGuide(first=10**9, ends=lambda token: "repetition" if token == REPEATED else None)
    hour.ask("left early", range(31, 36), 8)
    hour.ask("no token", range(41, 46), 8, [WORD, WORD, NO_TOKEN])
    hour.ask("repeats", range(51, 56), 8, [WORD, WORD, WORD, REPEATED], guide=guide)
    hour.ask("never ran", range(61, 66), 8)
    hour.step()
    yield "one waits for a place", 3, 1, 6
    hour.step()
    hour.engine.abort_request("never ran")
    yield "the waiting one was aborted", 3, 0, 6
    hour.engine.abort_request("left early")
    yield "a running one was aborted", 2, 0, 4
    hour.finish()
    hour.expect(
        Line("never ran", 5, 300, None, [], 300.25, "abort", 8),
        Line("left early", 5, 300, 300, [300.25], 300.25, "abort", 8),
        Line("no token", 5, 300, 300, [300.25, 300.5], 300.75, "error", 8),
        Line("repeats", 5, 300, 300, [300.25, 300.5, 300.75, 301], 301, "repetition", 8),
        steps=[15 + 3, 2, 1, 1],
    )


def play_preemption(hour: Hour) -> Iterator[tuple[str, int, int, int]]:
    """Two that grow to 7 pages each, of 12: the later one computes its first 25 tokens once more, and pauses 1.25 s."""
    hour.clock.at(400)
    hour.ask("first", range(71, 91), 9)
    hour.clock.at(400.25)
    hour.ask("gives way", range(101, 121), 9)
    hour.clock.at(400.5)
    hour.step(6)
    yield "one was preempted", 1, 1, 7
    hour.finish()
    steady = [400.5 + STEP * place for place in range(1, 10)]
    late = [*steady[:5], 403, 403.25, 403.5, 403.75]
    hour.expect(
        Line("first", 20, 400, 400.5, steady, 402.75, "length", 9),
        Line("gives way", 20, 400.25, 400.5, late, 403.75, "length", 9),
        steps=[40 + 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1],
    )
    hour.num_preemptions += 1


def play_failing_step(hour: Hour) -> None:
    """A step fails after half a second; the token of the step before is read all the same."""
    hour.clock.at(500)
    hour.ask("in flight", range(141, 144), 1)
    hour.step()
    hour.ask("in the step", range(131, 135), 4)
    hour.runner.fails_after = 0.5
    hour.finish()
    hour.expect(
        Line("in flight", 3, 500, 500, [500.75], 500.75, "length", 1),
        Line("in the step", 4, 500, 500, [], 500.75, "error", 4),
        steps=[3 + 1],
    )


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name, labels but for model_name and engine) -> value."""
VALUES_OF: Mapping[str, Callable[[Line], Sequence[float]]] = {
    "time_to_first_token_seconds": lambda line: [token - line.arrived for token in line.tokens[:1]],
    "inter_token_latency_seconds": lambda line: [b - a for a, b in zip(line.tokens, line.tokens[1:], strict=False)],
    "request_time_per_output_token_seconds": lambda line: (
        [(line.tokens[-1] - line.tokens[0]) / (len(line.tokens) - 1)] if len(line.tokens) > 1 else []
    ),
    "e2e_request_latency_seconds": lambda line: [line.ended - line.arrived],
    "request_queue_time_seconds": lambda line: [] if line.scheduled is None else [line.scheduled - line.arrived],
    "request_prefill_time_seconds": lambda line: [token - cast(float, line.scheduled) for token in line.tokens[:1]],
    "request_inference_time_seconds": lambda line: [token - cast(float, line.scheduled) for token in line.tokens[-1:]],
    "request_decode_time_seconds": lambda line: [token - line.tokens[0] for token in line.tokens[-1:]],
    "request_prompt_tokens": lambda line: [line.num_prompt],
    "request_generation_tokens": lambda line: [len(line.tokens)],
    "request_params_max_tokens": lambda line: [line.max_tokens],
    "request_params_n": lambda line: [] if line.index else [line.n],
    "request_prefill_kv_computed_tokens": lambda line: (
        [line.num_prompt - line.cached] if line.tokens and not line.index else []
    ),
}
"""By histogram: what one completion adds to it."""
SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUESTS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
COUNTS = (1, 2, 5, 10, 20, 50, 100)
BOUNDS: Mapping[str, Sequence[float]] = {
    "time_to_first_token_seconds": FIRST,
    **dict.fromkeys(
        ("inter_token_latency_seconds", "time_per_output_token_seconds", "request_time_per_output_token_seconds"),
        SECONDS,
    ),
    **dict.fromkeys(
        [name for name in VALUES_OF if name.startswith(("e2e", "request")) and "_time_s" in name], REQUESTS
    ),
    "e2e_request_latency_seconds": REQUESTS,
    **dict.fromkeys([name for name in VALUES_OF if name.endswith("_tokens")], COUNTS),
    "request_max_num_generation_tokens": COUNTS,
    "request_params_n": (1, 2, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
"""vLLM's upper bounds; those of counts go up to the longest context."""


def histogram(name: str, values: Sequence[float], bounds: Sequence[float], **labels: str) -> Samples:
    """A histogram's samples: how many ``values`` are at most each bound, how many in all, and their sum."""
    own = tuple(sorted(labels.items()))
    upto = {str(float(bound)): sum(value <= bound for value in values) for bound in bounds} | {"+Inf": len(values)}
    found: Samples = {(f"{name}_bucket", (*own, ("le", bound))): number for bound, number in upto.items()}
    return {**found, (f"{name}_count", own): len(values), (f"{name}_sum", own): sum(values)}


def expected(hour: Hour) -> Samples:
    """Every sample of the engine's after the hour."""
    lines = hour.ledger
    prompts = [line for line in lines if line.tokens and not line.index]
    queries, hits = sum(line.num_prompt for line in prompts), sum(line.cached for line in prompts)
    longest: dict[str, int] = {}
    for line in lines:
        longest[line.name] = max(longest.get(line.name, 0), len(line.tokens))
    values: dict[str, Sequence[Any]] = {
        name: [value for line in lines for value in of(line)] for name, of in VALUES_OF.items()
    }
    values["time_per_output_token_seconds"] = values["inter_token_latency_seconds"]
    values["request_max_num_generation_tokens"] = list(longest.values())
    values["iteration_tokens_total"] = hour.steps
    found: Samples = {
        ("vllm:prompt_tokens_total", ()): queries,
        ("vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)): queries - hits,
        ("vllm:prompt_tokens_by_source_total", (("source", "local_cache_hit"),)): hits,
        ("vllm:prefix_cache_queries_total", ()): queries,
        ("vllm:prefix_cache_hits_total", ()): hits,
        ("vllm:generation_tokens_total", ()): sum(len(line.tokens) for line in lines),
        ("vllm:num_preemptions_total", ()): hour.num_preemptions,
        ("vllm:cache_config_info", (("block_size", "4"), ("num_gpu_blocks", "12"))): 1,
    }
    for reason in ("stop", "length", "abort", "error", "repetition"):
        number = sum(line.reason == reason for line in lines)
        found["vllm:request_success_total", (("finished_reason", reason),)] = number
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
        found[f"vllm:{name}", ()] = 0
    for name, every in values.items():
        found |= histogram(f"vllm:{name}", every, BOUNDS[name])
    return found
