"""A request as the scheduler sees it: tokens known, tokens computed, blocks held elsewhere."""

import enum
import time
from dataclasses import dataclass, field
from typing import TypedDict

from engine.core.token_guide import MakeGuide, TokenGuide
from engine.errors import ContextLengthError
from engine.outputs import RequestMetrics
from engine.params.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams


class Standing(TypedDict, total=False):
    """How a request stands beside others: what :class:`NewRequest` takes as it is."""

    priority: int
    cache_salt: str | None
    traceless: bool
    served: bool


class RequestStatus(enum.Enum):
    """Where a request stands. ``finish_reason``: OpenAI's or vLLM's word for the last six, which are final."""

    WAITING = "waiting", None
    RUNNING = "running", None
    PREEMPTED = "preempted", None
    FINISHED_STOPPED = "stopped", "stop"
    FINISHED_BY_GUIDE = "ended by its guide", "stop"
    """Nothing more may follow: unlike a stop token, the last token is text."""
    FINISHED_REPETITION = "repeats itself", "repetition"
    """The reply repeats itself; its last token is text too."""
    FINISHED_LENGTH = "too long", "length"
    FINISHED_ABORTED = "aborted", "abort"
    FINISHED_ERROR = "failed", "error"

    def __init__(self, _name: str, finish_reason: str | None) -> None:
        self.finish_reason = finish_reason
        self.finished = finish_reason is not None


def check_length(num_prompt: int, max_tokens: int | None, limit: int) -> None:
    """Raise ContextLengthError where a prompt and ``max_tokens`` (None: one token) exceed ``limit`` tokens."""
    asked = max_tokens or 1
    if num_prompt + asked > limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, you requested {asked} output "
            f"tokens and your prompt contains at least {num_prompt} input tokens, for a total of at least "
            f"{num_prompt + asked} tokens. Please reduce the length of the input prompt or the number of "
            "requested output tokens.",
            param="max_tokens" if num_prompt < limit else "prompt",
            num_prompt=num_prompt,
            asked=asked,
            limit=limit,
        )


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request as it enters the engine, already templated, tokenized and checked."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int]
    seed: int
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    traceless: bool = False
    """Whether it neither reads nor fills the prefix cache, and is not remembered for ``explain``."""
    served: bool = False
    """Whether a client of the port sent it, not this process: the scheduler takes both kinds by turns."""
    make_guide: MakeGuide | None = None
    scored_from: int = 1
    """The first prompt token that ``prompt_logprobs`` are wanted of; those before it may come from the cache."""


@dataclass(eq=False, slots=True)
class Request:
    """One completion under way (a request with ``n`` > 1 becomes ``n`` of these).

    ``num_tokens`` counts known tokens plus ``num_pending``: tokens sampled by a step in flight,
    whose values the host has not read yet. ``num_computed_tokens`` runs after ``num_tokens``; the
    scheduler knows no other phase.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    max_tokens: int = DEFAULT_MAX_TOKENS
    priority: int = 0
    cache_salt: str | None = None
    traceless: bool = False
    served: bool = False
    seed: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    scored_from: int = 1
    index: int = 0
    """Which of the ``n`` completions this is."""
    let_through: bool = False
    """Whether it gives way to no request of the notebook: it did, or had its turn while one waited."""
    guide: TokenGuide | None = None
    """What constrains the output, token by token; None for a free request."""
    arrival_time: float = field(default_factory=time.monotonic)
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    all_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int = -1
    """Prompt tokens found in the prefix cache at first schedule; -1 before."""
    num_findable_tokens: int = 0
    """Leading tokens whose blocks were made findable."""
    stop_reason: int | str | None = None
    block_hashes: dict[int, list[bytes]] = field(default_factory=dict)
    """Chained hashes of the leading full blocks, by block size; as many as were asked for."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def __post_init__(self) -> None:
        # Requests may wait by the thousand for one prompt: who has no output yet has no list of its own.
        outputs = self.output_token_ids
        self.all_token_ids = [*self.prompt_token_ids, *outputs] if outputs else self.prompt_token_ids
        self.metrics.arrival_time = self.arrival_time

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens, those still in flight included."""
        return len(self.output_token_ids) + self.num_pending

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.all_token_ids) + self.num_pending

    @property
    def finished(self) -> bool:
        """Whether the request is over."""
        return self.status.finished

    @property
    def guide_waits(self) -> bool:
        """Whether the next step depends on a token whose value is still on the device."""
        return self.num_pending > 0 and self.guide is not None and self.guide.waits

    @property
    def last_token_in_flight(self) -> bool:
        """Whether a token in flight is the last that the request may have."""
        return self.num_pending > 0 and self.num_output_tokens >= self.max_tokens

    def append_output_token(self, token_id: int) -> None:
        """Record a token that the host has read."""
        self.output_token_ids.append(token_id)
        if self.all_token_ids is self.prompt_token_ids:
            self.all_token_ids = [*self.prompt_token_ids, token_id]
        else:
            self.all_token_ids.append(token_id)
