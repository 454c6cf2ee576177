"""What the engine is doing, as values: requests under way, counters, blocks by holder, speed over time."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.outputs import StepTotals
from engine.params.sampling_params import SamplingParams

FREE, CACHED, SHARED = -1, -2, -3
"""Owners of a block that is not one request's own (see :class:`BlockMap`)."""
THROUGHPUT_SECONDS = 300
"""How far back :class:`Throughput` remembers."""


@dataclass(frozen=True, slots=True)
class RequestActivity:
    """A request under way. Counts are sums over its completions; times are seconds.

    ``state`` is ``running``, ``waiting`` or ``preempted``. ``num_cached_tokens`` is the prompt's part
    found in the prefix cache, None before the request was scheduled. ``tokens_per_second`` counts from
    the first token on. ``params`` are its values now.
    """

    request_id: str
    state: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int | None
    num_output_tokens: int
    tokens_per_second: float | None
    time_to_first_token: float | None
    age: float
    thinking: bool
    params: SamplingParams
    place: int | None = None
    """Which of the waiting requests it is, counted in the order in which they are to start; None once it runs."""

    @property
    def cached_share(self) -> float | None:
        """Share of the prompt found in the prefix cache, 0 to 1."""
        return None if self.num_cached_tokens is None else self.num_cached_tokens / self.num_prompt_tokens

    @property
    def prompt_share(self) -> float:
        """Share of the prompt that is computed, 0 to 1."""
        return min(1.0, self.num_computed_tokens / self.num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens of the second that began at ``second`` of the engine's clock (``time.monotonic``)."""

    second: int
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's counters between two steps. ``prefix_*`` and the last three count since the model was loaded.

    ``num_running`` and ``num_waiting`` count completions: a request with ``n`` of them counts ``n`` times.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_free_blocks: int = 0
    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    """Tokens of all prompts."""
    prefix_hits: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Computed here, not found in the prefix cache."""
    generation_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Activity:
    """A snapshot of the engine between two steps: its requests and its counters.

    ``rates`` has an entry per second with tokens, oldest first; ``second`` is the clock's now. ``age`` is the time in
    seconds since it was taken: not 0 where a step took long when it was asked for, and never more than that step.
    ``steps``: what all steps since the model was loaded did.
    """

    requests: tuple[RequestActivity, ...]
    stats: EngineStats
    rates: tuple[Rate, ...]
    second: int
    age: float = 0.0
    steps: StepTotals = field(default_factory=StepTotals)

    @property
    def num_running(self) -> int:
        """Requests that the scheduler runs, each counted once."""
        return sum(request.state == "running" for request in self.requests)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, preempted ones included, each counted once."""
        return len(self.requests) - self.num_running


@dataclass(frozen=True, slots=True, eq=False)
class BlockMap:
    """Who holds which KV block: ``owners[i]`` is :data:`FREE`, :data:`CACHED`, :data:`SHARED` (several requests hold
    it) or an index in ``request_ids``. ``age`` as in :class:`Activity`."""

    num_blocks: int
    block_size: int
    owners: NDArray[np.int32]
    request_ids: tuple[str, ...]
    age: float = 0.0


class Throughput:
    """Tokens per second of the last :data:`THROUGHPUT_SECONDS`. One thread adds; a token costs nothing extra."""

    def __init__(self) -> None:
        self._rates: deque[Rate] = deque()

    def add(self, now: float, prompt_tokens: int, generation_tokens: int) -> None:
        """Count a step's tokens; ``now`` is its end (``time.monotonic``)."""
        if not prompt_tokens and not generation_tokens:
            return
        second = int(now)
        if self._rates and self._rates[-1].second == second:
            last = self._rates.pop()
            prompt_tokens += last.prompt_tokens
            generation_tokens += last.generation_tokens
        self._rates.append(Rate(second, prompt_tokens, generation_tokens))
        while self._rates[0].second <= second - THROUGHPUT_SECONDS:
            self._rates.popleft()

    def recent(self, now: float) -> tuple[Rate, ...]:
        """The seconds with tokens, oldest first."""
        oldest = int(now) - THROUGHPUT_SECONDS
        return tuple(rate for rate in self._rates if rate.second > oldest)
