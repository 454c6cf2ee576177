"""``LLM.map(choices=[…])``: labels with their exact probabilities, computed and not sampled.

A label's probability is that of its tokens behind the prompt and, in a chat, of an end token behind them: how often
sampling at temperature 1 without further rules would answer exactly so. The probabilities of a row's labels are divided
by their sum, the row's ``coverage``. Lengths are not evened out: a label of many tokens is as unlikely as it is.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.batch.local_client import SOURCE, LocalClient, Model
from engine.batch.map import TEXT_COLUMNS, Answer, AnswerColumns, MapClient, chat_messages, read_number
from engine.batch.prompt_table import import_pandas
from engine.chat.request import ChatRequest, PreparedRequest, PromptRequest, TemplateOptions
from engine.errors import GenerationError, RequestError
from engine.outputs import RequestOutput
from engine.params.sampling_params import PARAMETERS, SamplingParams
from engine.params.settings import THINKING_SWITCHES
from engine.runtime.stream import RequestStream

CHOICE, COVERAGE = "choice", "coverage"
"""Columns: the likeliest label, and how probable it is that the model answers with one of the labels at all."""
_SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
Label = str | int | float


class ChoosingModel(Model, Protocol):
    """What of :class:`engine.llm.LLM` choices need."""

    @property
    def template_variables(self) -> frozenset[str]:
        """What of ``chat_template_kwargs`` the chat template reads."""

    @property
    def reasoning_parser(self) -> str | None:
        """The name of the parser of thoughts, None where there is none."""

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""


@dataclass(frozen=True)
class AnswerForm:
    """How a map is to be answered: as text, or with one of ``choices``. ``end_ids`` are the model's end tokens."""

    raw: bool = False
    schema: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[Any] | None = None
    end_ids: frozenset[int] = frozenset()

    def of(self, model: ChoosingModel, params: Mapping[str, Any]) -> tuple[MapClient, AnswerColumns]:
        """What asks ``model``, and what its answers are as columns. Raises RequestError for what does not fit."""
        if self.choices is None:
            return LocalClient(model, self.raw, self.schema, self.chat_template_kwargs), TEXT_COLUMNS
        labels = read_choices(self.choices)
        check_beside_choices(params, self.schema)
        client = ChoiceClient(model, labels, self.end_ids, self.raw, self.chat_template_kwargs)
        return client, ChoiceColumns(labels)


def read_choices(choices: Any) -> tuple[Label, ...]:
    """The labels. Raises RequestError for what are none."""
    if hasattr(choices, "tolist"):
        choices = choices.tolist()
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise _refused(f"give a list of labels, such as ['positive', 'negative'], not {type(choices).__name__}")
    labels = tuple(label.item() if hasattr(label, "item") else label for label in choices)  # of numpy
    if not labels:
        raise _refused("give at least one label")
    for label in labels:
        if not isinstance(label, Label) or not str(label).strip() or label != label:
            raise _refused(f"a label is a text or a number, not {label!r}")
    texts = [str(label) for label in labels]
    if twice := next((text for place, text in enumerate(texts) if text in texts[:place]), None):
        raise _refused(f"{twice!r} is there twice")
    return labels


def check_beside_choices(params: Mapping[str, Any], schema: Any = None) -> None:
    """Raise RequestError for what a map with choices has no use for."""
    if schema is not None:
        raise RequestError("schema: choices are the only answers; leave one of the two out", param="schema")
    for name in params:
        if name in PARAMETERS:
            raise RequestError(f"{name}: choices are scored, not sampled; leave it out", param=name)


def _check_ends(labels: Sequence[Label]) -> None:
    """Raise RequestError where one label goes on as another: without an end it would count what is the other's."""
    texts = [str(label) for label in labels]
    for text in texts:
        if longer := next((one for one in texts if one != text and one.startswith(text)), None):
            raise _refused(f"{longer!r} begins with {text!r}: with raw=True let all end alike, in a line end say")


def _refused(why: str) -> RequestError:
    return RequestError(f"choices: {why}", param="choices")


@dataclass(frozen=True, slots=True)
class ChoiceAnswer(Answer):
    """``text`` is the likeliest label's. ``probabilities`` add up to 1; ``coverage`` is what they were divided by."""

    probabilities: tuple[float, ...] = ()
    coverage: float = 0.0


