"""A bounded memory of the latest requests, whoever sent them: what ``explain`` looks at."""

import functools
import itertools
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from engine.chat.request import Account, PreparedRequest
from engine.outputs import RequestMetrics, RequestOutput
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints
from engine.runtime.stream import RequestStream

MAX_RECORDS = 32
"""Requests remembered; a prompt token costs 4 bytes."""
MAX_BYTES = 64 * 1024 * 1024
"""About what is kept of their prompts, tools and schemas: of larger ones fewer are remembered, but always the last."""
_NODE = 64
"""Bytes of a value among others, roughly."""


@dataclass(frozen=True)
class FinishedCompletion:
    """One completion as it was generated, before any parser."""

    text: str
    token_ids: "array[int]"
    finish_reason: str | None
    stop_reason: int | str | None
    thinking_cut: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a request went so far. ``error`` is the text of what ended it, if something failed."""

    completions: tuple[FinishedCompletion, ...]
    num_cached_tokens: int
    metrics: RequestMetrics
    finished: bool
    error: str | None = None


@dataclass(eq=False)
class RequestRecord:
    """One request: what was asked, and (through :attr:`outcome`) what came of it.

    ``prompt`` is None where the caller gave tokens. ``max_tokens`` is the limit that applied. ``account`` and
    ``constraints`` were known before it was submitted.
    """

    number: int
    request_id: str
    prompt: str | None
    prompt_token_ids: "array[int]"
    params: SamplingParams
    max_tokens: int
    cache_salt: str | None
    stream: RequestStream | None
    account: Account
    constraints: Constraints | None = None
    default_thinking_budget: int | None = None
    """The live setting's, for a request that has no budget of its own."""
    num_bytes: int = 0
    """About what is kept of what was asked."""
    _outcome: Outcome | None = None

    @property
    def outcome(self) -> Outcome:
        """The result so far; once the request is over, its stream (logprobs included) is released."""
        stream = self.stream
        if self._outcome is None and stream is not None:
            # Live settings may have changed the values meanwhile.
            self.params = stream.params
            self.default_thinking_budget = stream.default_thinking_budget
            self.max_tokens = stream.params.max_tokens or self.max_tokens
            finished = stream.finished  # before the snapshot, which may grow meanwhile
            outcome = _outcome(stream.snapshot(), finished, stream.error)
            if not finished:
                return outcome
            self._outcome, self.stream = outcome, None
        assert self._outcome is not None, "a record has its stream or its outcome"
        return self._outcome

    def sequences(self) -> "Iterator[array[int]]":
        """Prompt and output tokens of each completion: what may lie in the prefix cache because of it."""
        for completion in self.outcome.completions:
            yield self.prompt_token_ids + completion.token_ids


class RequestLog:
    """The latest :data:`MAX_RECORDS` requests in order of submission. Thread-safe."""

    def __init__(self, size: int = MAX_RECORDS) -> None:
        self._lock = threading.Lock()
        self._records: deque[RequestRecord] = deque(maxlen=size)
        self._numbers = itertools.count(1)
        self._num_bytes = 0

    def add(
        self, stream: RequestStream, request: PreparedRequest, *, max_tokens: int, cache_salt: str | None = None
    ) -> RequestRecord:
        """Remember ``request``, which ``stream`` runs; the oldest ones are forgotten when the log is full."""
        kept = (stream.prompt, request.account.template, request.account.make_parser, request.constraints)
        num_bytes = 4 * len(stream.prompt_token_ids) + rough_bytes(kept, MAX_BYTES)
        with self._lock:
            while self._records and (
                len(self._records) == self._records.maxlen or self._num_bytes + num_bytes > MAX_BYTES
            ):
                self._num_bytes -= self._records.popleft().num_bytes
            self._num_bytes += num_bytes
            record = RequestRecord(
                next(self._numbers),
                stream.request_id,
                stream.prompt,
                array("i", stream.prompt_token_ids),
                stream.params,
                max_tokens,
                cache_salt,
                stream,
                request.account,
                request.constraints,
                num_bytes=num_bytes,
            )
            self._records.append(record)
            finished = [one for one in self._records if one.stream is not None and one.stream.finished]
        for one in finished:
            one.outcome  # noqa: B018 - reading it lets go of the stream
        return record

    def latest(self, count: int = 1) -> RequestRecord | None:
        """The last request, or the ``count``-th from the end; None if there are not so many."""
        with self._lock:
            return self._records[-count] if 0 < count <= len(self._records) else None

    def before(self, record: RequestRecord) -> list[RequestRecord]:
        """Requests submitted before ``record``, the latest first."""
        with self._lock:
            return [one for one in reversed(self._records) if one.number < record.number]

    def __len__(self) -> int:
        return len(self._records)


def rough_bytes(value: object, most: int) -> int:
    """About how many bytes ``value`` keeps, which may be any JSON, dataclasses and partial calls; stops at ``most``."""
    found, left = 0, [value]
    while left and found < most:
        one = left.pop()
        found += _NODE
        if isinstance(one, str | bytes):
            found += len(one)
        elif isinstance(one, Mapping):
            left += (*one.keys(), *one.values())
        elif isinstance(one, list | tuple | set | frozenset):
            left += one
        elif isinstance(one, functools.partial):
            left += (one.args, one.keywords)
        elif is_dataclass(one) and not isinstance(one, type):
            left += [getattr(one, field.name) for field in fields(one)]
    return found


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    length = min(len(one), len(other))
    different = np.asarray(one[:length], np.int32) != np.asarray(other[:length], np.int32)
    return int(different.argmax()) if different.any() else length


def _outcome(output: RequestOutput, finished: bool, error: BaseException | None) -> Outcome:
    completions = tuple(
        FinishedCompletion(one.text, array("i", one.token_ids), one.finish_reason, one.stop_reason, one.thinking_cut)
        for one in output.outputs
    )
    metrics = output.metrics or RequestMetrics()
    return Outcome(completions, output.num_cached_tokens, metrics, finished, None if error is None else str(error))
