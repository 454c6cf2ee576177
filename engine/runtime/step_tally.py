"""What steps do, counted as they end: a few additions a step, from which floors are computed when somebody asks."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from engine.core.cache_groups import KVCacheGroup, SlidingWindowGroup
from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.outputs import StepMark, StepTotals


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
        self._decoding: tuple[Request, ...] = ()
        self._mark = StepMark(self.totals)

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
        requests, starts, counts, _, samples, *_ = zip(*step, strict=True)
        before, is_decode = self.totals, max(counts) == 1
        if is_decode:
            self.totals = self._with_decode(before, starts, seconds)
        else:
            self.totals = self._with_prompts(before, step, seconds)
        if is_decode and requests == self._decoding:  # as in most steps: nothing to do for each of them
            self._mark.totals = self.totals
            return
        self._decoding = requests if is_decode and all(samples) else ()
        self._mark = StepMark(self.totals)
        for scheduled in step:
            self._note(scheduled, before)

    def _note(self, scheduled: ScheduledRequest, before: StepTotals) -> None:
        """Mark a request that was not in the step before with those that are in this one."""
        request = scheduled.request
        if request.finished:
            return
        metrics = request.metrics
        if metrics.steps_before is None:
            metrics.steps_before = before
        if scheduled.samples and not request.output_token_ids:
            metrics.steps_first = self.totals
        metrics.steps = self._mark

    def _with_decode(self, before: StepTotals, starts: Sequence[int], seconds: float) -> StepTotals:
        return before._replace(
            decodes=before.decodes + 1,
            decode_seconds=before.decode_seconds + seconds,
            rows=before.rows + len(starts),
            context=tuple(
                known + _seen(starts, window) for known, window in zip(before.context, self._windows, strict=True)
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


def _seen(starts: Sequence[int], window: int | None) -> int:
    """How many tokens the tokens at ``starts`` attend to in all."""
    if window is None or max(starts) < window:
        return sum(starts) + len(starts)
    return sum(min(start + 1, window) for start in starts)


def attended(start: int, end: int, window: int | None) -> int:
    """Sum over the tokens [start, end) of a sequence of how many tokens each attends to, itself included."""
    if window is None:
        return (end * (end + 1) - start * (start + 1)) // 2
    growing = min(end, max(start, window))
    return attended(start, growing, None) + (end - growing) * window
