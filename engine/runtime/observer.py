"""What the engine does, told to its metrics, its counters and its rates: all arithmetic on steps is here."""

from dataclasses import dataclass, fields

from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.runtime.activity import Throughput
from engine.runtime.metrics import EngineMetrics


@dataclass(slots=True)
class TokenCounts:
    """Tokens since the model was loaded; see :class:`engine.runtime.activity.EngineStats`."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class EngineObserver:
    """Counts and measures for one engine, on its thread. ``throughput``: tokens per second of the last minutes."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self.counts = TokenCounts()
        self.throughput = Throughput()
        self._metrics = metrics
        self._token_gaps: dict[float, int] = {}
        """Time of the token before -> how many tokens of this step follow one of then."""
        self._step_prompt_tokens = 0
        self._num_preemptions = 0

    def token(self, request: Request, now: float) -> None:
        """A request has a token."""
        metrics = request.metrics
        last, metrics.last_token_time = metrics.last_token_time, now
        if last is not None:
            self._token_gaps[last] = self._token_gaps.get(last, 0) + 1
        else:
            metrics.first_token_time = now
            self._metrics.observe_first_token(now - metrics.arrival_time)

    def prompt(self, request: Request) -> None:
        """A request's prompt is computed: its first token is there."""
        queries, hits = request.num_prompt_tokens, max(0, request.num_cached_tokens)
        self._metrics.observe_prefix(queries, hits)
        self._step_prompt_tokens += queries - hits
        self.counts.prefix_queries += queries
        self.counts.prefix_hits += hits
        self.counts.prompt_tokens += queries - hits

    def step(self, num_tokens: int, now: float) -> None:
        """A step's tokens, so many, were handed out."""
        gaps, self._token_gaps = self._token_gaps, {}
        for last, count in gaps.items():
            self._metrics.observe_inter_token(now - last, count)
        self._metrics.observe_step(self._step_prompt_tokens, num_tokens)
        self.throughput.add(now, self._step_prompt_tokens, num_tokens)
        self._step_prompt_tokens = 0
        self.counts.generation_tokens += num_tokens

    def finished(self, request: Request) -> None:
        """One completion is over, for whatever reason."""
        self._metrics.observe_finished(
            request.metrics,
            request.num_prompt_tokens,
            len(request.output_token_ids),
            request.max_tokens,
            request.status.finish_reason or "",
        )

    def closed(self, completions: list[Request]) -> None:
        """All completions of a request are over; none where it was refused before there was one."""
        if completions:
            longest = max(len(request.output_token_ids) for request in completions)
            self._metrics.observe_closed(completions[0].params.n, longest)

    def state(self, scheduler: Scheduler) -> None:
        """What runs, waits and was preempted, whenever that may have changed."""
        self._metrics.set_state(len(scheduler.running), len(scheduler.waiting), scheduler.kv.usage)
        self._metrics.observe_preemptions(scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = scheduler.num_preemptions

    def ended(self) -> None:
        """The engine is closed: nothing runs or waits any more."""
        self._metrics.set_state(0, 0, 0.0)
