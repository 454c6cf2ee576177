"""Runs scheduled steps: token rows in, sampled tokens out, without waiting in between.

:meth:`ModelRunner.execute` builds a step and gives it as an :class:`InFlightStep`; its tokens are
read later, after the next step was submitted. That next step takes its input tokens from the
arrays of this one, on the device.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from engine.core.request import Request
from engine.core.step import ScheduledRequest, SchedulerOutput
from engine.outputs import LogprobsAtPosition
from engine.params.sampling_params import SamplingParams
from engine.runner.backends import Backend
from engine.runner.device.host import to_numpy
from engine.runner.kv.input_batch import InputBatch, Int32, picked, placed
from engine.runner.sampling.sampler import HostLogprobs, LogprobArrays, Sampler, SamplerOutput, to_logprobs
from engine.runner.sampling.sampling_metadata import SamplingPlan, SamplingRow

TokenText = Callable[[int], str]


class SampledToken(NamedTuple):
    """What a step sampled for one request. Token id -1: the model gave no finite logit."""

    scheduled: ScheduledRequest
    token_id: int
    logprobs: LogprobsAtPosition | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens ``first``, ``first + 1``, … of one request."""

    request: Request
    first: int
    positions: list[LogprobsAtPosition]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything that a step brought to the host."""

    tokens: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


class InFlightStep:
    """A step whose arrays may still be computing."""

    def __init__(
        self,
        scheduled_requests: tuple[ScheduledRequest, ...],
        sampled: SamplerOutput | None,
        prompts: list[tuple[Request, int, LogprobArrays]],
        barrier: list[mx.array],
        backend: Backend,
        plan: SamplingPlan | None = None,
    ) -> None:
        self.scheduled_requests = scheduled_requests
        self.sampling = [scheduled for scheduled in scheduled_requests if scheduled.samples]
        self.requests = [scheduled.request for scheduled in self.sampling]
        self.sampled = sampled
        self.prompts = prompts
        self.submitted = 0.0
        """When :meth:`submit` was called, by ``time.monotonic``."""
        self._barrier = barrier
        self._backend = backend
        self.plan = plan

    @cached_property
    def row_of(self) -> dict[Request, int]:
        """The row of the sampled tokens that is each request's."""
        return {scheduled.request: row for row, scheduled in enumerate(self.sampling)}

    def submit(self) -> None:
        """Start computing; returns before it is done."""
        self.submitted = time.monotonic()
        self._backend.settle()
        mx.async_eval(*self._arrays())  # type: ignore[no-untyped-call]

    def read(self, token_text: TokenText) -> StepResult:
        """Wait for the step and bring its tokens to the host."""
        mx.eval(*self._arrays())
        return StepResult(self._tokens(token_text), [self._prompt(*prompt, token_text) for prompt in self.prompts])

    def _arrays(self) -> list[mx.array]:
        arrays = list(self._barrier)
        if self.sampled is not None:
            arrays.append(self.sampled.token_ids)
            arrays += self.sampled.logprobs.arrays if self.sampled.logprobs else []
        for _, _, logprobs in self.prompts:
            arrays += logprobs.arrays
        return arrays

    def _tokens(self, token_text: TokenText) -> list[SampledToken]:
        if self.sampled is None:
            return []
        token_ids: list[int] = to_numpy(self.sampled.token_ids).tolist()
        if self.sampled.logprobs is None:
            return list(map(SampledToken, self.sampling, token_ids))
        host = self.sampled.logprobs.numpy()
        return [
            SampledToken(scheduled, token_id, _row_logprobs(scheduled, host, row, token_text))
            for row, (scheduled, token_id) in enumerate(zip(self.sampling, token_ids, strict=True))
        ]

    @staticmethod
    def _prompt(request: Request, first: int, arrays: LogprobArrays, token_text: TokenText) -> PromptLogprobs:
        host, num = arrays.numpy(), request.params.prompt_logprobs
        assert num is not None, "prompt logprobs were not asked for"
        rows = range(len(host.sampled_ids))
        return PromptLogprobs(request, first, [to_logprobs(host, row, num, token_text) for row in rows])


def _row_logprobs(
    scheduled: ScheduledRequest, host: HostLogprobs, row: int, token_text: TokenText
) -> LogprobsAtPosition | None:
    num = scheduled.request.params.logprobs
    return None if num is None else to_logprobs(host, row, num, token_text)


