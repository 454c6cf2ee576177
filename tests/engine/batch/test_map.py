"""``LLM.map``: a table of prompts in one batch, compared with asking one by one."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas
import pytest

from engine import LLM
from engine.batch import map as map_module
from engine.batch.map import Answer, Earlier, MapInterrupted, MapRun, ProgressBar
from engine.batch.prompt_table import Prompts, Task, combinations, read_table, task_key
from engine.errors import ConfigError, EngineClosedError, GenerationError, RequestError
from tests.conftest import ScriptedLLM, TinyModelDir

SYSTEM = "You are a careful assistant who reads the whole text before the answer is begun. " * 6
NO_BAR = ProgressBar(None, shown=False)
TEMPLATE = "Summarise: {{ text }}"


@pytest.fixture(scope="module")
def llm(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, gpu_memory_utilization=0.2, max_num_seqs=32) as loaded:
        yield loaded


def texts(count: int) -> pandas.DataFrame:
    words = ["river", "stone", "winter", "lamp", "seven", "green"]
    rows = [" ".join(words[(i * 7 + j) % 6] for j in range(1 + i * 13 % 40)) for i in range(count)]
    return pandas.DataFrame({"text": rows}, index=[f"row {i}" for i in range(count)])


def test_two_hundred_rows_come_in_order_as_one_by_one_and_one_failure_stays_alone(llm: LLM) -> None:
    table = texts(200)
    table.loc["row 77", "text"] = "long " * 600
    table.loc["row 123", "text"] = None
    found = llm.map(table, TEMPLATE, system=SYSTEM, temperature=0, max_tokens=6, use_tqdm=False)
    assert list(found.index) == list(table.index)
    assert list(found.columns) == [
        *("prompt", "system", "temperature", "max_tokens", "text"),
        *("tokens", "prompt_tokens", "cached_tokens", "time", "finish_reason", "error"),
    ]
    failed = found[found.error.notna()]
    assert list(failed.index) == ["row 77", "row 123"]
    assert "maximum context length is 512 tokens" in failed.error.iloc[0]
    assert "'text' is undefined in this row" in failed.error.iloc[1]
    assert failed.text.isna().all()
    assert failed.tokens.isna().all()
    good = found[found.error.isna()]
    assert len(good) == 198
    assert set(good.finish_reason) <= {"length", "stop"}
    assert (good.tokens <= 6).all()
    assert (good.time > 0).all()
    for label in ("row 0", "row 1", "row 60", "row 122", "row 199"):
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": found.loc[label, "prompt"]},
        ]
        output = llm.chat(messages, llm.sampling_params(temperature=0, max_tokens=6))[0]
        assert found.loc[label, "text"] == output.outputs[0].text
        assert found.loc[label, "prompt_tokens"] == len(output.prompt_token_ids)
    assert (good.cached_tokens.iloc[1:] > 0).all(), "the system message's pages are shared"


def test_lists_of_parameters_and_templates_make_a_grid(llm: LLM) -> None:
    found = llm.map(
        ["one", "two"],
        ["{{ text }}!", "{{ text }}?"],
        temperature=[0, 0.5],
        seed=3,
        stop=["zz", "yy"],
        max_tokens=2,
        use_tqdm=False,
    )
    assert list(found.index) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert list(found.prompt) == ["one!", "one!", "one?", "one?", "two!", "two!", "two?", "two?"]
    assert list(found.temperature) == [0, 0.5] * 4
    assert list(found.stop) == [["zz", "yy"]] * 8
    assert found.error.isna().all()


def test_resume_asks_only_for_what_is_not_done(llm: LLM, tmp_path: Any) -> None:
    table = texts(6)
    first = llm.map(table.iloc[:4], TEMPLATE, temperature=[0, 1], max_tokens=3, use_tqdm=False)
    first.loc["row 2", "finish_reason"] = "abort"
    first.to_csv(tmp_path / "first.csv")
    asked = llm.stats().prefix_queries
    again = llm.map(
        table,
        TEMPLATE,
        temperature=[0, 1],
        max_tokens=3,
        use_tqdm=False,
        resume=pandas.read_csv(tmp_path / "first.csv"),
    )
    fresh = again[again.index.isin(["row 2", "row 4", "row 5"])]
    assert llm.stats().prefix_queries - asked == fresh.prompt_tokens.sum()
    assert len(again) == 12
    kept = [label for label in again.index if label in ("row 0", "row 1", "row 3")]
    assert list(again.loc[kept, "text"]) == [text if isinstance(text, str) else "" for text in first.loc[kept, "text"]]


def test_a_raw_map_is_a_completion(llm: LLM) -> None:
    found = llm.map(["One,", "Two,"], "{{ text }} two", raw=True, temperature=0, max_tokens=5, use_tqdm=False)
    outputs = llm.generate(["One, two", "Two, two"], llm.sampling_params(temperature=0, max_tokens=5), use_tqdm=False)
    assert list(found.text) == [output.outputs[0].text for output in outputs]


def test_answers_fit_a_schema_and_thoughts_have_a_column(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm('<think>Hm.</think>{"name": "Ulm"}', reasoning_parser="qwen3")
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    found = llm.map(["a", "b"], "City {{ text }}?", schema=schema, temperature=0, use_tqdm=False)
    assert [json.loads(text) for text in found.text] == [{"name": "Ulm"}] * 2
    assert list(found.reasoning) == ["Hm.", "Hm."]


def test_interrupting_keeps_what_is_done_and_resume_goes_on(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("One two three four.", step_seconds=0.02, max_num_seqs=1)
    main = threading.get_ident()

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and llm.stats().generation_tokens < 12:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(MapInterrupted, match=r"stopped with \d+ of 40 prompts done") as stopped:
        llm.map([f"row {i}" for i in range(40)], "{{ text }}", temperature=0, use_tqdm=False)
    killer.join()
    partial = stopped.value.result
    assert llm.last_map is not None
    assert partial.equals(llm.last_map)
    whole = partial[partial.finish_reason == "stop"]
    assert 1 <= len(whole) < 40
    assert set(whole.text) == {"One two three four."}
    deadline = time.monotonic() + 60
    while llm.stats().num_running + llm.stats().num_waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.stats().num_running + llm.stats().num_waiting == 0, "nothing runs on"
    again = llm.map([f"row {i}" for i in range(3)], "{{ text }}", temperature=0, use_tqdm=False, resume=partial)
    assert list(again.text) == ["One two three four."] * 3


class Bar:
    """Notes what a bar is told, as tqdm's class does."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __call__(self, **_: Any) -> "Bar":
        return self

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.told.append(text)

    def update(self) -> None:
        self.told.append("one more")

    def close(self) -> None:
        pass


