"""What the scheduler asks of the runner: one step."""

from dataclasses import dataclass, field

from engine.core.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's share of a step: tokens ``[start, start + num_tokens)`` of its sequence.

    ``samples`` says whether the share reaches the end of the known tokens, so that a new token is
    sampled. ``pending`` says that the last token of the share is still on the device.
    """

    request: Request
    start: int
    num_tokens: int
    block_tables: tuple[list[int], ...]
    samples: bool
    pending: bool

    @property
    def end(self) -> int:
        """Tokens computed once this share is done."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: shares in order, and the requests that lost their blocks for it."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(share.num_tokens for share in self.scheduled)

    @property
    def sampling(self) -> list[ScheduledRequest]:
        """The shares that sample a token, in order."""
        return [share for share in self.scheduled if share.samples]
