"""``SamplingParams``: vLLM's field names, defaults and checks, and all that is known of each parameter."""

# ruff: noqa: RUF009 - parameter() makes a dataclass field

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Self

from engine.errors import RequestError
from engine.params.flag_values import human_int
from engine.params.sampling_field import (
    BIASES,
    GROUPS,
    NUMBER,
    SWITCH,
    TEXT_OR_TEXTS,
    TEXTS,
    TOKEN_IDS,
    WHOLE,
    WHOLE_OR_NONE,
    ChatFlag,
    Range,
    SamplingField,
    Slider,
    ValueKind,
    known_of,
    parameter,
    refuse,
)
from engine.params.structured_outputs import Constraints, RepetitionDetection, StructuredOutput, ThinkingBudget

StructuredOutputsParams = StructuredOutput
"""vLLM's name for it."""

SAMPLING_EPS = 1e-5
"""Below this temperature sampling is greedy (vLLM's constant)."""
MAX_LOGPROBS = 20
"""Most alternatives per position (vLLM's ``--max-logprobs`` default)."""
DEFAULT_MAX_TOKENS = 16
"""Most tokens where nothing says otherwise (vLLM's default); chats go on to the end of the context."""
MAX_COMPLETIONS = 1024
"""Most completions of one request: it is queued and ended in one go, for which all others then wait some 40 ms. More
are more requests, whose prompt is found in the prefix cache. (vLLM's ``VLLM_MAX_N_SEQUENCES`` is 16384, OpenAI's 128.)
"""
_OPTIONAL_TOKEN_IDS = replace(TOKEN_IDS, optional=True)
_LOGPROBS = (Range(-1, MAX_LOGPROBS, must=f"be between 0 and {MAX_LOGPROBS}, or -1 for the whole vocabulary"),)