@dataclass(frozen=True, slots=True)
class _Pending:
    """Where the last tokens of a step's sampling requests are: ``rows`` of the step in flight, -1 for the host.

    ``same``: all of them are the step in flight's, in its order.
    """

    rows: Int32
    same: bool = False


class ModelRunner:
    """Owns the model, its KV memory and the sampler. One thread only: the one that loaded the model."""

    def __init__(
        self, backend: Backend, vocab_size: int, *, max_blocks: Sequence[int], close: Callable[[], None] | None = None,
        sampler: Sampler | None = None,
    ) -> None:  # fmt: skip
        self.backend = backend
        self._close = close or backend.close
        self.vocab_size = vocab_size
        self.max_blocks = tuple(max_blocks)
        self._sampler = sampler or Sampler()
        self._last: InFlightStep | None = None
        self._to_blank: Sequence[Int32] | None = None
        self._plan: SamplingPlan | None = None
        self._planned: tuple[list[Request], list[SamplingParams]] = [], []
        """What the plan is for."""

    def execute(self, step: SchedulerOutput) -> InFlightStep:
        """Build the step's computation; nothing is waited for."""
        for request in step.preempted:
            self.backend.forget(request)
        self._blank()
        batch = InputBatch.build(step.scheduled_requests)
        self.backend.make_room(batch, self.max_blocks)
        wanted = [_wanted_rows(scheduled) for scheduled in batch.scheduled_requests]
        sampling = [scheduled for scheduled in batch.scheduled_requests if scheduled.samples]
        pending = self._pending(sampling)
        logits = self.backend.forward(batch, self._tokens(batch, pending), wanted)
        in_flight = self._sample(batch, wanted, logits, sampling, pending)
        self._last = in_flight
        return in_flight

    def discard(self, step: InFlightStep) -> bool:
        """Take back the newest step, if it was not submitted; False where its effects cannot be undone."""
        assert step is self._last, "only the newest step can be taken back"
        if not self.backend.undo():
            return False
        self._forget_last()
        return True

    def resize(self, max_blocks: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """Hold at most ``max_blocks`` blocks, by group, after moving {old: new}. No step may be in flight."""
        self._forget_last()
        self._blank()
        self.max_blocks = tuple(max_blocks)
        self.backend.resize(self.max_blocks, moves)

    def recover(self) -> None:
        """After a step that failed: forget it and start from empty pages."""
        self._forget_last()
        self._to_blank = None
        self.backend.reset()

    def blank(self, blocks: Sequence[Int32]) -> None:
        """Blank ``blocks``, by group, which nobody holds now, before the next step: a step in flight may be undone."""
        self._to_blank = blocks

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that is over."""
        self.backend.forget(request)

    def close(self) -> None:
        """Give all memory back."""
        self._forget_last()
        self._close()

    def _blank(self) -> None:
        blocks, self._to_blank = self._to_blank, None
        if blocks is not None:
            self.backend.blank(blocks)

    def _forget_last(self) -> None:
        self._last = self._plan = None

    def _pending(self, sampling: Sequence[ScheduledRequest]) -> _Pending:
        """Where the last tokens of ``sampling`` are."""
        pending = [scheduled.pending for scheduled in sampling]
        if not any(pending):
            return _Pending(np.full(len(pending), -1, dtype=np.int32))
        last = self._last
        assert last is not None, "a token is pending but no step is in flight"
        if all(pending) and last.requests == [scheduled.request for scheduled in sampling]:
            return _Pending(np.arange(len(pending), dtype=np.int32), same=True)
        rows = [last.row_of[scheduled.request] if scheduled.pending else -1 for scheduled in sampling]
        return _Pending(np.array(rows, dtype=np.int32))

    def _tokens(self, batch: InputBatch, pending: _Pending) -> mx.array:
        """Token ids [T]: known ones from the host, the others from the step in flight."""
        sources = pending.rows[pending.rows >= 0]
        if not len(sources):
            return mx.array(batch.token_ids)
        assert self._last is not None, "a token is pending but no step is in flight"
        assert self._last.sampled is not None, "the step in flight samples nothing"
        # A request whose last token is pending has that token alone in the step.
        every = len(sources) == batch.num_rows
        newest = self._last.sampled.token_ids
        if every:
            return newest if pending.same else picked(newest, sources)
        rows = [row for one, row in zip(batch.scheduled_requests, batch.first_rows, strict=True) if one.pending]
        known = mx.array(batch.token_ids)
        return known + placed(picked(newest, sources), np.array(rows, dtype=np.int32), batch.num_rows)

    def _sample(
        self, batch: InputBatch, wanted: list[Int32], logits: mx.array, sampling: list[ScheduledRequest],
        pending: _Pending,
    ) -> InFlightStep:  # fmt: skip
        prompts: list[tuple[Request, int, LogprobArrays]] = []
        if sum(map(len, wanted)) == len(sampling):  # nobody asks for logprobs of a prompt
            last = logits
        else:
            prompts, last = self._split(batch, wanted, logits)
        if not sampling:
            # Logits of one chunk say nothing of another that wants none.
            barrier = [*([logits] if logits.size else []), *self.backend.barrier()]
            return InFlightStep(batch.scheduled_requests, None, prompts, barrier, self.backend)
        plan = self._plan_for(sampling)
        follows = pending.same and self._last is not None and self._last.plan is plan
        positions = np.array([scheduled.start + scheduled.num_tokens for scheduled in sampling], dtype=np.int32)
        metadata = plan.metadata(positions, pending.rows, follows=follows)
        newest = self._last.sampled.token_ids if self._last and self._last.sampled else None
        sampled = self._sampler.sample(last, metadata, newest)
        # A chunk that samples nothing is computed in its step too, not with the next one.
        barrier = [] if len(sampling) == len(batch.scheduled_requests) else self.backend.barrier()
        return InFlightStep(batch.scheduled_requests, sampled, prompts, barrier, self.backend, plan)

    def _split(
        self, batch: InputBatch, wanted: list[Int32], logits: mx.array
    ) -> tuple[list[tuple[Request, int, LogprobArrays]], mx.array]:
        """Logprobs of prompts that were asked for, and the logits of the rows that sample."""
        prompts: list[tuple[Request, int, LogprobArrays]] = []
        rows: list[int] = []
        start = 0
        for scheduled, mine in zip(batch.scheduled_requests, wanted, strict=True):
            end = start + len(mine)
            num_prompt = len(mine) - scheduled.samples
            if num_prompt:
                prompts.append(self._prompt_logprobs(scheduled, logits[start : start + num_prompt]))
            if scheduled.samples:
                rows.append(end - 1)
            start = end
        return prompts, logits[mx.array(rows)] if rows else logits

    def _plan_for(self, sampling: Sequence[ScheduledRequest]) -> SamplingPlan:
        """The last step's plan if it serves this one: the same requests with the same values."""
        requests = [scheduled.request for scheduled in sampling]
        wishes = requests, [request.params for request in requests]
        if self._plan is None or self._planned != wishes:
            self._plan, self._planned = SamplingPlan([_row(request) for request in requests], self.vocab_size), wishes
        return self._plan

    def _prompt_logprobs(self, scheduled: ScheduledRequest, logits: mx.array) -> tuple[Request, int, LogprobArrays]:
        num = scheduled.request.params.prompt_logprobs
        assert num is not None, "prompt logprobs were not asked for"
        first = max(scheduled.start + 1, scheduled.request.scored_from)
        next_ids = mx.array(scheduled.request.prompt_token_ids[first : first + logits.shape[0]], dtype=mx.int32)
        return scheduled.request, first, self._sampler.prompt_logprobs(logits, next_ids, num)


def _row(request: Request) -> SamplingRow:
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        eos_token_ids=request.eos_token_ids,
        bad_words_ids=request.bad_words_token_ids,
        guide=request.guide,
    )


_ONLY_ROW: Int32 = np.zeros(1, dtype=np.int32)


def _wanted_rows(scheduled: ScheduledRequest) -> Int32:
    """Rows of a scheduled request whose logits are needed: prompt positions to score, then the row that samples."""
    if scheduled.num_tokens == 1 and scheduled.samples:  # no room for a row of the prompt before it
        return _ONLY_ROW
    rows: list[int] = []
    if scheduled.request.params.prompt_logprobs is not None:
        first = max(scheduled.start, scheduled.request.scored_from - 1)
        last = min(scheduled.end, scheduled.request.num_prompt_tokens - 1)
        rows = list(range(first - scheduled.start, max(first, last) - scheduled.start))
    if scheduled.samples:
        rows.append(scheduled.num_tokens - 1)
    return np.array(rows, dtype=np.int32)
