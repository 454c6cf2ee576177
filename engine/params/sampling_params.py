"""``SamplingParams``: vLLM's field names, defaults and checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Self

from engine.errors import RequestError
from engine.params.structured_outputs import Constraints, RepetitionDetection, StructuredOutput, ThinkingBudget

StructuredOutputsParams = StructuredOutput
"""vLLM's name for it."""

SAMPLING_EPS = 1e-5
"""Below this temperature sampling is greedy (vLLM's constant)."""
MAX_LOGPROBS = 20
"""Most alternatives per position (vLLM's ``--max-logprobs`` default)."""
DEFAULT_MAX_TOKENS = 16
"""Most tokens where nothing says otherwise (vLLM's default); chats go on to the end of the context."""
MAX_COMPLETIONS = 16384
"""Most completions of one request (vLLM's ``VLLM_MAX_N_SEQUENCES`` default)."""
CONSTRAINTS = ("structured_outputs", "thinking_token_budget", "repetition_detection")
"""Fields that constrain one request's output (:meth:`SamplingParams.constraints`); no settings hold them."""
_SEED_RANGE = (-(2**63), 2**63 - 1)
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_SWITCHES = (
    "ignore_eos",
    "detokenize",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_KINDS: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (Real, "a number", (*_PENALTIES, "temperature", "top_p", "min_p")),
    (Integral, "a whole number", ("n", "top_k", "min_tokens")),
    (Integral, "a whole number or None", ("seed", "max_tokens", "logprobs", "prompt_logprobs")),
    (bool, "True or False", _SWITCHES),
)
"""What the values of which fields are."""


def _refuse(name: str, must: str, value: object) -> RequestError:
    return RequestError(f"{name} must {must}, got {value}.", param=name)


def _many(name: str, given: Any, kind: type, what: str) -> tuple[Any, ...]:
    """The items of a list, each of ``kind``; None is an empty one."""
    refusal = _refuse(name, f"be a list of {what}", repr(given))
    if isinstance(given, str) or not isinstance(given, Iterable | None):
        raise refusal
    items = () if given is None else tuple(given)
    if not all(isinstance(item, kind) for item in items):
        raise refusal
    return items


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request. Frozen: use :meth:`replace` for a changed copy.

    ``temperature=0`` is greedy. ``top_k`` of 0 or -1 keeps all tokens. ``seed`` makes a request
    repeatable whatever else shares its batch. ``stop`` is matched on text, ``stop_token_ids`` on
    tokens. ``logprobs=k`` returns the k most likely tokens beside the sampled one, from the raw
    logits (before penalties and temperature), as vLLM's default does; -1 means the whole
    vocabulary. ``structured_outputs`` (a :class:`StructuredOutput` or a mapping of its fields),
    ``thinking_token_budget`` and ``repetition_detection`` constrain the output. Raises
    :class:`RequestError` naming the field and its range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutput | Mapping[str, Any] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetection | Mapping[str, Any] | None = None
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Per name, where its value came from; empty where nobody resolved defaults."""

    def __post_init__(self) -> None:
        self._check_kinds()
        self._normalise()
        self._check()

    def _check_kinds(self) -> None:
        for kind, what, names in _KINDS:
            for name in names:
                value = getattr(self, name)
                fine = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
                if not fine and not (value is None and what.endswith("None")):
                    raise _refuse(name, f"be {what}", repr(value))

    def _normalise(self) -> None:
        put = object.__setattr__
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        put(self, "stop", _many("stop", stop, str, "texts, or one text"))
        put(self, "stop_token_ids", _many("stop_token_ids", self.stop_token_ids, Integral, "token ids"))
        put(self, "bad_words", _many("bad_words", self.bad_words, str, "texts"))
        try:
            put(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        except (AttributeError, TypeError, ValueError):
            raise _refuse("logit_bias", "map token ids to numbers", repr(self.logit_bias)) from None
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _many("allowed_token_ids", self.allowed_token_ids, Integral, "token ids"))
        if self.structured_outputs is not None:
            put(self, "structured_outputs", StructuredOutput.from_structured_outputs(self.structured_outputs))
        put(self, "repetition_detection", RepetitionDetection.from_request(self.repetition_detection))
        if 0 < self.temperature < SAMPLING_EPS:
            put(self, "temperature", 0.0)
        if self.top_k == -1:
            put(self, "top_k", 0)

    def _check(self) -> None:
        self._check_filters()
        self._check_lengths()
        ThinkingBudget.from_request(self.thinking_token_budget)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= MAX_LOGPROBS:
                raise _refuse(name, f"be between 0 and {MAX_LOGPROBS}, or -1 for the whole vocabulary", value)
        if any(not s for s in self.stop):
            raise RequestError("stop cannot contain an empty string.", param="stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings are only supported when detokenize is True.", param="stop")
        if any(not word.strip() for word in self.bad_words):
            raise RequestError("bad_words cannot contain an empty string.", param="bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is not None and empty!", param="allowed_token_ids")

    def _check_filters(self) -> None:
        low, high = _SEED_RANGE
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "be in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "be in [-2, 2]"),
            (
                "repetition_penalty",
                1e-6 <= self.repetition_penalty < float("inf"),
                "be greater than zero (at least 1e-6)",
            ),
            ("temperature", 0.0 <= self.temperature < float("inf"), "be non-negative"),
            ("top_p", 0.0 < self.top_p <= 1.0, "be in (0, 1]"),
            ("top_k", self.top_k >= 0, "be 0 or -1 (all tokens), or at least 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "be in [0, 1]"),
            ("seed", self.seed is None or low <= self.seed <= high, "be a 64-bit integer"),
        )
        for name, fine, must in ranges:
            if not fine:
                raise _refuse(name, must, getattr(self, name))

    def _check_lengths(self) -> None:
        if not 1 <= self.n <= MAX_COMPLETIONS:
            raise _refuse("n", "be at least 1" if self.n < 1 else f"be at most {MAX_COMPLETIONS}", self.n)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _refuse("max_tokens", "be at least 1", self.max_tokens)
        if self.min_tokens < 0:
            raise _refuse("min_tokens", "be greater than or equal to 0", self.min_tokens)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", f"be less than or equal to max_tokens={self.max_tokens}", self.min_tokens)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < SAMPLING_EPS

    def constraints(self, given: Constraints | None = None) -> Constraints | None:
        """What :data:`CONSTRAINTS` ask for, else ``given``. Raises RequestError where both ask for something."""
        own = Constraints.from_request(**{name: getattr(self, name) for name in CONSTRAINTS})
        if own is not None and given is not None:
            names = ", ".join(name for name in CONSTRAINTS if getattr(self, name) is not None)
            raise RequestError(f"{names} in SamplingParams and constraints exclude each other: give one.", param=names)
        return given if own is None else own

    def clone(self) -> Self:
        """A copy (vLLM's name)."""
        return replace(self)

    def replace(self, **changes: Any) -> Self:
        """A checked copy with ``changes``; unknown names are refused."""
        known = {f.name for f in fields(self)} - {"sources"}
        for name in changes:
            if name not in known:
                raise RequestError(f"Unknown sampling parameter {name!r}.", param=name)
        sources = {**self.sources, **dict.fromkeys(changes, "request")} if self.sources else {}
        return replace(self, **changes, sources=sources)
