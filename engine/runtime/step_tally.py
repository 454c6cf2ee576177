"""What steps do, counted as they end: a few additions a step, from which floors are computed when somebody asks."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from engine.core.cache_groups import KVCacheGroup, SlidingWindowGroup
from engine.core.step import ScheduledRequest
from engine.outputs import StepTotals


class StepTally:
    """Sums over all steps, and marks in the metrics of the requests that were in them. One thread.

    ``windows``, by group of the plan: how many tokens back its layers attend, None for all, 0 where they read none.
    """

    def __init__(self, windows: Sequence[int | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._windows = tuple(windows)
        self._clock = clock
        self._ended = 0.0
        nothing = (0,) * len(self._windows)
        self.totals = StepTotals(context=nothing, pairs=nothing)

    @classmethod
    def of_groups(cls, groups: Sequence[KVCacheGroup]) -> Self:
        """For a plan's groups: recurrent layers read no tokens back, sliding ones those of their window."""
        return cls(
            [
                0 if group.recurrent else group.window if isinstance(group, SlidingWindowGroup) else None
                for group in groups
            ]
        )

    def add(self, step: Sequence[ScheduledRequest], submitted: float) -> None:
        """Count a ``step`` whose tokens are known now. Before them, the device may have been busy with another."""
        now = self._clock()
        seconds = now - max(submitted, self._ended)
        self._ended = now
        before = self.totals
        is_decode = all(scheduled.num_tokens == 1 for scheduled in step)
        after = self.totals = (self._with_decode if is_decode else self._with_prompts)(before, step, seconds)
        for scheduled in step:
            request = scheduled.request
            if request.finished:
                continue
            metrics = request.metrics
            if metrics.steps_before is None:
                metrics.steps_before = before
            if scheduled.samples and not request.output_token_ids:
                metrics.steps_first = after
            metrics.steps_last = after

    def _with_decode(self, before: StepTotals, step: Sequence[ScheduledRequest], seconds: float) -> StepTotals:
        ends = [scheduled.start + 1 for scheduled in step]
        return before._replace(
            decodes=before.decodes + 1,
            decode_seconds=before.decode_seconds + seconds,
            rows=before.rows + len(ends),
            context=tuple(
                known + (sum(ends) if window is None else sum(min(end, window) for end in ends) if window else 0)
                for known, window in zip(before.context, self._windows, strict=True)
            ),
        )

    def _with_prompts(self, before: StepTotals, step: Sequence[ScheduledRequest], seconds: float) -> StepTotals:
        mixed = any(scheduled.request.output_token_ids or scheduled.pending for scheduled in step)
        return before._replace(
            prompts=before.prompts + 1,
            prompt_seconds=before.prompt_seconds + seconds,
            prompt_tokens=before.prompt_tokens + sum(scheduled.num_tokens for scheduled in step),
            pairs=tuple(
                known + sum(attended(scheduled.start, scheduled.end, window) for scheduled in step)
                for known, window in zip(before.pairs, self._windows, strict=True)
            ),
            mixed=before.mixed + mixed,
            mixed_seconds=before.mixed_seconds + seconds * mixed,
        )


def attended(start: int, end: int, window: int | None) -> int:
    """Sum over the tokens [start, end) of a sequence of how many tokens each attends to, itself included."""
    if window is None:
        return (end * (end + 1) - start * (start + 1)) // 2
    growing = min(end, max(start, window))
    return attended(start, growing, None) + (end - growing) * window