@dataclass(frozen=True)
class ChoiceColumns(AnswerColumns):
    """A column with the likeliest label, one with the probability of each label, and the counts."""

    labels: tuple[Label, ...]

    @property
    def names(self) -> list[str]:
        """The columns of probabilities, in the labels' order."""
        return [f"p({label})" for label in self.labels]

    @property
    def needed(self) -> Sequence[str]:  # type: ignore[override]
        """Columns without which a DataFrame cannot be gone on with."""
        return (CHOICE, *self.names, COVERAGE)

    def write(self, answers: Sequence[Answer | None]) -> dict[str, Any]:
        """Columns of ``answers``; None stands for a row that failed."""
        pd = import_pandas()
        found = [answer if isinstance(answer, ChoiceAnswer) else None for answer in answers]
        likeliest = [None if one is None else self.labels[_best(one.probabilities)] for one in found]
        columns: dict[str, Any] = {CHOICE: likeliest}
        for place, name in enumerate(self.names):
            columns[name] = pd.array([one and one.probabilities[place] for one in found], dtype="Float64")
        columns[COVERAGE] = pd.array([one and one.coverage for one in found], dtype="Float64")
        for name in ("prompt_tokens", "cached_tokens"):
            columns[name] = pd.array([one and getattr(one, name) for one in found], dtype="Int64")
        columns["time"] = pd.array([one and one.time for one in found], dtype="Float64")
        return columns

    def read(self, row: Mapping[Any, Any]) -> Answer | None:
        """The answer of a row that has all columns and no error; None where a number is missing."""
        numbers = [read_number(row[name]) for name in (*self.names, COVERAGE)]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            return None
        *probabilities, coverage = known
        return ChoiceAnswer(
            text=str(self.labels[_best(probabilities)]),
            reasoning=None,
            tokens=0,
            prompt_tokens=int(read_number(row.get("prompt_tokens")) or 0),
            cached_tokens=int(read_number(row.get("cached_tokens")) or 0),
            time=read_number(row.get("time")),
            finish_reason="stop",
            probabilities=tuple(probabilities),
            coverage=coverage,
        )


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class ChoiceClient:
    """Scores ``labels`` behind each prompt: a request for each of them and each end token, over the same pages."""

    model: ChoosingModel
    labels: tuple[Label, ...]
    end_ids: frozenset[int]
    raw: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.raw and self.chat_template_kwargs:
            raise RequestError("chat_template_kwargs: only for chats; leave out raw=True", param="raw")
        if self.raw:
            _check_ends(self.labels)
        self._template_kwargs()

    @property
    def look_ahead(self) -> int:
        """Rows whose requests fill the batch, and one to fill its gaps."""
        per_row = len(self.labels) * (1 if self.raw else len(self.end_ids) or 1)
        return 1 + math.ceil(2 * self.model.plan.max_num_seqs / per_row)

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise RequestError for names that are none."""
        if self.raw and "system" in params:
            raise RequestError("system: only for chats; leave out raw=True", param="system")
        for name in params:
            if name != "system":
                raise RequestError(f"Unknown sampling parameter {name!r}.", param=name)

    def submit(self, prompt: str, params: Mapping[str, Any]) -> "ChoiceJob":
        """Queue one prompt's requests. Raises RequestError (too long, empty …)."""
        job = ChoiceJob(self.labels, self.requests(prompt, params.get("system")), self.model.submit)
        job.start()
        return job

    def requests(self, prompt: str, system: str | None = None) -> list[PreparedRequest]:
        """For each label in turn, a request for each end token; the first of them scores the label's tokens too."""
        request: ChatRequest | PromptRequest
        if self.raw:
            request = PromptRequest(prompt=prompt, sampling=_SCORED, source=SOURCE)
        else:
            template = TemplateOptions(kwargs=self._template_kwargs())
            request = ChatRequest(
                messages=chat_messages(prompt, system), sampling=_SCORED, template=template, source=SOURCE
            )
        prepared = self.model.prepare(request)
        before, made = prepared.token_ids, []
        for label in self.labels:
            behind = self._behind(prepared, str(label))
            if not behind or (not self.raw and self.end_ids.intersection(behind)):
                raise _refused(f"{label!r} {'ends an answer' if behind else 'has no tokens'}: no answer reads so")
            whole = [*before, *behind]
            ends = [[]] if self.raw else [[end] for end in sorted(self.end_ids)] or [[]]
            for place, end in enumerate(ends):
                first = len(whole) if place else len(before)
                made.append(PreparedRequest(None, whole + end, _SCORED, scored_from=first, remembered=False))
        return made

    def _behind(self, prepared: PreparedRequest, label: str) -> list[int]:
        """The label's tokens as they stand behind the prompt: where the prompt's own stay as they are, read with it."""
        before, special = prepared.token_ids, self.raw
        whole = self.model.tokenize((prepared.prompt or "") + label, add_special_tokens=special)
        if len(whole) > len(before) and whole[: len(before)] == before:
            return whole[len(before) :]
        return self.model.tokenize(label, add_special_tokens=False)

    def _template_kwargs(self) -> dict[str, Any]:
        """The template's variables, thinking turned off. Raises RequestError for a model that thinks all the same."""
        given = dict(self.chat_template_kwargs)
        if self.model.reasoning_parser is None or self.raw:
            return given
        switches = [name for name in THINKING_SWITCHES if name in self.model.template_variables]
        if not switches:
            raise _refused(
                "this model thinks before it answers, and its chat template has no switch for that; raw=True takes "
                "a prompt that ends where the answer begins"
            )
        for name in switches:
            if given.setdefault(name, False):
                raise RequestError(f"{name}: choices are answers without a thought; leave it out", param=name)
        return given


