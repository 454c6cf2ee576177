"""``%vllm_metal grid`` over the real engine, with a model that says what the test wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from engine import LLM
from engine.batch.map import MapInterrupted
from engine.errors import ConfigError, EngineClosedError, RequestError
from tests import scripted_model
from tests.vm_magic.helpers import cell, line, shown
from vm_magic.commands.grid import read_over
from vm_magic.commands.table import candidates, command_parser
from vm_magic.panel import choice_buttons
from vm_magic.show.errors import Interrupted, MagicUsageError
from vm_magic.show.grid_view import MAX_ROWS, GridView
from vm_magic.state.session import current_session


@pytest.fixture(scope="module")
def scripted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = scripted_model.write_scripted_model(tmp_path_factory.mktemp("grid"), smollm2_gguf, "Fine <b>weather</b>.")
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.2) as made:
        yield made


@pytest.fixture
def llm(shell: Any, scripted: LLM) -> Iterator[LLM]:
    """A scripted model, loaded."""
    current_session().llm, scripted.last_map = scripted, None
    yield scripted
    current_session().llm = None


def test_a_cell_runs_every_combination_and_files_a_dataframe(shell: Any, llm: LLM) -> None:
    shell.user_ns["city"] = ["Ulm", "Bonn"]
    shell.user_ns["mood"] = "short"
    found = cell(shell, "vllm_metal grid -t 0,0.5 --top-p 0.9 --over city -s Brief", "A {{ mood }} line on {{ city }}.")
    assert isinstance(found, pandas.DataFrame)
    assert shell.user_ns["_"] is found
    assert list(found.columns[:5]) == ["city", "prompt", "system", "temperature", "top_p"]
    assert list(found.city) == ["Ulm", "Ulm", "Bonn", "Bonn"]
    assert list(found.temperature) == [0, 0.5, 0, 0.5]
    assert found.prompt.iloc[2] == "A short line on Bonn."
    assert set(found.text) == {"Fine <b>weather</b>."}
    assert "Brief" in llm.explain().prompt
    outputs = [
        one for one in shell.display_pub.outputs if one["transient"] == shell.display_pub.outputs[0]["transient"]
    ]
    bundle = outputs[-1]["data"]
    assert "4 prompts done" in bundle["text/plain"]
    assert "top_p=0.9" in bundle["text/plain"]
    assert "Fine &lt;b&gt;weather&lt;/b&gt;." in bundle["text/html"]
    assert "<progress" in outputs[0]["data"]["text/html"], "the bar, whose place the table takes"
    assert 'max="4"' in shell.display_pub.outputs[1]["data"]["text/html"]
    assert shell.display_pub.outputs[1]["data"]["text/plain"].startswith("prompts: 0 of 4")


def test_rows_of_a_dataframe_keep_their_index_and_failures_are_shown(shell: Any, llm: LLM) -> None:
    shell.user_ns["df"] = pandas.DataFrame({"name": ["Ada", None]}, index=["a", "b"])
    found = cell(shell, "vllm_metal grid --over df --temperature 0", "Who is {{ name }}?\n")
    assert list(found.index) == ["a", "b"]
    assert list(found.prompt) == ["Who is Ada?", ""]
    assert "name" not in found.columns
    assert "1 prompts done, 1 failed" in shown(shell)["text/plain"]
    assert "'name' is undefined in this row" in shown(shell)["text/html"].replace("&#x27;", "'")


def test_the_line_form_returns_the_dataframe_and_out_stores_it(shell: Any, llm: LLM) -> None:
    found = line(shell, "grid --complete --max-tokens 1,2 Once upon a time")
    assert list(found.max_tokens) == [1, 2]
    assert list(found.index) == [0, 1]
    assert list(found.prompt) == ["Once upon a time"] * 2
    shell.display_pub.outputs.clear()
    assert cell(shell, "vllm_metal grid -o result --seed 1,2,3", "Hello") is None
    assert list(shell.user_ns["result"].seed) == [1, 2, 3]
    assert shown(shell)["text/plain"].startswith("3 prompts done")
    assert "text/html" not in shown(shell)


def test_json_and_resume(shell: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="--resume: there was no map or grid yet"):
        cell(shell, "vllm_metal grid --resume", "Hello")
    first = cell(shell, "vllm_metal grid -t 0", "Hello")
    asked = llm.stats().prompt_tokens
    again = cell(shell, "vllm_metal grid -t 0 --resume", "Hello")
    assert llm.stats().prompt_tokens == asked
    assert list(again.text) == list(first.text)
    found = cell(shell, "vllm_metal grid --json object -t 0 --max-tokens 40", "An object")
    assert found.text.iloc[0].lstrip().startswith("{")


def test_a_button_sets_a_variants_values_for_all_requests(shell: Any, llm: LLM) -> None:
    cell(shell, "vllm_metal grid -t 0.25,0.5 --top-p 0.9,1 -s Brief -s Long", "Hello")
    row = choice_buttons._open[-1]
    labels = [one.description for one in row.buttons]
    assert labels[0] == "Use temperature=0.25 top_p=0.9"
    assert len(labels) == 4
    row.buttons[3].click()
    assert dict(llm.settings.snapshot()) == {"temperature": 0.5, "top_p": 1.0}
    note = shown(shell)["text/plain"]
    assert note.startswith("Set for all requests: temperature=0.5 top_p=1 (%vllm_metal set temperature=none top_p=none")
    line(shell, "set temperature=none top_p=none")
    rows = len(choice_buttons._open)
    shell.user_ns["city"] = ["Ulm", "Bonn"]
    cell(shell, "vllm_metal grid -t 0 --over city", "Hello {{ city }}")
    cell(shell, "vllm_metal grid -o kept -t 0,1", "Hello")
    line(shell, "grid -t 0,1 Hello")
    cell(shell, "vllm_metal grid --seed 1,2,3,4,5,6,7,8,9 --max-tokens 1", "Hello")
    assert len(choice_buttons._open) == rows


def test_stopping_keeps_what_is_done(shell: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, count = llm.submit, 0

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        stream = submit(*args, **kwargs)
        stream.result()
        return stream

    monkeypatch.setattr(llm, "submit", stopped)
    shell.user_ns["n"] = range(6)
    with pytest.raises(Interrupted, match=r"stopped with 3 of 6 prompts done.*--resume goes on"):
        cell(shell, "vllm_metal grid --over n -t 0", "Number {{ n }}")
    monkeypatch.undo()
    assert list(shell.user_ns["_"].n) == [0, 1, 2]
    found = cell(shell, "vllm_metal grid --over n -t 0 --resume", "Number {{ n }}")
    assert list(found.n) == list(range(6))
    assert found.error.isna().all()


def test_an_interrupted_map_in_a_cell_is_one_line(shell: Any) -> None:
    error = MapInterrupted("stopped with 3 of 6 prompts done", pandas.DataFrame())
    assert error._render_traceback_() == ["Interrupted: stopped with 3 of 6 prompts done"]


def test_mistakes_are_one_line(shell: Any, llm: LLM) -> None:
    for text, kind, message in (
        ("grid -o 1x Hi", MagicUsageError, "'1x' is not a variable name"),
        ("grid -t 0,x Hi", MagicUsageError, "'0,x' is not a list such as 0,0.7"),
        ("grid --over nothing Hi", RequestError, "--over nothing: no such variable"),
        ("grid --over shown Hi", RequestError, "expected a DataFrame, a Series or a list, not str"),
        ("grid -t 0", RequestError, "no prompt"),
        ("grid --temprature 0 Hi", ConfigError, "did you mean --temperature"),
        ("grid -t -1 Hi", RequestError, "temperature must be non-negative"),
        ("grid --think Hi", RequestError, "no switch for thinking"),
    ):
        shell.user_ns["shown"] = "text"
        with pytest.raises(kind, match=message):
            line(shell, text)
    with pytest.raises(MagicUsageError, match="the prompt goes into the cell's body"):
        cell(shell, "vllm_metal grid hello", "Hi")
    current_session().llm = None
    with pytest.raises(EngineClosedError, match="no model is loaded"):
        line(shell, "grid Hi")


def test_rows_may_be_lists_of_mappings_series_and_products() -> None:
    namespace = {"rows": [{"a": 1}, {"a": 2}], "s": pandas.Series([3, 4], index=["x", "y"]), "one": ("p", "q")}
    assert read_over(["rows"], namespace) == ([{"a": 1}, {"a": 2}], [])
    frame, lists = read_over(["s"], namespace)
    assert (list(frame.index), list(frame.columns), lists) == (["x", "y"], ["s"], ["s"])
    rows, lists = read_over(["rows", "one"], namespace)
    assert rows[:2] == [{"a": 1, "one": "p"}, {"a": 1, "one": "q"}]
    assert lists == ["one"]
    assert read_over([], namespace) == ([{}], [])


def test_a_long_table_shows_its_beginning() -> None:
    frame = pandas.DataFrame(
        {
            "prompt": [f"p{i}" for i in range(100)],
            "text": ["x" * 2000] * 100,
            "tokens": 1,
            "time": 0.5,
            "finish_reason": "stop",
            "error": None,
        }
    )
    view = GridView.of(frame)
    assert len(view.rows) == MAX_ROWS
    assert "60 more rows" in repr(view)
    assert max(len(row) for row in repr(view).splitlines()) < 200
    empty = GridView.of(frame.head(0))
    assert "0 prompts done" in repr(empty)
    frame.loc[:6, "finish_reason"] = "abort"
    assert GridView.of(frame).caption.startswith("93 prompts done, 7 cut off")


def test_help_and_completion_know_the_flags() -> None:
    text = command_parser("grid").format_help()
    assert "%%vllm_metal grid -t 0,0.7 --top-p 0.9,1 " in text
    assert "--over" in candidates(["grid"], "--o", cell=True)
    assert "grid" in candidates([], "g", cell=True)
    assert "--close" in candidates(["connect"], "--")
    assert not list(candidates(["grid", "--over"], "")), "IPython completes the names of variables"


def test_replicas_reach_the_map_and_devices_that_are_not_here_are_refused(
    shell: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.batch.replicas.device_names", lambda: ["cpu"])
    parse = command_parser("grid").parse_args
    assert parse(["--replicas", "2", "Hi"]).replicas == 2
    assert parse(["--replicas", "cuda:0, cuda:1", "Hi"]).replicas == ["cuda:0", "cuda:1"]
    assert len(line(shell, "grid --replicas cpu --max-tokens 4 Hi")) == 1
    with pytest.raises(ConfigError, match=r"replicas=\['cuda:0', 'cuda:1'\]: cuda:0 is not here; this machine has cpu"):
        line(shell, "grid --replicas cuda:0,cuda:1 Hi")