def test_the_bar_tells_the_speed_before_a_prompt_is_done_and_counts_no_token_twice(
    scripted_llm: ScriptedLLM,
) -> None:
    llm = scripted_llm("word " * 60, step_seconds=0.02)
    bar, again = Bar(), Bar()
    done = llm.map(["a", "b"], "{{ text }}", temperature=0, max_tokens=50, use_tqdm=bar)
    assert re.fullmatch(r"[1-9]\d* tokens/s", next(text for text in bar.told if text)), "while both run"
    assert bar.told.count("one more") == 2
    llm.map(["a", "b"], "{{ text }}", temperature=0, max_tokens=50, use_tqdm=again, resume=done)
    assert again.told == ["", "one more"] * 2, "rows taken over have no speed"


def test_mistakes_are_told_before_anything_runs(llm: LLM) -> None:
    table = texts(3)
    asked = llm.stats().prefix_queries
    for template, params, message in (
        ("{{ txet }}", {}, "txet is not a column; the columns are: text"),
        ("{{ text", {}, "template, line 1"),
        (TEMPLATE, {"temprature": 0}, "temprature"),
        (TEMPLATE, {"temperature": [0, -1]}, "temperature must be non-negative"),
        (TEMPLATE, {"seed": []}, r"seed=\[\]: give at least one value"),
        (TEMPLATE, {"n": 2}, "one answer per prompt"),
        (TEMPLATE, {"system": "S", "raw": True}, "system: only for chats"),
        (TEMPLATE, {"schema": 3}, "schema: give a JSON schema"),
        (TEMPLATE, {"resume": pandas.DataFrame({"text": []})}, "resume: column 'prompt' is missing"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.map(table, template, use_tqdm=False, **params)
    with pytest.raises(RequestError, match="a DataFrame, a Series or a list of rows"):
        llm.map("no table", TEMPLATE, use_tqdm=False)
    assert llm.stats().prefix_queries == asked


def test_without_pandas_the_error_names_the_fix(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        llm.map(["a"], "{{ text }}", use_tqdm=False)


def test_missing_values_are_undefined_and_any_column_is_in_row() -> None:
    frame = pandas.DataFrame(
        {"a": [1.5, None], "b c": ["x", pandas.NA], "when": [pandas.Timestamp("2026-01-02"), None]}
    )
    table = read_table(frame)
    rows = list(table.rows)
    assert rows[0]["row"]["b c"] == "x"
    assert rows[1] == {"row": {}}
    prompts = Prompts(["{{ row['b c'] }} {{ a | default('none') }}"])
    first, second = prompts.tasks(read_table(frame), [{}])
    assert (first.prompt, first.error) == ("x 1.5", None)
    assert "has no attribute 'b c' in this row" in (second.error or "")
    named = pandas.Series(["u"], name="title")
    assert next(Prompts(["{{ title }}{{ mark }}"], {"mark": "!"}).tasks(read_table(named), [{}])).prompt == "u!"


def test_templates_run_in_a_sandbox() -> None:
    task = next(Prompts(["{{ text.__class__.__mro__ }}"]).tasks(read_table(["x"]), [{}]))
    assert "unsafe" in (task.error or "")


def test_braces_in_a_rows_values_are_data() -> None:
    for value in ("{{ 7 * 7 }}", "{% for a in range(9) %}x{% endfor %}", "{{ row }}", "{# gone #}"):
        task = next(Prompts(["say: {{ text }}"]).tasks(read_table([value]), [{}]))
        assert (task.prompt, task.error) == (f"say: {value}", None)


def test_a_key_survives_a_trip_through_a_file() -> None:
    assert task_key("p", {"t": 0, "stop": ["a"]}) == task_key("p", {"stop": ("a",), "t": 0.0})
    assert task_key("p", {"t": 0}) != task_key("p", {"t": 1})
    assert combinations({"a": [1, 2], "b": 3}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


class FakeJob:
    """Ends when told to."""

    num_tokens = 0

    def __init__(self, answer: Answer | Exception) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._over = False
        self._callbacks: list[Callable[[], None]] = []
        self.stream = self

    def when_over(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._over:
                self._callbacks.append(callback)
                return
        callback()

    def end(self) -> None:
        with self._lock:
            self._over, callbacks, self._callbacks = True, self._callbacks, []
        for callback in callbacks:
            callback()

    def answer(self) -> Answer:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def abort(self) -> None:
        self._answer = Answer("cut", None, 1, 1, 0, None, "abort")
        self.end()


class FakeClient:
    """Holds back what it was handed until ``look_ahead`` prompts are under way, then ends them from the back."""

    look_ahead = 3

    def __init__(self, failure: Exception | None = None) -> None:
        self.waiting: list[FakeJob] = []
        self.most = 0
        self.failure = failure

    def check(self, params: Mapping[str, Any]) -> None:
        pass

    def submit(self, prompt: str, params: Mapping[str, Any]) -> FakeJob:
        if prompt == "bad":
            raise RequestError("too long")
        job = FakeJob(self.failure or Answer(prompt.upper(), None, 1, 1, 0, 0.1, "stop"))
        self.waiting.append(job)
        self.most = max(self.most, len(self.waiting))
        threading.Timer(0.005, self._end_last).start()
        return job

    def _end_last(self) -> None:
        self.waiting.pop().end()


def tasks(*prompts: str) -> list[Task]:
    return [Task(i, prompt, {}) for i, prompt in enumerate(prompts)]


def test_no_more_than_the_look_ahead_is_under_way_and_order_is_kept() -> None:
    client = FakeClient()
    run = MapRun(client, NO_BAR)
    pulled = 0

    def lazily() -> Iterator[Task]:
        nonlocal pulled
        for task in tasks(*"abcdefghij"):
            pulled += 1
            assert pulled - run.rows.num_done <= client.look_ahead
            yield task

    run.run(lazily(), Earlier(None, ()))
    assert client.most <= 3
    assert [outcome.text for _, outcome in run.rows.finished() if isinstance(outcome, Answer)] == list("ABCDEFGHIJ")


def test_a_row_that_fails_is_marked_and_an_engine_that_fails_ends_the_map() -> None:
    run = MapRun(FakeClient(GenerationError("the grammar failed")), NO_BAR)
    run.run(tasks("a", "bad", "b"), Earlier(None, ()))
    assert [outcome for _, outcome in run.rows.finished()] == ["the grammar failed", "too long", "the grammar failed"]
    run = MapRun(FakeClient(EngineClosedError("gone")), NO_BAR)
    with pytest.raises(EngineClosedError, match="gone"):
        run.run(tasks(*"abcdef"), Earlier(None, ()))


def test_tokens_under_way_are_counted_now_and_then_and_not_for_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    num_looks, told, held = 0, [], []

    class Looked(FakeJob):
        @property
        def num_tokens(self) -> int:  # type: ignore[override]
            nonlocal num_looks
            num_looks += 1
            return 2

    class Client(FakeClient):
        look_ahead = 21

        def submit(self, prompt: str, params: Mapping[str, Any]) -> FakeJob:
            job = Looked(Answer(prompt, None, 2, 1, 0, 0.1, "stop"))
            if prompt == "slow":
                held.append(job)
                return job
            job.end()
            for slow in held if prompt == "last" else ():
                slow.end()
            return job

    class Bar(ProgressBar):
        def add(self, num_tokens: int, *, failed: bool) -> None:
            told.append(num_tokens)

    monkeypatch.setattr(map_module, "_COUNT_SECONDS", 60.0)  # on however slow a machine
    prompts = [*["slow"] * 20, *["quick"] * 179, "last"]
    MapRun(Client(), Bar(None, shown=False)).run(tasks(*prompts), Earlier(None, ()))
    assert len(told) == len(prompts)
    assert told[-1] == 2 * len(prompts), "the last count is of all"
    assert num_looks <= len(prompts) + Client.look_ahead
