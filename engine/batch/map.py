"""``LLM.map``: prompts times parameters in one batch, a table out of it.

A :class:`MapClient` is where prompts go: a model in this process, or a remote server.
"""

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engine.batch.prompt_table import Prompts, Task, combinations, import_pandas, read_table, task_key
from engine.errors import GenerationError, RequestError, VMMagicError
from engine.handover import interruptible
from engine.outputs import RequestMetrics

if TYPE_CHECKING:
    import pandas

END_SECONDS = 5.0
"""How long an interrupted map waits for the requests that it ended."""
_WAIT_SLICE = 0.2
_COUNT_SECONDS = 0.1
"""How old a count of tokens may be that a bar shows: hundreds of prompts are under way, and thousands may end a second,
in the interpreter that the engine's thread needs as well."""
UseTqdm = bool | Callable[..., Any]
"""As in vLLM: whether to show a progress bar, or what makes one."""


class MapInterrupted(KeyboardInterrupt):
    """A map was stopped. ``result`` is the DataFrame of what is done; ``resume=`` goes on from it."""

    def __init__(self, message: str, result: "pandas.DataFrame") -> None:
        super().__init__(message)
        self.result = result

    def _render_traceback_(self) -> list[str]:
        """One line instead of a traceback, in a notebook."""
        return [f"Interrupted: {self}"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt. ``time`` is in seconds, from its start in the engine to its last token."""

    text: str
    reasoning: str | None
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    time: float | None
    finish_reason: str | None


class PromptStream(Protocol):
    """A prompt's request, in this process or at a server."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""

    def when_over(self, callback: Callable[[], None]) -> None:
        """``callback()`` once the request is over, from any thread; at once if it is."""

    def abort(self) -> None:
        """End the request soon."""


class MapJob(Protocol):
    """One prompt under way."""

    @property
    def stream(self) -> PromptStream:
        """Its request."""

    def answer(self) -> Answer:
        """What came so far; raises what ended the request, if something failed."""


class MapClient(Protocol):
    """Where prompts go."""

    @property
    def look_ahead(self) -> int:
        """How many prompts to hand over before the first answer."""

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise for parameters that no prompt could have."""

    def submit(self, prompt: str, params: Mapping[str, Any]) -> MapJob:
        """Begin; ``params`` are sampling values and ``system``. Raises RequestError where only this prompt is wrong."""


@dataclass
class Rows:
    """Outcomes in the order of their tasks; each slot is filled once."""

    tasks: list[Task] = field(default_factory=list)
    outcomes: list[Answer | str | None] = field(default_factory=list)
    """An answer, the text of an error, or None while under way."""

    def begin(self, task: Task) -> int:
        """A slot for ``task``."""
        self.tasks.append(task)
        self.outcomes.append(None)
        return len(self.tasks) - 1

    def finished(self) -> Iterator[tuple[Task, Answer | str]]:
        """Tasks whose slot is filled."""
        for task, outcome in zip(self.tasks, self.outcomes, strict=True):
            if outcome is not None:
                yield task, outcome

    @property
    def num_done(self) -> int:
        """Answers that are whole."""
        return sum(isinstance(one, Answer) and one.finish_reason != "abort" for one in self.outcomes)


class MapRun:
    """Hands tasks to a client with bounded look-ahead and files what comes back."""

    def __init__(self, client: MapClient, bar: "ProgressBar") -> None:
        self.rows = Rows()
        self._client = client
        self._bar = bar
        self._num_tokens = 0
        self._counted, self._counted_at = 0, -math.inf
        self._jobs: dict[int, MapJob] = {}
        self._over: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self, tasks: Iterable[Task], done: "Earlier") -> None:
        """All tasks; those that ``done`` knows are taken from there. If anything raises, the rest is ended."""
        try:
            for task in tasks:
                slot = self.rows.begin(task)
                earlier = done.take(task)
                if task.error is not None or earlier is not None:
                    self._file(slot, earlier or task.error or "")
                else:
                    self._start(slot, task)
                while len(self._jobs) >= self._client.look_ahead:
                    self._take_one()
            while self._jobs:
                self._take_one()
        except BaseException:
            self._end_all()
            raise

    def _start(self, slot: int, task: Task) -> None:
        try:
            job = self._client.submit(task.prompt, task.params)
        except RequestError as error:
            self._file(slot, str(error))
            return
        self._jobs[slot] = job
        job.stream.when_over(lambda: self._over.put(slot))

    def _take_one(self) -> None:
        while True:
            try:
                slot = self._over.get(timeout=_WAIT_SLICE)
                break
            except queue.Empty:
                self._bar.show(self._tokens_so_far())
        job = self._jobs.pop(slot)
        self._num_tokens += job.stream.num_tokens
        try:
            self._file(slot, job.answer())
        except (RequestError, GenerationError) as error:
            self._file(slot, str(error))

    def _file(self, slot: int, outcome: Answer | str) -> None:
        self.rows.outcomes[slot] = outcome
        self._bar.add(self._tokens_so_far(), failed=isinstance(outcome, str))

    def _tokens_so_far(self) -> int:
        """Tokens generated in this run, those of the prompts under way included; at the end, all of them."""
        now = time.monotonic()
        if not self._jobs or now - self._counted_at >= _COUNT_SECONDS:
            self._counted = self._num_tokens + sum(job.stream.num_tokens for job in self._jobs.values())
            self._counted_at = now
        return self._counted

    def _end_all(self) -> None:
        """Abort what runs and keep what it wrote."""
        for job in self._jobs.values():
            job.stream.abort()
        deadline = time.monotonic() + END_SECONDS
        while self._jobs:
            try:
                slot = self._over.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            try:
                self.rows.outcomes[slot] = self._jobs.pop(slot).answer()
            except VMMagicError as error:
                self.rows.outcomes[slot] = str(error)


class AnswerColumns:
    """How answers become columns of a DataFrame, and are read from one again."""

    needed: Sequence[str] = ("text", "finish_reason")
    """Columns without which a DataFrame cannot be gone on with."""

    def write(self, answers: Sequence[Answer | None]) -> dict[str, Any]:
        """Columns of ``answers``; None stands for a row that failed."""
        pd = import_pandas()
        columns: dict[str, Any] = {"text": [answer and answer.text for answer in answers]}
        if any(answer is not None and answer.reasoning for answer in answers):
            columns["reasoning"] = [answer and answer.reasoning for answer in answers]
        for name in ("tokens", "prompt_tokens", "cached_tokens"):
            columns[name] = pd.array([answer and getattr(answer, name) for answer in answers], dtype="Int64")
        columns["time"] = pd.array([answer and answer.time for answer in answers], dtype="Float64")
        columns["finish_reason"] = [answer and answer.finish_reason for answer in answers]
        return columns

    def read(self, row: Mapping[Any, Any]) -> Answer | None:
        """The answer of a row that has all columns and no error; None where it was cut off."""
        if not isinstance(row["finish_reason"], str) or row["finish_reason"] == "abort":
            return None
        reasoning = row.get("reasoning")
        return Answer(
            row["text"] if isinstance(row["text"], str) else "",  # a file turns an empty text into a missing one
            reasoning if isinstance(reasoning, str) else None,
            int(read_number(row.get("tokens")) or 0),
            int(read_number(row.get("prompt_tokens")) or 0),
            int(read_number(row.get("cached_tokens")) or 0),
            read_number(row.get("time")),
            row["finish_reason"],
        )


TEXT_COLUMNS = AnswerColumns()


class Earlier:
    """Answers of an earlier map's DataFrame, to be taken once each. Rows that failed or were cut off are not in it."""

    def __init__(
        self, frame: "pandas.DataFrame | None", names: Sequence[str], columns: AnswerColumns = TEXT_COLUMNS
    ) -> None:
        self._answers: dict[str, deque[Answer]] = {}
        if frame is None:
            return
        missing = [name for name in ("prompt", *columns.needed, "error", *names) if name not in frame.columns]
        if missing:
            raise RequestError(
                f"resume: column {missing[0]!r} is missing; give the DataFrame of a map with the same parameters",
                param="resume",
            )
        for row in frame.to_dict("records"):
            answer = None if isinstance(row["error"], str) else columns.read(row)
            if answer is not None:
                key = task_key(row["prompt"], {name: row[name] for name in names})
                self._answers.setdefault(key, deque()).append(answer)

    def take(self, task: Task) -> Answer | None:
        """The answer to the same prompt with the same parameters, if there is one left."""
        found = self._answers.get(task.key) if self._answers else None
        return found.popleft() if found else None


def read_number(value: Any) -> float | None:
    """A cell of a table as a number; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if number != number else number  # NaN


@dataclass(frozen=True)
class MapRequest:
    """What a user asks of a map, read and checked before the first prompt goes out."""

    prompts: Prompts
    grid: list[dict[str, Any]]
    resume: "pandas.DataFrame | None" = None
    columns: AnswerColumns = TEXT_COLUMNS

    @classmethod
    def of(
        cls,
        template: str | Sequence[str],
        params: Mapping[str, Any],
        *,
        variables: Mapping[str, Any] | None = None,
        resume: "pandas.DataFrame | None" = None,
        columns: AnswerColumns = TEXT_COLUMNS,
    ) -> "MapRequest":
        """``template`` may be several; ``params`` with lists are a grid. Raises RequestError."""
        if "n" in params:
            raise RequestError("n: a map gives one answer per prompt; use seed=[1, 2, 3]", param="n")
        given = {name: value for name, value in params.items() if value is not None}
        templates = [template] if isinstance(template, str) else list(template)
        return cls(Prompts(templates, variables or {}), combinations(given), resume, columns)


def map_prompts(
    client: MapClient,
    source: Any,
    request: MapRequest,
    *,
    keep: Callable[["pandas.DataFrame"], None],
    use_tqdm: UseTqdm,
) -> "pandas.DataFrame":
    """Run ``request`` over the rows of ``source``; the DataFrame, also handed to ``keep`` however this ends.

    KeyboardInterrupt becomes MapInterrupted with what is done.
    """
    import_pandas()
    for params in request.grid:
        client.check(params)
    table = read_table(source)
    per_row = len(request.prompts.templates) * len(request.grid)
    names = list(request.grid[0])
    bar = ProgressBar(None if table.total is None else table.total * per_row, shown=use_tqdm)
    run = MapRun(client, bar)

    def finish() -> "pandas.DataFrame":
        bar.close()
        frame = to_frame(run.rows, names, table.index_name, request.columns)
        keep(frame)
        return frame

    try:
        run.run(request.prompts.tasks(table, request.grid), Earlier(request.resume, names, request.columns))
    except KeyboardInterrupt:
        raise MapInterrupted(_interrupted_text(run.rows, bar.total), finish()) from None
    except BaseException:
        finish()
        raise
    return finish()


def _interrupted_text(rows: Rows, total: int | None) -> str:
    of = f" of {total}" if total is not None else ""
    done = f"stopped with {rows.num_done}{of} prompts done"
    return f"{done}; .last_map has what there is, and map(…, resume=llm.last_map) goes on"


def to_frame(
    rows: Rows, names: Sequence[str], index_name: Any = None, form: AnswerColumns = TEXT_COLUMNS
) -> "pandas.DataFrame":
    """Finished rows with columns prompt, the parameters ``names``, what ``form`` makes of the answers, and error."""
    pd = import_pandas()
    finished = list(rows.finished())
    answers = [outcome if isinstance(outcome, Answer) else None for _, outcome in finished]
    columns: dict[str, Any] = {"prompt": [task.prompt for task, _ in finished]}
    for name in names:
        columns[name] = [task.params[name] for task, _ in finished]
    columns |= form.write(answers)
    columns["error"] = [outcome if isinstance(outcome, str) else None for _, outcome in finished]
    labels = [task.label for task, _ in finished]
    index = pd.MultiIndex.from_tuples(labels) if labels and isinstance(labels[0], tuple) else pd.Index(labels)
    index.name = index_name
    frame: pandas.DataFrame = pd.DataFrame(columns, index=index)
    return frame


class ProgressBar:
    """A bar with tokens per second, also of prompts under way, and the number of failures."""

    def __init__(self, total: int | None, *, shown: UseTqdm) -> None:
        self.total = total
        self._num_failed = 0
        self._started = time.monotonic()
        self._bar: Any = None
        if shown is True:
            from tqdm.auto import tqdm

            shown = interruptible(tqdm)
        if shown:
            self._bar = shown(total=total, desc="prompts", unit="prompt", mininterval=0.2)

    def add(self, num_tokens: int, *, failed: bool) -> None:
        """Count one more prompt; ``num_tokens`` as in :meth:`show`."""
        self._num_failed += failed
        self.show(num_tokens, refresh=False)
        if self._bar is not None:
            self._bar.update()

    def show(self, num_tokens: int, *, refresh: bool = True) -> None:
        """Say how fast ``num_tokens``, all that were generated until now, came."""
        if self._bar is None:
            return
        rate = num_tokens / max(1e-6, time.monotonic() - self._started)
        parts = [f"{rate:.0f} tokens/s" if num_tokens else "", f"{self._num_failed} failed" if self._num_failed else ""]
        self._bar.set_postfix_str(", ".join(filter(None, parts)), refresh=refresh)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def work_seconds(metrics: RequestMetrics | None) -> float | None:
    """Seconds from a request's start (after the queue, where known) to its last token."""
    if metrics is None:
        return None
    end = metrics.finished_time or metrics.last_token_time
    begin = metrics.scheduled_time or metrics.arrival_time
    return None if end is None else max(0.0, end - begin)


def chat_messages(prompt: str, system: str | None) -> list[dict[str, Any]]:
    """A prompt as the only question of a conversation."""
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]
