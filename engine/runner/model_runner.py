"""Runs scheduled steps: token rows in, sampled tokens out, without waiting in between.

:meth:`ModelRunner.execute` builds a step and gives it as an :class:`InFlightStep`; its tokens are
read later, after the next step was submitted. That next step takes its input tokens from the
arrays of this one, on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from engine.core.request import Request
from engine.core.step import ScheduledRequest, SchedulerOutput
from engine.outputs import LogprobsAtPosition
from engine.runner.backends import Backend
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.sampling.sampler import HostLogprobs, LogprobArrays, Sampler, SamplerOutput, to_logprobs
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingRow

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
    ) -> None:
        self.scheduled_requests = scheduled_requests
        self.sampling = [scheduled for scheduled in scheduled_requests if scheduled.samples]
        self.sampled = sampled
        self.prompts = prompts
        self._barrier = barrier
        self._backend = backend

    @cached_property
    def row_of(self) -> dict[Request, int]:
        """The row of the sampled tokens that is each request's."""
        return {scheduled.request: row for row, scheduled in enumerate(self.sampling)}

    def submit(self) -> None:
        """Start computing; returns before it is done."""
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
        token_ids: list[int] = np.array(self.sampled.token_ids).tolist()
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


class ModelRunner:
    """Owns the model, its KV memory and the sampler. One thread only: the one that loaded the model."""

    def __init__(
        self, backend: Backend, vocab_size: int, *, max_blocks: Sequence[int], close: Callable[[], None] | None = None
    ) -> None:
        self.backend = backend
        self._close = close or backend.close
        self.vocab_size = vocab_size
        self.max_blocks = tuple(max_blocks)
        self._sampler = Sampler()
        self._last: InFlightStep | None = None

    def execute(self, step: SchedulerOutput) -> InFlightStep:
        """Build the step's computation; nothing is waited for."""
        for request in step.preempted:
            self.backend.forget(request)
        batch = InputBatch.build(step.scheduled_requests)
        self.backend.make_room(batch, self.max_blocks)
        wanted = [_wanted_rows(scheduled) for scheduled in batch.scheduled_requests]
        logits = self.backend.forward(batch, self._tokens(batch), wanted)
        in_flight = self._sample(batch, wanted, logits)
        self._last = in_flight
        return in_flight

    def discard(self, step: InFlightStep) -> bool:
        """Take back the newest step, if it was not submitted; False where its effects cannot be undone."""
        assert step is self._last, "only the newest step can be taken back"
        if not self.backend.undo():
            return False
        self._last = None
        return True

    def resize(self, max_blocks: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """Hold at most ``max_blocks`` blocks, by group, after moving {old: new}. No step may be in flight."""
        self._last = None
        self.max_blocks = tuple(max_blocks)
        self.backend.resize(self.max_blocks, moves)

    def recover(self) -> None:
        """After a step that failed: forget it and start from empty pages."""
        self._last = None
        self.backend.reset()

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that is over."""
        self.backend.forget(request)

    def close(self) -> None:
        """Give all memory back."""
        self._last = None
        self._close()

    def _tokens(self, batch: InputBatch) -> mx.array:
        """Token ids [T]: known ones from the host, the others from the step in flight."""
        known = mx.array(batch.token_ids)
        rows = [row for one, row in zip(batch.scheduled_requests, batch.first_rows, strict=True) if one.pending]
        # A request whose last token is pending has that token alone in the step.
        if not rows:
            return known
        assert self._last is not None, "a token is pending but no step is in flight"
        assert self._last.sampled is not None, "the step in flight samples nothing"
        sources = [self._last.row_of[scheduled.request] for scheduled in batch.scheduled_requests if scheduled.pending]
        pending = self._last.sampled.token_ids[mx.array(sources)]
        return pending if len(rows) == batch.num_rows else known.at[mx.array(rows)].add(pending)

    def _sample(self, batch: InputBatch, wanted: list[Int32], logits: mx.array) -> InFlightStep:
        starts = np.cumsum([0, *(len(rows) for rows in wanted)])
        sampling = [scheduled for scheduled in batch.scheduled_requests if scheduled.samples]
        prompts = []
        for scheduled, rows, start in zip(batch.scheduled_requests, wanted, starts[:-1], strict=True):
            num_prompt = len(rows) - scheduled.samples
            if num_prompt:
                prompts.append(self._prompt_logprobs(scheduled, logits[int(start) : int(start) + num_prompt]))
        if not sampling:
            barrier = [logits] if logits.size else self.backend.barrier()
            return InFlightStep(batch.scheduled_requests, None, prompts, barrier, self.backend)
        ends = [int(end) - 1 for one, end in zip(batch.scheduled_requests, starts[1:], strict=True) if one.samples]
        last = logits if len(ends) == logits.shape[0] else logits[mx.array(ends)]
        metadata = SamplingMetadata.build([self._row(scheduled) for scheduled in sampling], self.vocab_size)
        pending = self._last.sampled.token_ids if self._last and self._last.sampled else None
        sampled = self._sampler.sample(last, metadata, pending)
        # A chunk that samples nothing is computed in its step too, not with the next one.
        barrier = [] if len(sampling) == len(batch.scheduled_requests) else self.backend.barrier()
        return InFlightStep(batch.scheduled_requests, sampled, prompts, barrier, self.backend)

    def _prompt_logprobs(self, scheduled: ScheduledRequest, logits: mx.array) -> tuple[Request, int, LogprobArrays]:
        num = scheduled.request.params.prompt_logprobs
        assert num is not None, "prompt logprobs were not asked for"
        first = scheduled.start + 1
        next_ids = mx.array(scheduled.request.prompt_token_ids[first : first + logits.shape[0]], dtype=mx.int32)
        return scheduled.request, first, self._sampler.prompt_logprobs(logits, next_ids, num)

    def _row(self, scheduled: ScheduledRequest) -> SamplingRow:
        request = scheduled.request
        return SamplingRow(
            params=request.params,
            seed=request.seed,
            position=scheduled.end,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            pending_row=self._last.row_of[request] if scheduled.pending and self._last else None,
            eos_token_ids=request.eos_token_ids,
            bad_words_ids=request.bad_words_token_ids,
            guide=request.guide,
        )


def _wanted_rows(scheduled: ScheduledRequest) -> Int32:
    """Rows of a scheduled request whose logits are needed: prompt positions to score, then the row that samples."""
    rows: list[int] = []
    if scheduled.request.params.prompt_logprobs is not None:
        last = min(scheduled.end, scheduled.request.num_prompt_tokens - 1)
        rows = list(range(max(0, last - scheduled.start)))
    if scheduled.samples:
        rows.append(scheduled.num_tokens - 1)
    return np.array(rows, dtype=np.int32)
