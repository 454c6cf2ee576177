"""What the scheduler asks of the runner: one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core.request import Request


class ScheduledRequest(NamedTuple):
    """What a step computes of a request: tokens ``[start, start + num_tokens)`` of its sequence.

    ``block_tables``: by group; they grow with the sequence, so whoever keeps one copies it. ``samples``: the
    tokens reach the end of the known ones, so that a new token is sampled. ``pending``: the last of them is
    still on the device. ``begins``: the request was admitted in this step, and what it found in the prefix cache may be
    computed in this step too, by another request.
    """

    request: Request
    start: int
    num_tokens: int
    block_tables: tuple[Sequence[int], ...]
    samples: bool
    pending: bool
    begins: bool = False

    @property
    def end(self) -> int:
        """Tokens computed once the step is done."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: what it computes, in order, and the requests that lost their blocks for it."""

    scheduled_requests: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(scheduled.num_tokens for scheduled in self.scheduled_requests)

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """Those that sample a token, in order."""
        return [scheduled for scheduled in self.scheduled_requests if scheduled.samples]
