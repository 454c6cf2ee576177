"""What requests give back: vLLM's ``RequestOutput`` family, stream deltas and the notebook's ``Reply``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FinishReason = str
"""``"stop"``, ``"length"``, ``"abort"``, ``"error"`` or ``"repetition"``; for chats also ``"tool_calls"``."""

THINKING_CUTS: Mapping[str, str] = {
    "budget": "ended at its budget",
    "repetition": "ended: it repeated itself",
    "request": "ended by hand",
}
"""What ``thinking_cut`` says of a thought, in words."""


@dataclass(slots=True)
class Logprob:
    """Log-probability (natural log) of one token, its rank (1 = most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsAtPosition = dict[int, Logprob]
"""Token id -> :class:`Logprob`; the sampled token comes first, then the most likely ones."""


class StepTotals(NamedTuple):
    """What the engine's steps did since the model was loaded: sums, so that two of them differ by what lies between.

    Steps that compute one token of each of their requests are *decodes*, the others *prompts*; of these, *mixed* ones
    computed tokens of replies too. ``context`` counts, by group of the plan, the tokens whose keys and values the
    decodes' rows read, ``pairs`` the same for the prompts' rows. Seconds are those until the step's tokens were known,
    and not those between steps.
    """

    decodes: int = 0
    decode_seconds: float = 0.0
    rows: int = 0
    context: tuple[int, ...] = ()
    prompts: int = 0
    prompt_seconds: float = 0.0
    prompt_tokens: int = 0
    pairs: tuple[int, ...] = ()
    mixed: int = 0
    mixed_seconds: float = 0.0

    def since(self, before: "StepTotals") -> "StepTotals":
        """What came after ``before``."""
        differences: dict[str, Any] = {}
        for name in self._fields:
            now, then = getattr(self, name), getattr(before, name)
            if isinstance(now, tuple):
                differences[name] = tuple(a - b for a, b in zip(now, then or (0,) * len(now), strict=True))
            else:
                differences[name] = now - then
        return StepTotals(**differences)


@dataclass(eq=False, slots=True)
class StepMark:
    """The engine's steps up to the last that some requests were in together; it moves while they go on."""

    totals: StepTotals


@dataclass(slots=True)
class RequestMetrics:
    """Monotonic times in seconds (``time.monotonic``) and counts of one request."""

    arrival_time: float = 0.0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    steps_before: StepTotals | None = None
    """The engine's steps before the first that this request was in."""
    steps_first: StepTotals | None = None
    """… and up to that of its first token,"""
    steps: StepMark | None = None
    """… and up to the last that it was in."""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def queue_time(self) -> float | None:
        """Seconds spent waiting before the first schedule."""
        return None if self.scheduled_time is None else self.scheduled_time - self.arrival_time

    @property
    def steps_last(self) -> StepTotals | None:
        """The engine's steps up to the last that this request was in, so far."""
        return None if self.steps is None else self.steps.totals

    def decode_rate(self, num_tokens: int) -> float | None:
        """Tokens per second after the first token."""
        if self.first_token_time is None or self.last_token_time is None or num_tokens < 2:
            return None
        elapsed = self.last_token_time - self.first_token_time
        return (num_tokens - 1) / elapsed if elapsed > 0 else None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` completions."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    thinking_cut: str | None = None
    """Why the engine ended the thought: ``budget``, ``repetition`` or ``request``; None if it did not."""

    @property
    def finished(self) -> bool:
        """Whether this completion is over."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and all its completions. ``num_cached_tokens`` is the prompt's part found in the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class CompletionDelta:
    """What was added to one completion: text and tokens since the last delta.

    ``text`` may be empty while a character or a possible stop string is held back. The delta that
    carries ``finish_reason`` is the last of its ``index``. ``logprobs`` has one entry per token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    thinking_cut: str | None = None

    def joined(self, later: "CompletionDelta") -> "CompletionDelta":
        """This and the next delta of the same completion as one."""
        return CompletionDelta(
            self.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs if later.logprobs is None else [*(self.logprobs or ()), *later.logprobs],
            later.finish_reason,
            later.stop_reason,
            later.thinking_cut or self.thinking_cut,
        )


@dataclass(slots=True)
class Usage:
    """Token counts of a reply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Reply:
    """What a chat or completion returns in a notebook; ``str(reply)`` is the text.

    ``messages`` is the conversation including this reply, in OpenAI's form. ``logprobs`` has one
    entry per generated token when asked for. ``parsed`` is what the JSON of ``--json`` is in Python: a dict, or an
    instance of the pydantic class that gave the schema; None where that failed, and ``parse_error`` says why.
    ``record`` is what ``--record`` keeps of it, as JSON.
    """

    text: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    metrics: RequestMetrics | None = None
    logprobs: list[LogprobsAtPosition] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """What is said below it where it is shown: why it stopped early, how fast it was."""
    parsed: Any = None
    parse_error: str | None = None
    shown_as: str = field(default="markdown", repr=False, compare=False)
    """How a notebook shows it: ``markdown``, ``text``, ``code`` or ``json``, as ``-f`` says."""
    record: dict[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What a prompt shows: text, calls of tools and notes below each other. ``repr()`` stays that of the fields."""
        calls = (f"{call['function']['name']}({call['function']['arguments']})" for call in self.tool_calls)
        printer.text("\n".join([*([self.text] if self.text or not self.tool_calls else []), *calls, *self.notes]))