class ChoiceJob:
    """The requests of one row. The first computes the prompt's pages; the others follow, and find them."""

    def __init__(
        self,
        labels: Sequence[Label],
        requests: Sequence[PreparedRequest],
        submit: Callable[[PreparedRequest], RequestStream],
    ) -> None:
        self._labels = labels
        self._requests = requests
        self._submit = submit
        self._lock = threading.Lock()
        self._streams: list[RequestStream] = []
        self._num_left = len(requests)
        self._aborted = False
        self._failure: Exception | None = None
        """What kept a later request from being queued."""
        self._callbacks: list[Callable[[], None]] = []

    @property
    def stream(self) -> "ChoiceJob":
        """The row's requests as one."""
        return self

    @property
    def num_tokens(self) -> int:
        """Nothing is generated."""
        return 0

    def start(self) -> None:
        """Queue the first request. Raises what ``submit`` does."""
        self._streams.append(self._submit(self._requests[0]))
        self._streams[0].when_over(self._follow)

    def when_over(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once all requests are over; at once if they are."""
        with self._lock:
            if self._num_left:
                self._callbacks.append(callback)
                return
        callback()

    def abort(self) -> None:
        """End all requests soon."""
        with self._lock:
            self._aborted = True
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def answer(self) -> ChoiceAnswer:
        """The probabilities; raises what ended a request, if something failed, GenerationError where it was stopped."""
        failed = next((stream.error for stream in self._streams if stream.error is not None), self._failure)
        if failed is not None:
            raise failed
        outputs = [stream.snapshot() for stream in self._streams]
        if len(outputs) < len(self._requests) or any(output.prompt_logprobs is None for output in outputs):
            raise GenerationError("stopped before all choices were scored")
        scored = [_tail(output, request) for output, request in zip(outputs, self._requests, strict=True)]
        per_label = len(scored) // len(self._labels)
        logs = [_log_probability(scored[place : place + per_label]) for place in range(0, len(scored), per_label)]
        total = _log_sum(logs)
        probabilities = tuple(math.exp(one - total) for one in logs)
        return ChoiceAnswer(
            text=str(self._labels[_best(probabilities)]),
            reasoning=None,
            tokens=0,
            prompt_tokens=self._requests[0].scored_from,
            cached_tokens=outputs[0].num_cached_tokens,
            time=_seconds(outputs),
            finish_reason="stop",
            probabilities=probabilities,
            coverage=min(1.0, math.exp(total)),
        )

    def _follow(self) -> None:
        """The first request is over: queue the others, on the thread that ended it."""
        for request in self._requests[1:]:
            if self._queue(request):
                self._streams[-1].when_over(self._one_over)
            else:
                self._one_over()
        self._one_over()

    def _queue(self, request: PreparedRequest) -> bool:
        """Submit ``request`` unless something failed or was stopped."""
        with self._lock:
            if self._aborted or self._failure is not None or self._streams[0].error is not None:
                return False
            try:
                self._streams.append(self._submit(request))
            except Exception as error:  # noqa: BLE001 - answer() raises it; the engine's thread goes on
                self._failure = error
                return False
            return True

    def _one_over(self) -> None:
        with self._lock:
            self._num_left -= 1
            callbacks = [] if self._num_left else self._callbacks
        for callback in callbacks:
            callback()


def _tail(output: RequestOutput, request: PreparedRequest) -> list[float]:
    """Log-probabilities of the tokens from ``scored_from`` on."""
    assert output.prompt_logprobs is not None, "scored without prompt_logprobs"
    start = request.scored_from
    places = zip(request.token_ids[start:], output.prompt_logprobs[start:], strict=True)
    return [position[token].logprob for token, position in places if position is not None]


def _log_probability(scored: Sequence[Sequence[float]]) -> float:
    """A label's, from what was scored of it: all of its tokens and an end, then the other ends alone."""
    return math.fsum(scored[0][:-1]) + _log_sum([one[-1] for one in scored])


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of the sum of what ``logs`` are logarithms of."""
    most = max(logs)
    return most + math.log(math.fsum(math.exp(one - most) for one in logs))


def _seconds(outputs: Sequence[RequestOutput]) -> float | None:
    """From the first start in the engine to the last end."""
    times = [output.metrics for output in outputs if output.metrics is not None]
    begins = [one.scheduled_time or one.arrival_time for one in times]
    ends = [end for one in times if (end := one.finished_time or one.last_token_time) is not None]
    return max(0.0, max(ends) - min(begins)) if begins and ends else None
