"""``%%chat --compare``: replies side by side, of which one may join the conversation."""

from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, EngineClosedError, RequestError
from engine.outputs import Reply
from tests.vm_magic import fakes
from tests.vm_magic.fake_vllm import USAGE, FakeVLLM, chunk
from tests.vm_magic.helpers import Capture, cell, line
from vm_magic.chat.compare import Comparison
from vm_magic.panel import choice_buttons
from vm_magic.show.compare_view import TerminalCompare, VariantShown, compare_bundle
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_text import ReplyText
from vm_magic.state.session import current_session

ANSWER = " ".join(fakes.WORDS)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with FakeVLLM(models=[{"id": "base"}, {"id": "adapter", "parent": "base"}]) as fake:
        yield fake


def columns(shell: Any) -> list[dict[str, Any]]:
    """The bundles of the columns' place."""
    return [one["data"] for one in shell.display_pub.outputs if "flex" in one["data"].get("text/markdown", "")]


def buttons(shell: Any) -> choice_buttons.ChoiceButtons:
    return choice_buttons._open[-1]


def test_variants_run_at_once_and_stream_into_one_place(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.02
    found = cell(shell, "chat --compare temperature=0,0.7 --top-p 0.9", "hello")
    assert isinstance(found, Comparison)
    assert shell.user_ns["_"] is found
    assert [stream.params.temperature for stream in loaded.streams] == [0, 0.7]
    assert {stream.params.top_p for stream in loaded.streams} == {0.9}
    assert len(set(loaded.prompts)) == 1
    assert found.labels == ("temperature=0", "temperature=0.7")
    assert [str(one) for one in found] == [ANSWER, ANSWER]
    assert found["temperature=0.7"] is found[1] is found[-1]
    places = {one["transient"]["display_id"] for one in shell.display_pub.outputs if "flex" in str(one["data"])}
    assert len(places) == 1
    assert len(columns(shell)) > 3
    last = columns(shell)[-1]
    assert last["text/plain"].count(ANSWER) == 2
    assert "tokens/s" in last["text/markdown"]
    assert repr(found) == last["text/plain"]
    first = loaded.streams[0].metrics.last_token_time
    second = loaded.streams[1].metrics.first_token_time
    assert first is not None
    assert second is not None
    assert second < first


def test_several_flags_multiply_and_a_table_says_what_differs(shell: Any, loaded: fakes.FakeLLM) -> None:
    heads = (
        'chat --new --compare temperature=0,1 --compare "system=Be brief, please." --compare "system=Rhyme." -o kept'
    )
    assert cell(shell, heads, "hello") is None
    found = shell.user_ns["kept"]
    assert len(found) == 4
    assert found.labels[0] == "temperature=0 system=Be brief, please."
    assert loaded.prompts[1] == "<system>Rhyme.<user>hello<assistant>"
    frame = found.to_frame()
    assert list(frame.columns) == ["temperature", "system", "text", "reasoning", "tokens", "time", "finish_reason"]
    assert list(frame.temperature) == [0, 0, 1, 1]
    assert shell.display_pub.outputs == []


def test_thinking_is_compared_and_equal_variants_are_counted(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat --compare think=on,off", "hello")
    assert loaded.template_kwargs == [{"enable_thinking": True}, {"enable_thinking": False}]
    assert cell(shell, "chat --compare seed=1,1", "hello").labels == ("seed=1", "seed=1 (2)")


def test_none_joins_the_conversation_until_it_is_kept(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat", "one")
    found = cell(shell, "chat --compare temperature=0,1", "two")
    conversation = current_session().conversation(None)
    assert len(conversation.messages) == 2
    kept = found.keep(1)
    assert kept is found[1]
    assert [m["content"] for m in conversation.messages] == ["one", ANSWER, "two", ANSWER]
    found.keep("temperature=0")
    assert conversation.messages == found[0].messages
    cell(shell, "chat", "three")
    with pytest.raises(RequestError, match=r"went on since.*conversation='second'"):
        found.keep(1)
    found.keep(1, conversation="second")
    assert current_session().conversation("second").messages == found[1].messages
    with pytest.raises(RequestError, match="no variant 'x'; there are: temperature=0, temperature=1"):
        found.keep("x")
    with pytest.raises(IndexError, match="there are 2 replies"):
        found[2]


def test_a_button_keeps_a_reply_and_says_so(shell: Any, loaded: fakes.FakeLLM) -> None:
    found = cell(shell, "chat --new --compare temperature=0,1", "two")
    row = buttons(shell)
    assert [one.description for one in row.buttons] == ["Keep temperature=0", "Keep temperature=1"]
    hint = shell.display_pub.outputs[-1]["data"]
    assert hint["text/plain"] == "No reply is part of the conversation yet. Keep one: _.keep(0) or _.keep(1)"
    row.buttons[1].click()
    assert current_session().conversation(None).messages == found[1].messages
    assert shell.user_ns["_"] is found[1]
    assert "Kept in the conversation: temperature=1" in shell.display_pub.outputs[-1]["data"]["text/html"]
    assert [one.icon for one in row.buttons] == ["", "check"]
    found.keep(0)
    assert [one.icon for one in row.buttons] == ["check", ""]
    run = shell.run_cell("_", store_history=True)
    assert run.result is found[1]
    cell(shell, "chat", "on")
    row.buttons[1].click()
    assert "went on since" in shell.display_pub.outputs[-1]["data"]["text/html"]


def test_unloading_takes_the_buttons_away(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat --compare temperature=0,1", "two")
    row = buttons(shell)
    line_before = len(choice_buttons._open)
    shell.run_line_magic("unload_ext", "vm_magic")
    assert line_before
    assert choice_buttons._open == []
    assert row.widget.comm is None


def test_the_stop_button_ends_all_and_keeps_what_came(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ["w"] * 1000
    loaded.delay = 0.01
    loaded.interrupt_after = 5
    with pytest.raises(Interrupted, match=r"stopped after \d+ tokens in all; .*_ has what came"):
        cell(shell, "chat --new --compare temperature=0,1", "hello")
    assert all(stream.aborted for stream in loaded.streams)
    found = shell.user_ns["_"]
    assert [one.finish_reason for one in found] == ["abort", "abort"]
    assert all(one.text.startswith("w w") for one in found)
    assert columns(shell)[-1]["text/plain"].count("interrupted") == 2
    assert found.keep(0).text


def test_what_fails_for_one_is_in_its_column_and_for_all_is_an_error(shell: Any, loaded: fakes.FakeLLM) -> None:
    submit, count = loaded.submit, 0

    def second_fails(request: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        loaded.fail = count == 2
        return submit(request, **kwargs)

    loaded.submit = second_fails  # type: ignore[method-assign]
    found = cell(shell, "chat --new --compare temperature=0,1", "hello")
    assert [one.finish_reason for one in found] == ["stop", "error"]
    assert "⚠ the engine&#39;s thread failed" in columns(shell)[-1]["text/markdown"].replace("&#x27;", "&#39;")
    count = 1
    loaded.submit = submit  # type: ignore[method-assign]
    loaded.fail = True
    with pytest.raises(EngineClosedError):
        cell(shell, "chat --new --compare temperature=0,1", "hello")


def test_a_submission_that_fails_leaves_nothing_under_way(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.05
    submit = loaded.submit

    def refuse(request: Any, **kwargs: Any) -> Any:
        if loaded.streams:
            raise RequestError("no more")
        return submit(request, **kwargs)

    loaded.submit = refuse  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="no more"):
        cell(shell, "chat --compare temperature=0,1", "hello")
    assert loaded.streams[0].aborted


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--compare temperature", "expected KEY=V1,V2"),
        ("--compare temperature=0", "one value is nothing to compare, such as temperature=0,…"),
        ("--compare temprature=0,1", "did you mean temperature?"),
        ("--compare temperature=0,x", "temperature=x: expected a number"),
        ("--compare temperature=0,-1", "--compare temperature=-1: temperature must be non-negative"),
        ("--compare think=on,maybe", "think=maybe: expected on or off"),
        ("--compare top_k=1,2,3 --compare seed=1,2,3", "9 combinations; at most 8"),
        ("--compare system=One", "repeat the flag with another text"),
        ("--compare temperature=0,1 -t 0.5", "--temperature gives it too"),
        ("--compare think=on,off --no-think", "--think gives it too"),
        ("--compare temperature=0,1 --detach", "does not go with --detach"),
        ("--compare temperature=0,1 --logprobs", "does not go with --logprobs"),
        ("--compare temperature=0,1 --record", "does not go with --record"),
        ("--compare temperature=0,1 --to-cell", "does not go with --to-cell"),
        ("--compare temperature=0,1 --tools f", "does not go with --tools"),
        ("--compare model=smollm2,other", "other: out of reach; this kernel has smollm2, %vllm_metal connect URL"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_nothing_is_sent(
    shell: Any, loaded: fakes.FakeLLM, flags: str, said: str
) -> None:
    def function() -> str:
        """What it does."""
        return ""

    shell.user_ns["f"] = function
    with pytest.raises((ConfigError, RequestError, UsageError)) as caught:
        cell(shell, f"chat {flags}", "hello")
    assert said in str(caught.value)
    assert loaded.streams == []


def test_models_of_this_kernel_and_of_a_server_stand_side_by_side(
    shell: Any, loaded: fakes.FakeLLM, server: FakeVLLM
) -> None:
    server.events = [chunk(content="from afar"), chunk("stop"), USAGE]
    line(shell, f"connect {server.url} -m base")
    shell.display_pub.outputs.clear()
    found = cell(shell, "chat --compare model=smollm2,base,adapter", "Look: {{ [1, 2] }}")
    assert [str(one) for one in found] == [ANSWER, "from afar", "from afar"]
    assert {body["model"] for body in server.bodies[-2:]} == {"base", "adapter"}
    with pytest.raises(
        RequestError, match=rf"other: out of reach; this kernel has smollm2, {server.url}/v1 serves base"
    ):
        cell(shell, "chat --compare model=base,other", "hello")
    found.keep(2)
    assert current_session().conversation(None).messages[-1]["content"] == "from afar"
    shell.display_pub.outputs.clear()
    shell.user_ns["many"] = list(range(9999))
    cell(shell, "chat --new", "Count: {{ many }}")
    assert server.bodies[-1]["messages"][-1]["content"].startswith("Count: list of 9,999 items (int)")
    title = shell.display_pub.outputs[0]["data"]["text/plain"]
    assert title.startswith(f"sent to {server.url}/v1 with: list of 9,999 items (int) · ")
    server.models.append({"id": "smollm2"})
    with pytest.raises(RequestError, match="both have it; write here:smollm2 or remote:smollm2"):
        cell(shell, "chat --compare model=smollm2,base", "hello")
    both = cell(shell, "chat --new --compare model=here:smollm2,remote:smollm2", "hello")
    assert [str(one) for one in both] == [ANSWER, "from afar"]
    shell.run_line_magic("vllm_metal", "connect --close")


def test_other_forms_work_the_line_json_text_stats_and_what_goes_along(
    shell: Any, loaded: fakes.FakeLLM, capsys: Capture
) -> None:
    returned = line(shell, "chat --compare temperature=0,1 hello")
    assert isinstance(returned, Comparison)
    assert shell.display_pub.outputs == []
    loaded.words = ['{"a": 1}']
    cell(shell, "chat --json object --compare temperature=0,1", "hello")
    assert columns(shell)[-1]["text/markdown"].count('```json\n{\n  "a": 1\n}') == 2
    cell(shell, "chat -f text --no-stream --stats --compare temperature=0,1", "hello")
    assert columns(shell)[-1]["text/markdown"].count('```\n{"a": 1}') == 2
    out = capsys.readouterr().out
    assert "temperature=0: 1 tokens" in out
    shell.run_cell("x = 1", store_history=True)
    shell.display_pub.outputs.clear()
    cell(shell, "chat --cells 1 --new --compare temperature=0,1", "hello")
    assert "sent with: In [" in shell.display_pub.outputs[0]["data"]["text/plain"]
    assert "x = 1" in loaded.prompts[-1]


def test_what_a_model_wrote_stays_in_its_column() -> None:
    hostile = "</div></div><script>x</script>\n\n```\nopen"
    shown = [VariantShown("a</div>", ReplyText(hostile), over=True), VariantShown("b", ReplyText("fine"), over=True)]
    markdown = compare_bundle(shown, "markdown")["text/markdown"]
    assert "<script" not in markdown
    assert markdown.count("<div") == markdown.count("</div>") == 5
    assert markdown.rindex("```") < markdown.rindex("fine")


def test_a_terminal_gets_one_after_the_other(capsys: Capture) -> None:
    view = TerminalCompare()
    a, b = VariantShown("a", ReplyText("one")), VariantShown("b", ReplyText("two"), over=True, facts="1 token")
    view.refresh([a, b])
    assert capsys.readouterr().out == "── a ──\none"
    a = VariantShown("a", ReplyText("one more"), over=True, facts="2 tokens", mark="stopped at max_tokens")
    view.finish([a, b])
    assert capsys.readouterr().out == (" more\n(2 tokens · stopped at max_tokens)\n\n── b ──\ntwo\n(1 token)\n\n")


def test_replies_are_replies(shell: Any, loaded: fakes.FakeLLM) -> None:
    found = cell(shell, "chat --compare temperature=0,1 --max-tokens 3", "hello")
    assert all(isinstance(one, Reply) for one in found.replies)
    assert [one.finish_reason for one in found] == ["length", "length"]
    assert "stopped at max&#95;tokens" in columns(shell)[-1]["text/markdown"]