def _constraint(type: Any, read: Callable[[Any], Any]) -> SamplingField:
    """A field that constrains one request's output; its ``read`` says itself what is wrong. No settings hold it."""
    kind = ValueKind(type, "constrain the output", (type,), "", read, optional=True)
    return SamplingField(kind, settable=False, wire="own", constraint=True)


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

    n: int = parameter(
        1,
        SamplingField(WHOLE, ranges=(Range(low=1), Range(high=MAX_COMPLETIONS)), settable=False, wire="completions"),
    )
    presence_penalty: float = parameter(
        0.0,
        SamplingField(
            NUMBER,
            ranges=(Range(-2, 2),),
            group="penalty",
            flag=ChatFlag("-2 to 2"),
            slider=Slider(-2, 2, 0.05),
            live=True,
            generation_config="presence_penalty",
        ),
    )
    frequency_penalty: float = parameter(
        0.0,
        SamplingField(
            NUMBER,
            ranges=(Range(-2, 2),),
            group="penalty",
            flag=ChatFlag("-2 to 2"),
            slider=Slider(-2, 2, 0.05),
            live=True,
            generation_config="frequency_penalty",
        ),
    )
    repetition_penalty: float = parameter(
        1.0,
        SamplingField(
            NUMBER,
            ranges=(Range(1e-6, must="be greater than zero (at least 1e-6)"),),
            group="penalty",
            flag=ChatFlag("above 1 discourages repeats"),
            slider=Slider(0.5, 2, 0.01),
            live=True,
            generation_config="repetition_penalty",
            server_default=True,
        ),
    )
    temperature: float = parameter(
        1.0,
        SamplingField(
            NUMBER,
            ranges=(Range(0, must="be non-negative"),),
            group="choice",
            flag=ChatFlag("0 always takes the likeliest token", short="-t"),
            slider=Slider(0, 2, 0.05),
            live=True,
            generation_config="temperature",
            server_default=True,
        ),
    )
    top_p: float = parameter(
        1.0,
        SamplingField(
            NUMBER,
            ranges=(Range(0, 1, low_open=True),),
            group="choice",
            flag=ChatFlag("keep the likeliest tokens up to this probability"),
            slider=Slider(0.01, 1, 0.01),
            live=True,
            generation_config="top_p",
            server_default=True,
        ),
    )
    top_k: int = parameter(
        0,
        SamplingField(
            WHOLE,
            ranges=(Range(-1, must="be 0 or -1 (all tokens), or at least 1"),),
            group="choice",
            flag=ChatFlag("keep the k likeliest tokens"),
            slider=Slider(0, 200, 1),
            live=True,
            generation_config="top_k",
            server_default=True,
        ),
    )
    min_p: float = parameter(
        0.0,
        SamplingField(
            NUMBER,
            ranges=(Range(0, 1),),
            group="choice",
            flag=ChatFlag("drop tokens below this share of the likeliest one"),
            slider=Slider(0, 1, 0.01),
            live=True,
            generation_config="min_p",
            server_default=True,
        ),
    )
    seed: int | None = parameter(
        None,
        SamplingField(
            WHOLE_OR_NONE,
            ranges=(Range(-(2**63), 2**63 - 1, must="be a 64-bit integer"),),
            group="seed",
            flag=ChatFlag("the same seed gives the same reply"),
        ),
    )
    stop: Sequence[str] = parameter((), SamplingField(TEXT_OR_TEXTS))
    stop_token_ids: Sequence[int] = parameter((), SamplingField(TOKEN_IDS, live=True))
    bad_words: Sequence[str] = parameter((), SamplingField(TEXTS))
    include_stop_str_in_output: bool = parameter(False, SamplingField(SWITCH))
    ignore_eos: bool = parameter(False, SamplingField(SWITCH, live=True))
    max_tokens: int | None = parameter(
        DEFAULT_MAX_TOKENS,
        SamplingField(
            WHOLE_OR_NONE,
            ranges=(Range(low=1),),
            group="length",
            flag=ChatFlag("most tokens of the reply (default: to the end of the context)", read=human_int),
            live=True,
            wire="own",
            generation_config="max_new_tokens",
            server_default=True,
        ),
    )
    min_tokens: int = parameter(
        0, SamplingField(WHOLE, ranges=(Range(0, must="be greater than or equal to 0"),), live=True)
    )
    logprobs: int | None = parameter(None, SamplingField(WHOLE_OR_NONE, ranges=_LOGPROBS, wire="own"))
    prompt_logprobs: int | None = parameter(
        None, SamplingField(WHOLE_OR_NONE, ranges=_LOGPROBS, settable=False, wire="completions")
    )
    detokenize: bool = parameter(True, SamplingField(SWITCH, settable=False, wire="own"))
    skip_special_tokens: bool = parameter(True, SamplingField(SWITCH))
    spaces_between_special_tokens: bool = parameter(True, SamplingField(SWITCH))
    logit_bias: Mapping[int, float] = parameter({}, SamplingField(BIASES, live=True, wire="own"))
    allowed_token_ids: Sequence[int] | None = parameter(None, SamplingField(_OPTIONAL_TOKEN_IDS))
    structured_outputs: StructuredOutput | Mapping[str, Any] | None = parameter(
        None, _constraint(dict, StructuredOutput.from_structured_outputs)
    )
    thinking_token_budget: int | None = parameter(
        None, _constraint(int, lambda budget: ThinkingBudget(budget).max_tokens)
    )
    repetition_detection: RepetitionDetection | Mapping[str, Any] | None = parameter(
        None, _constraint(dict, RepetitionDetection.from_request)
    )
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Per name, where its value came from; empty where no defaults were resolved."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, known in PARAMETERS.items():
            put(self, name, known.check(name, getattr(self, name)))
        if 0 < self.temperature < SAMPLING_EPS:
            put(self, "temperature", 0.0)
        if self.top_k == -1:
            put(self, "top_k", 0)
        self._check_texts()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refuse("min_tokens", f"be less than or equal to max_tokens={self.max_tokens}", self.min_tokens)

    def _check_texts(self) -> None:
        if any(not s for s in self.stop):
            raise RequestError("stop cannot contain an empty string.", param="stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings are only supported when detokenize is True.", param="stop")
        if any(not word.strip() for word in self.bad_words):
            raise RequestError("bad_words cannot contain an empty string.", param="bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is not None and empty!", param="allowed_token_ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < SAMPLING_EPS

    def constraints(self, given: Constraints | None = None) -> Constraints | None:
        """What :data:`CONSTRAINTS` ask for and ``given``. Raises RequestError where both ask for the same."""
        own = Constraints.from_request(**{name: getattr(self, name) for name in CONSTRAINTS})
        if own is None or given is None:
            return given if own is None else own
        return own.joined(given)

    def with_special_tokens(self) -> Self:
        """A copy that shows special tokens in the text, because the parser of the output reads them."""
        if not self.skip_special_tokens:
            return self
        sources = {**self.sources, "skip_special_tokens": "the output's parser"}
        return replace(self, skip_special_tokens=False, sources=sources)

    def with_default_max_tokens(self) -> Self:
        """These values; where they set no ``max_tokens``, with vLLM's 16."""
        return self if self.max_tokens is not None else self.replace(max_tokens=DEFAULT_MAX_TOKENS)

    def clone(self) -> Self:
        """A copy (vLLM's name)."""
        return replace(self)

    def replace(self, **changes: Any) -> Self:
        """A checked copy with ``changes``; unknown names are refused."""
        for name in changes:
            if name not in PARAMETERS:
                raise RequestError(f"Unknown sampling parameter {name!r}.", param=name)
        sources = {**self.sources, **dict.fromkeys(changes, "request")} if self.sources else {}
        return replace(self, **changes, sources=sources)


PARAMETERS: Mapping[str, SamplingField] = MappingProxyType(
    {made.name: known for made in fields(SamplingParams) if (known := known_of(made)) is not None}
)
"""What is known of each parameter, by name, in the order of the fields."""


def names_of(wanted: Callable[[SamplingField], bool]) -> tuple[str, ...]:
    """The names of the ``wanted`` parameters, in the order of the fields."""
    return tuple(name for name, known in PARAMETERS.items() if wanted(known))


COMMON = tuple(name for group in GROUPS for name, known in PARAMETERS.items() if known.group == group)
"""The parameters that people turn most, in the order in which flags, sliders and ``explain`` list them."""
CONSTRAINTS = names_of(lambda known: known.constraint)
"""Fields that constrain one request's output (:meth:`SamplingParams.constraints`); no settings hold them."""
