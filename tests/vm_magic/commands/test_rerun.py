"""``--record`` and ``%vllm_metal rerun`` over the real engine."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from engine.errors import RequestError
from engine.runtime.stream import RequestStream
from tests.conftest import TinyModelDir
from tests.vm_magic.fake_vllm import FakeVLLM
from tests.vm_magic.helpers import cell, line
from vm_magic.commands.table import candidates
from vm_magic.show.errors import Interrupted, MagicUsageError
from vm_magic.state.record import KEY, MAX_CHARACTERS, kept
from vm_magic.state.record_file import MAX_BYTES, checked
from vm_magic.state.session import current_session


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, gpu_memory_utilization=0.2) as made:
        yield made


@pytest.fixture
def llm(shell: Any, tiny: LLM) -> Iterator[LLM]:
    """A tiny random model, loaded: it samples anything, so that the same text twice is no chance."""
    current_session().llm = tiny
    tiny.settings.reset()
    yield tiny
    tiny.settings.reset()
    current_session().llm = None


@pytest.fixture
def record(shell: Any, llm: LLM) -> dict[str, Any]:
    reply = cell(shell, "chat --record --max-tokens 12", "Tell me of {{ 6 * 7 }} rivers")
    made: dict[str, Any] = reply.record
    return made


def notebook(path: Path, *records: Any) -> str:
    """A notebook at ``path`` with a recorded cell for each of ``records``."""
    outputs = [[{"output_type": "display_data", "data": {}, "metadata": {KEY: kept([one])}}] for one in records]
    cells = [
        {"cell_type": "code", "execution_count": number, "source": "raise SystemExit", "outputs": one}
        for number, one in enumerate(outputs, 1)
    ]
    cells.insert(0, {"cell_type": "markdown", "source": "text"})
    path.write_text(json.dumps({"nbformat": 4, "cells": cells}))
    return str(path)


def test_a_record_has_what_repeats_the_reply_and_nothing_of_this_machine(
    shell: Any, record: dict[str, Any], llm: LLM
) -> None:
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["format"], record["kind"], record["where"]) == (1, "chat", "kernel")
    assert record["request"]["messages"] == [{"role": "user", "content": "Tell me of 42 rivers"}]
    assert record["sampling"]["seed"] >= 0
    assert record["sampling"]["temperature"] == 1
    assert record["reply"]["tokens"] == len(record["reply"]["token_ids"]) == 12
    assert record["model"]["fingerprint"]
    assert record["versions"]["mlx-lm"]
    assert "attention" in record["engine"]
    text = json.dumps(record)
    folder = Path(llm.args.model)
    assert record["model"]["name"] == folder.name
    assert str(folder.parent) not in text
    assert str(Path.home()) not in text
    assert shell.display_pub.outputs[-1]["metadata"] == {KEY: {"format": 1, "records": [record]}}
    assert all(one["metadata"] == {} for one in shell.display_pub.outputs[:-1])
    assert shell.user_ns["_"].record is record


def test_nothing_is_recorded_unless_it_is_asked_for(shell: Any, llm: LLM) -> None:
    reply = cell(shell, "chat --max-tokens 2", "Hi")
    assert reply.record is None
    assert shell.display_pub.outputs[-1]["metadata"] == {}
    assert llm.explain().sampling[0].name
    with pytest.raises(RequestError, match="nothing was recorded yet"):
        line(shell, "rerun")
    shell.run_line_magic("config", "VLLMMetal.record = True")
    assert cell(shell, "chat --max-tokens 2", "Hi").record is not None
    assert cell(shell, "chat --max-tokens 2 --no-record", "Hi").record is None
    assert cell(shell, "vllm_metal complete --max-tokens 2", "Hi").record["request"]["prompt"] == "Hi"
    assert line(shell, "chat --max-tokens 2 Hi").record["sampling"]["max_tokens"] == 2
    shell.run_line_magic("config", "VLLMMetal.record = False")


def test_a_rerun_gives_the_same_tokens_whatever_is_set_meanwhile(shell: Any, record: dict[str, Any], llm: LLM) -> None:
    line(shell, "set temperature=0.1 top_k=1 max_tokens=3 stop=a")
    cell(shell, "chat", "Something else")
    conversation = list(current_session().conversation(None).messages)
    last = current_session().last_reply
    view = line(shell, "rerun")
    assert view.same
    assert view.headline.startswith("rerun of the last record (20")
    assert view.headline.endswith("the same 12 tokens")
    assert "Nothing differs in how it was made." in repr(view)
    assert view.turns[0].differences == ()
    assert current_session().conversation(None).messages == conversation
    assert current_session().last_reply is last
    assert len(current_session().records) == 1
    assert "the same 12 tokens" in view._repr_html_()


def test_a_seed_that_was_given_stays_and_a_greedy_reply_needs_none(shell: Any, llm: LLM) -> None:
    assert cell(shell, "chat --record --seed 5 --max-tokens 4", "Hi").record["sampling"]["seed"] == 5
    greedy = cell(shell, "chat --record -t 0 --new --max-tokens 4", "Hi").record
    assert "seed" not in greedy["sampling"]
    assert line(shell, "rerun").same
    assert line(shell, "rerun 2").same
    with pytest.raises(RequestError, match="rerun 3: there are 2 recorded replies"):
        line(shell, "rerun 3")


def test_a_reply_that_is_stored_is_found_by_its_variable(shell: Any, llm: LLM) -> None:
    cell(shell, "vllm_metal complete --record -o mine --max-tokens 5", "Once")
    assert line(shell, "rerun mine").same
    shell.user_ns["other"] = 3
    with pytest.raises(RequestError, match="other: holds no recorded reply"):
        line(shell, "rerun other")
    with pytest.raises(RequestError, match="neither a number, a variable nor"):
        line(shell, "rerun nobody")


def test_another_reply_is_shown_from_where_it_parts_with_what_differs(
    shell: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    theirs = copy.deepcopy(record)
    theirs["reply"]["token_ids"][3] += 1
    theirs["reply"]["text"] = theirs["reply"]["text"][:5] + "<b>other</b>"
    theirs["versions"]["mlx"] = "0.0.1"
    theirs["engine"]["device"] = "a <i>GPU</i>"
    theirs["model"]["name"] = "their-model"
    view = line(shell, f"rerun {notebook(tmp_path / 'theirs.ipynb', theirs)}")
    (turn,) = view.turns
    assert (turn.same, turn.token, turn.place) == (False, 3, 5)
    assert view.headline.startswith("rerun of theirs.ipynb [1]")
    assert "differs from token 4, character 6 on" in view.headline
    assert {one.name for one in turn.differences} == {"model name", "mlx version", "device"}
    assert "recorded with their-model, and repeated with" in turn.why
    text, page = repr(view), view._repr_html_()
    assert "then: " in text
    assert "mlx version  0.0.1" in text
    assert "&lt;b&gt;other" in page
    assert "<b>other" not in page
    assert "<i>" not in page


def test_where_nothing_differs_but_the_reply_the_ties_are_named(
    shell: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    theirs = copy.deepcopy(record)
    theirs["reply"]["text"] = "quite another"
    view = line(shell, f"rerun {notebook(tmp_path / 'n.ipynb', theirs)}")
    assert "may differ where the top logits tie" in repr(view)


def test_a_file_with_several_records_wants_a_cell_or_all(shell: Any, record: dict[str, Any], tmp_path: Path) -> None:
    theirs = copy.deepcopy(record)
    theirs["reply"]["text"] = "quite another"
    path = notebook(tmp_path / "both.ipynb", record, theirs)
    with pytest.raises(RequestError, match=r"both.ipynb: name a cell, or add --all; recorded are \[1\], \[2\]"):
        line(shell, f"rerun {path}")
    assert line(shell, f"rerun {path} 1").same
    with pytest.raises(RequestError, match=r"cell 7 is not recorded"):
        line(shell, f"rerun {path} 7")
    table = line(shell, f"rerun {path} --all")
    assert not table.same
    assert table.headline == "rerun of both.ipynb: 1 of 2 replies are the same"
    assert "[2]" in repr(table)
    assert "quite another" in table._repr_html_()
    with pytest.raises(MagicUsageError, match="go with a notebook's file"):
        line(shell, "rerun --all")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no notebook \\(not JSON\\)"),
        ("[" * 100_000, "is no notebook"),
        ("[]", "it has no cells"),
        ('{"cells": 3}', "it has no cells"),
        ('{"cells": [1, {"outputs": 5}, {"outputs": [7, {"metadata": 3}]}]}', "has no recorded replies"),
    ],
)
def test_a_file_that_is_no_notebook_is_refused_in_one_line(
    shell: Any, llm: LLM, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "odd.ipynb").write_text(content)
    with pytest.raises(RequestError, match=said) as error:
        line(shell, f"rerun {tmp_path / 'odd.ipynb'}")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(RequestError, match=r"none\.ipynb: cannot be read"):
        line(shell, f"rerun {tmp_path / 'none.ipynb'}")


def test_what_is_no_file_or_too_large_is_refused_at_once(shell: Any, llm: LLM, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "zero.ipynb").symlink_to("/dev/zero")
    (tmp_path / "folder.ipynb").mkdir()
    with (tmp_path / "large.ipynb").open("wb") as large:
        large.truncate(MAX_BYTES + 1)
    with pytest.raises(RequestError, match=r"large\.ipynb: larger than 200 MB"):
        line(shell, f"rerun {tmp_path}/large.ipynb")
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(RequestError, match=f"{name}.ipynb: is no file"):
            line(shell, f"rerun {tmp_path / name}.ipynb")
    with pytest.raises(RequestError, match=r"n\.ipynb: cannot be read \(Could not determine home"):
        line(shell, "rerun ~nobody-of-this-name/n.ipynb")
    for number in ("²", "9" * 5000):
        with pytest.raises(RequestError, match="neither a number, a variable nor a notebook's file"):
            line(shell, f"rerun {number}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.update(format=99), "its format is 99"),
        (lambda one: one.pop("sampling"), "'sampling' is missing"),
        (lambda one: one["sampling"].update(colour=1), "'colour' is no sampling value"),
        (lambda one: one["sampling"].update(structured_outputs={"regex": "a"}), "is no sampling value"),
        (lambda one: one["sampling"].update(temperature="hot"), "temperature"),
        (lambda one: one["sampling"].update(logit_bias={"x": 1}), "logit_bias is wrong"),
        (lambda one: one["request"].update(messages=[1]), "neither messages nor a prompt"),
        (lambda one: one["request"].pop("messages"), "neither messages nor a prompt"),
        (lambda one: one.update(request={"too long to keep": True}), "too long to keep"),
        (lambda one: one["request"].update(tools=[3]), "tools or template_kwargs are wrong"),
        (lambda one: one["request"].update(schema=[1]), "'schema' has the wrong form"),
        (lambda one: one["request"].update(template_kwargs={"tools": []}), "template_kwargs are wrong"),
        (lambda one: one["reply"].update(text=["a"]), "its reply is not text"),
        (lambda one: one["reply"].update(tool_calls=True), "its reply is not text"),
    ],
)
def test_a_record_that_somebody_changed_is_refused_in_one_line(
    shell: Any, record: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    theirs = copy.deepcopy(record)
    change(theirs)
    with pytest.raises(RequestError, match=said):
        line(shell, f"rerun {notebook(tmp_path / 'n.ipynb', theirs)}")
    with pytest.raises(RequestError, match="not an object"):
        checked(3)


def test_a_reply_that_was_stopped_is_repeated_up_to_there(shell: Any, record: dict[str, Any], tmp_path: Path) -> None:
    stopped = copy.deepcopy(record)
    stopped["reply"] |= {"finish_reason": "abort", "tokens": 6, "token_ids": record["reply"]["token_ids"][:6]}
    view = line(shell, f"rerun {notebook(tmp_path / 'n.ipynb', stopped)}")
    assert view.turns[0].num_tokens == 6
    assert "was cut off" in repr(view)


def test_messages_that_are_too_long_are_hashed_and_not_kept(shell: Any, llm: LLM) -> None:
    from vm_magic.state.record import _begin

    made = _begin({"messages": [{"role": "user", "content": "a" * MAX_CHARACTERS}]})
    assert set(made["request"]) == {"sha256", "too long to keep"}
    assert made["kind"] == "chat"


def test_a_detached_reply_is_recorded_too(shell: Any, scripted_llm: Any) -> None:
    current_session().llm = scripted_llm("one two three", step_seconds=0.01)
    try:
        cell(shell, "chat --record --detach", "Hi")
        reply = shell.user_ns["_"].wait(60)
        assert reply.record["reply"]["text"] == "one two three"
        assert shell.display_pub.outputs[-1]["metadata"][KEY]["records"] == [reply.record]
        assert line(shell, "rerun").same
    finally:
        current_session().llm = None


def test_an_interrupted_reply_is_recorded_as_far_as_it_came(
    shell: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = RequestStream.drain

    def interrupted(stream: RequestStream, timeout: float | None = None) -> Any:
        if timeout and stream.num_tokens >= 3:
            monkeypatch.setattr(RequestStream, "drain", drain)
            raise KeyboardInterrupt
        return drain(stream, timeout)

    monkeypatch.setattr(RequestStream, "drain", interrupted)
    with pytest.raises(Interrupted):
        cell(shell, "chat --record --max-tokens 400", "Hi")
    reply = shell.user_ns["_"]
    assert reply.record["reply"]["finish_reason"] == "abort"
    assert shell.display_pub.outputs[-1]["metadata"] == {KEY: kept([reply.record])}
    view = line(shell, "rerun")
    assert view.same
    assert view.turns[0].num_tokens == reply.record["reply"]["tokens"]


def test_each_turn_of_a_reply_that_calls_functions_is_repeated_without_calling_them(
    shell: Any, scripted_llm: Any
) -> None:
    from tests.vm_magic.chat.test_tools import TEMPLATE, WEATHER

    calls: list[str] = []

    def get_weather(city: str, days: int = 1) -> str:
        """The weather."""
        calls.append(city)
        return "rain <|script_1|>"

    shell.user_ns["get_weather"] = get_weather
    current_session().llm = scripted_llm(WEATHER, "It rains.", chat_template=TEMPLATE, tool_call_parser="hermes")
    try:
        cell(shell, "chat -t 0 --record --tools get_weather", "How is it?")
        assert len(current_session().records[-1]) == 2
        view = line(shell, "rerun")
        assert view.same
        assert len(view.turns) == 2
        assert "turn 2: the same" in view.headline
        assert len(calls) == 1
    finally:
        current_session().llm = None


def test_schemas_and_template_variables_are_repeated(shell: Any, scripted_llm: Any) -> None:
    current_session().llm = scripted_llm('{"a": 1}')
    try:
        reply = cell(shell, "chat -t 0 --record --json object", "Give me JSON")
        assert reply.record["request"]["schema"] is True
        assert line(shell, "rerun").same
    finally:
        current_session().llm = None


def test_a_thinking_budget_that_was_set_live_is_recorded_and_repeated(shell: Any, scripted_llm: Any) -> None:
    current_session().llm = scripted_llm("<think>one two three four five six</think>Yes.", reasoning_parser="qwen3")
    try:
        line(shell, "set thinking_token_budget=3")
        reply = cell(shell, "chat -t 0 --record", "Why?")
        assert reply.record["request"]["thinking_token_budget"] == 3
        line(shell, "set thinking_token_budget=")
        assert line(shell, "rerun").same
        assert len(reply.reasoning) < len("one two three four five six")
    finally:
        current_session().llm = None


def test_a_line_forms_record_is_in_the_metadata_of_what_is_shown(shell: Any, record: dict[str, Any]) -> None:
    bundle, metadata = shell.display_formatter.format(shell.user_ns["_"])
    assert "text/markdown" in bundle
    assert metadata["text/markdown"] == {KEY: kept([record])}


def test_a_server_gets_a_seed_and_the_record_says_what_is_not_known(
    shell: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    with FakeVLLM() as server:
        line(shell, f"connect {server.url}")
        reply = cell(shell, "chat --record --max-tokens 5", "Hi")
        sent = server.bodies[-1]
        assert reply.record["where"] == "server"
        assert sent["seed"] == reply.record["sampling"]["seed"]
        assert reply.record["sampling"] == {"max_tokens": 5, "seed": sent["seed"]}
        assert "127.0.0.1" not in json.dumps(reply.record)
        view = line(shell, "rerun")
        assert view.same
        assert {name: server.bodies[-1][name] for name in ("seed", "max_tokens")} == {
            "seed": sent["seed"],
            "max_tokens": 5,
        }
        assert "not known: the server's weights" in repr(view)
        theirs = line(shell, f"rerun {notebook(tmp_path / 'n.ipynb', record)}")
        assert "repeated with tiny" in repr(theirs)
        line(shell, "connect --close")
    assert "repeated with" in repr(line(shell, "rerun"))


def test_the_flag_and_notebooks_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    assert list(candidates(["rerun"], "the")) == ["theirs.ipynb"]
    assert "--record" in candidates(["chat"], "--re", cell=True)
    assert "rerun" in candidates([], "re")
