"""Chat and completion cells in a real shell, with a scripted model."""

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.error import UsageError

import vm_magic
from engine.errors import ContextLengthError, EngineClosedError, RequestError
from engine.outputs import Reply, Usage
from engine.params.sampling_params import SamplingParams
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.chat.end_notes import end_notes


def test_a_cell_streams_into_one_handle_and_files_the_reply_once(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.03
    reply = cell(shell, "chat", "hello")
    outputs = shell.display_pub.outputs
    ids = {output["transient"]["display_id"] for output in outputs}
    assert len(ids) == 1
    assert not outputs[0]["update"]
    assert all(output["update"] for output in outputs[1:])
    texts = [output["data"]["text/plain"] for output in outputs[1:]]
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == str(reply) == " ".join(fakes.WORDS)
    assert shell.user_ns["_"] is reply
    assert isinstance(reply, Reply)


def test_updates_come_no_faster_than_the_eye(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ["w"] * 100
    loaded.delay = 0.004
    started = time.monotonic()
    cell(shell, "chat", "hello")
    assert len(shell.display_pub.outputs) <= 20 * (time.monotonic() - started) + 3


def test_the_line_form_returns_the_reply_and_shows_nothing(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.run_cell("reply = %vllm_metal chat -t 0.5 what's up, doc?").raise_error()
    assert str(shell.user_ns["reply"]) == " ".join(fakes.WORDS)
    assert "what's up, doc?" in loaded.prompts[-1]
    assert loaded.streams[-1].params.temperature == 0.5
    assert shell.display_pub.outputs == []


@pytest.mark.parametrize("command", ["chat", "complete", "grid", "score"])
def test_a_text_that_ends_in_a_question_mark_is_not_a_call_for_help(shell: Any, command: str) -> None:
    transformed = shell.transform_cell(f"%vllm_metal {command} --raw Is it so?")
    assert transformed == f"get_ipython().run_line_magic('vllm_metal', '{command} --raw Is it so?')\n"
    assert "pinfo" in shell.transform_cell(f"%vllm_metal {command}?")


def test_a_question_in_a_string_or_cell_body_is_left_alone(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.run_cell("text = '''\n%vllm_metal chat how?\n'''").raise_error()
    assert shell.user_ns["text"] == "\n%vllm_metal chat how?\n"


def test_a_conversation_goes_on_and_starts_anew(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat -s Terse.", "one")
    cell(shell, "chat", "two")
    answer = " ".join(fakes.WORDS)
    assert loaded.prompts[-1] == f"<system>Terse.<user>one<assistant>{answer}<user>two<assistant>"
    cell(shell, "chat --new", "three")
    assert loaded.prompts[-1] == "<user>three<assistant>"


def test_conversations_are_kept_apart_by_name(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat", "one")
    cell(shell, "chat -c side", "two")
    assert loaded.prompts[-1] == "<user>two<assistant>"
    assert line(shell, "history side").messages[0]["content"] == "two"
    line(shell, "reset side")
    assert line(shell, "history side").messages == ()
    assert "there are: default" in repr(line(shell, "history side"))
    assert len(line(shell, "history").messages) == 2


def test_flags_reach_the_sampler_and_the_template(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, r"chat -t 0 --top-p 0.5 --seed 4 --stop '\n' --stop END --max-tokens 3 --no-think", "hi")
    params = loaded.streams[-1].params
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0, 0.5, 4, 3)
    assert params.stop == ("\n", "END")
    assert loaded.template_kwargs[-1] == {"enable_thinking": False}


def test_a_chat_may_fill_the_context_unless_told_otherwise(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat", "hi")
    assert loaded.streams[-1].params.max_tokens is None
    line(shell, "set max_tokens=2")
    cell(shell, "chat", "hi")
    assert loaded.streams[-1].params.max_tokens == 2


def test_a_full_context_names_the_ways_out(shell: Any, loaded: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*_: object, **__: object) -> None:
        raise ContextLengthError("This model's maximum context length is 8 tokens.", param="prompt")

    cell(shell, "chat", "hi")
    monkeypatch.setattr(loaded, "submit", submit)
    with pytest.raises(ContextLengthError, match=r"8 tokens\.$"):
        cell(shell, "chat --max-tokens 9000", "hi")
    with pytest.raises(ContextLengthError, match=r"maximum context length is 8 tokens\. .*--new.*--max-model-len"):
        cell(shell, "chat", "hi")


def test_a_reply_that_was_cut_off_names_the_flag_below_it(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    note = "Stopped at max_tokens (2). Raise it with --max-tokens."
    reply = cell(shell, "chat --max-tokens 2", "hi")
    assert (reply.finish_reason, reply.text, reply.notes) == ("length", "alpha beta", (note,))
    assert shown(shell)["text/plain"] == f"alpha beta\n{note}"
    text, _, below = shown(shell)["text/markdown"].partition("\n\n")
    assert text == "alpha beta"
    assert below.startswith('<small style="opacity:0.6">Stopped at max')
    assert len({output["transient"]["display_id"] for output in shell.display_pub.outputs}) == 1
    assert capsys.readouterr().out == ""


def test_a_line_shows_the_note_where_it_shows_the_reply(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    shell.run_cell("%vllm_metal chat --max-tokens 2 hi")
    assert capsys.readouterr().out.endswith("alpha beta\nStopped at max_tokens (2). Raise it with --max-tokens.\n")


@pytest.mark.parametrize("flags", ["-f code", "-f text", "--logprobs 1", "--json object"])
def test_every_form_has_the_note_below(shell: Any, loaded: fakes.FakeLLM, flags: str) -> None:
    loaded.words = ['{"a": 1}', "and", "more"]
    cell(shell, f"chat --max-tokens 1 --stats {flags}", "hi")
    for kind, text in shown(shell).items():
        assert kind in ("text/plain", "text/markdown", "text/html")
        assert "Raise it with" in text.splitlines()[-2 if kind == "text/plain" else -1]


@pytest.mark.parametrize(("conversation", "fix"), [("a chat's", "Start anew with --new"), (None, "Shorten the prompt")])
def test_a_full_context_says_so(conversation: str | None, fix: str) -> None:
    reply = Reply("cut", finish_reason="length", usage=Usage(completion_tokens=7))
    for limit in (None, 50):
        generation: Any = SimpleNamespace(
            stream=SimpleNamespace(params=SamplingParams(max_tokens=limit)),
            conversation=conversation,
            stopped_at_limit=False,
        )
        notes = end_notes(reply, generation, stats=False, max_tool_rounds=5)
        assert notes == (f"The context is full. {fix}, or load the model with a larger --max-model-len.",)


def test_out_stores_the_reply_and_shows_nothing(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    assert cell(shell, "chat -o answer", "hi") is None
    assert str(shell.user_ns["answer"]) == " ".join(fakes.WORDS)
    assert shell.display_pub.outputs == []
    assert capsys.readouterr().out == ""


def test_no_stream_shows_only_the_whole_reply(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.02
    cell(shell, "chat --no-stream", "hi")
    assert [o["data"]["text/plain"] for o in shell.display_pub.outputs] == ["…", " ".join(fakes.WORDS)]


def test_stats_are_shown_when_asked_for(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat --stats", "hi there")
    told = shown(shell)["text/plain"].splitlines()[-1]
    assert told.startswith("8 tokens · ")
    assert "4 cached" in told


@pytest.mark.parametrize(
    ("format", "words", "mime", "value"),
    [
        ("text", ["a"], "text/plain", "a"),
        ("code", ["Here:\n```py\nx = 1\n```\nDone."], "text/markdown", "```python\nx = 1\n```"),
        ("code", ["Here:\n```py\nx = 1\n```\nDone."], "text/plain", "x = 1"),
        ("code", ["no *code*"], "text/markdown", "no *code*"),
        ("json", ['```json\n{"a": 1}\n```'], "application/json", {"a": 1}),
        ("json", ["no json"], "text/plain", "no json (not JSON)"),
        ("markdown", ["*a*"], "text/markdown", "*a*"),
        ("markdown", ["<think>a</think>b"], "text/markdown", "&lt;think>a&lt;/think>b"),
    ],
)
def test_the_format_decides_how_the_reply_is_shown(
    shell: Any, loaded: fakes.FakeLLM, format: str, words: list[str], mime: str, value: object
) -> None:
    loaded.words = words
    cell(shell, f"chat -f {format}", "hi")
    assert shown(shell)[mime] == value


@pytest.mark.parametrize("prompt_end", ["", "<think>\n"])
def test_a_thought_is_folded_away_with_its_length_and_kept_apart(
    shell: Any, loaded: fakes.FakeLLM, prompt_end: str
) -> None:
    loaded.reasoning_parser, loaded.prompt_end, loaded.delay = "qwen3", prompt_end, 0.05
    loaded.words = [*([] if prompt_end else ["<think>"]), "a", "<", "b", "</think>", "the", "answer"]
    reply = cell(shell, "chat --think", "hi")
    growing = [output["data"] for output in shell.display_pub.outputs]
    assert any("<summary>thinking … (" in data.get("text/markdown", "") for data in growing)
    assert any(data["text/plain"].startswith("thinking … ") for data in growing)
    tokens = reply.usage.reasoning_tokens
    fold = f"<details><summary>thinking ({tokens} tokens)</summary>\n\na &lt; b\n\n</details>\n\n"
    assert shown(shell) == {"text/plain": "the answer", "text/markdown": f"{fold}the answer"}
    assert (reply.text, reply.reasoning) == ("the answer", "a < b")
    assert 3 <= tokens <= 5
    assert reply.messages[-1] == {"role": "assistant", "content": "the answer", "reasoning": "a < b"}
    assert (loaded.prepared[-1].prompt, loaded.prepared[-1].account.source) == ("<user>hi<assistant>", "flag")


@pytest.mark.parametrize(("format", "plain"), [("text", "1"), ("code", "1"), ("json", "1")])
def test_other_formats_fold_the_thought_too_or_leave_it_out(
    shell: Any, loaded: fakes.FakeLLM, format: str, plain: str
) -> None:
    loaded.reasoning_parser, loaded.words = "qwen3", ["<think>hm</think>1"]
    cell(shell, f"chat -f {format}", "hi")
    assert shown(shell)["text/plain"] == plain
    assert ("thinking (1 tokens)" in shown(shell).get("text/markdown", "")) == (format != "text")


def test_a_thought_that_was_cut_off_is_shown_and_joins_no_conversation(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.reasoning_parser, loaded.words = "qwen3", ["<think>", "a", "b", "c"]
    reply = cell(shell, "chat --max-tokens 3", "hi")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("", "a b", "length")
    assert "thinking (3 tokens)" in shown(shell)["text/markdown"]
    assert "--max-tokens" in shown(shell)["text/plain"]
    assert line(shell, "history").messages == ()


def test_without_a_reasoning_parser_marks_are_text(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ["<think>a</think>b"]
    assert str(cell(shell, "chat", "hi")) == "<think>a</think>b"


def test_think_is_refused_where_the_template_cannot(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.template_variables = frozenset({"thinking"})
    cell(shell, "chat --think", "hi")
    assert loaded.template_kwargs[-1] == {"thinking": True}
    loaded.template_variables = frozenset()
    with pytest.raises(RequestError, match="no switch for thinking"):
        cell(shell, "chat --think", "hi")
    cell(shell, "chat --no-think", "hi")
    assert loaded.template_kwargs[-1] == {}


def test_a_budget_and_a_schema_constrain_the_request(shell: Any, loaded: fakes.FakeLLM) -> None:
    class Person:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {"title": "Person"}

    shell.user_ns.update(schema={"type": "object"}, Person=Person)
    loaded.words = ['{"a": 1}']
    cell(shell, "chat --json schema --thinking-token-budget 0", "hi")
    constraints = loaded.prepared[-1].constraints
    assert constraints is not None
    assert constraints.thinking is not None
    assert constraints.structured is not None
    assert (constraints.thinking.max_tokens, constraints.structured.json) == (0, {"type": "object"})
    assert shown(shell)["application/json"] == {"a": 1}
    for flag, kind, value in (("Person", "json", {"title": "Person"}), ("object", "json_object", True)):
        cell(shell, f"chat --json {flag} -f text", "hi")
        structured = loaded.prepared[-1].constraints.structured  # type: ignore[union-attr]
        assert (structured.kind, getattr(structured, kind)) == (kind, value)  # type: ignore[union-attr]
    cell(shell, "vllm_metal complete --json object", "hi")
    assert loaded.prepared[-1].constraints is not None
    cell(shell, "chat", "hi")
    assert loaded.prepared[-1].constraints is None
    with pytest.raises(RequestError, match="thinking_token_budget"):
        cell(shell, "chat --thinking-token-budget -2", "hi")


def test_complete_sends_the_raw_prompt_as_typed(shell: Any, loaded: fakes.FakeLLM) -> None:
    reply = cell(shell, "vllm_metal complete --max-tokens 1", "Once upon\n a time ")
    assert loaded.prompts[-1] == "Once upon\n a time "
    assert str(reply) == "alpha"
    assert line(shell, "history").messages == ()


def test_names_in_double_braces_come_from_the_notebook(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.user_ns["who"] = {"name": "Ada"}
    cell(shell, "chat", "{{ who.name }} has {x} and $HOME, 100%\n  kept")
    assert loaded.prompts[-1] == "<user>Ada has {x} and $HOME, 100%\n  kept<assistant>"
    cell(shell, "chat --new --raw", "{{ who }}")
    assert loaded.prompts[-1] == "<user>{{ who }}<assistant>"


def test_an_undefined_name_is_one_line_and_sends_nothing(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(RequestError, match="'nobody' is undefined; define it"):
        cell(shell, "chat", "{{ nobody }}")
    with pytest.raises(RequestError, match=r"line 2.*--raw"):
        cell(shell, "chat", "x\n{{ 1 + }}")
    with pytest.raises(RequestError, match="ZeroDivisionError"):
        cell(shell, "chat", "{{ 1 / 0 }}")
    assert loaded.streams == []


def test_chat_without_a_model_says_what_to_run(shell: Any) -> None:
    with pytest.raises(EngineClosedError, match="%vllm_metal load smollm2"):
        cell(shell, "chat", "hi")


def test_an_empty_message_is_refused(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(RequestError, match="no message"):
        cell(shell, "chat", "  ")
    with pytest.raises(UsageError, match="cell's body"):
        cell(shell, "chat hello", "there")


def test_a_failing_engine_keeps_the_partial_text_and_the_conversation_as_it_was(
    shell: Any, loaded: fakes.FakeLLM
) -> None:
    loaded.fail = True
    with pytest.raises(EngineClosedError, match="load the model again"):
        cell(shell, "chat", "hi")
    assert "alpha" in shown(shell)["text/plain"]
    assert "failed" in shown(shell)["text/plain"]
    assert line(shell, "history").messages == ()


def test_an_interrupt_keeps_the_partial_text_and_only_this_request_ends(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.04
    other = loaded.submit_prompt("another client's prompt", SamplingParams(max_tokens=None))
    loaded.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt, match=r"stopped after \d tokens"):
        cell(shell, "chat", "hi")
    assert loaded.streams[-1].aborted
    assert not other.aborted
    assert len(other.result().outputs[0].text.split()) == len(fakes.WORDS)
    assert "interrupted" in shown(shell)["text/plain"]
    kept = line(shell, "history").messages
    assert [m["role"] for m in kept] == ["user", "assistant"]
    assert kept[1]["content"].startswith("alpha beta")
    assert vm_magic.current() is loaded


def test_an_interrupt_leaves_the_partial_reply_where_the_whole_one_would_be(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.04
    loaded.interrupt_after = 2
    for run in (lambda: cell(shell, "chat -o kept", "hi"), lambda: line(shell, "chat -o kept hi")):
        shell.user_ns["kept"] = "older"
        with pytest.raises(KeyboardInterrupt, match="the partial reply is kept"):
            run()
        assert shell.user_ns["kept"].text.startswith("alpha beta")
        assert shell.user_ns["kept"].finish_reason == "abort"
    for run in (lambda: cell(shell, "chat", "hi"), lambda: line(shell, "complete hi")):
        before = shell.user_ns["_"]
        with pytest.raises(KeyboardInterrupt):
            run()
        assert shell.user_ns["_"] is not before
        assert shell.user_ns["_"].text.startswith("alpha beta")


def test_a_detached_reply_returns_at_once_and_fills_its_own_output(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.2
    cell(shell, "chat --detach", "hi")
    pending = shell.user_ns["_"]
    assert not pending.done
    with pytest.raises(RequestError, match="detached reply under way"):
        cell(shell, "chat", "too soon")
    assert str(pending.wait(60)) == " ".join(fakes.WORDS)
    assert shown(shell)["text/plain"] == " ".join(fakes.WORDS)
    assert len(line(shell, "history").messages) == 2


def test_a_detached_reply_can_be_cancelled_or_stored(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.delay = 0.05
    cell(shell, "chat --detach", "hi")
    pending = shell.user_ns["_"]
    pending.cancel()
    assert pending.wait(60).finish_reason == "abort"
    cell(shell, "chat --detach -o later", "hi")
    deadline = time.monotonic() + 60
    while "later" not in shell.user_ns and time.monotonic() < deadline:
        time.sleep(0.02)
    assert str(shell.user_ns["later"]) == " ".join(fakes.WORDS)


def test_a_conversation_is_forked_and_the_old_one_stays(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat -s Terse.", "one")
    cell(shell, "chat -c second --fork default", "two")
    answer = " ".join(fakes.WORDS)
    assert loaded.prompts[-1] == f"<system>Terse.<user>one<assistant>{answer}<user>two<assistant>"
    assert len(line(shell, "history").messages) == 3
    assert len(line(shell, "history second").messages) == 5
    for flags, told in (
        ("-c second --fork default", "has messages already"),
        ("-c third --fork nowhere", "there are: default, second"),
        ("--fork default", "another name with -c"),
    ):
        with pytest.raises(RequestError, match=told):
            cell(shell, f"chat {flags}", "three")
    cell(shell, "chat -c second --new --fork default", "three")
    assert len(line(shell, "history second").messages) == 5


def test_conversations_are_listed_and_forgotten_together(shell: Any, loaded: fakes.FakeLLM) -> None:
    assert "no conversations yet" in repr(line(shell, "history --list"))
    cell(shell, "chat", "one")
    cell(shell, "chat -c side --fork default", "two")
    assert line(shell, "history --list").rows == (
        ("default", "2", "", " ".join(fakes.WORDS)),
        ("side", "4", "default", " ".join(fakes.WORDS)),
    )
    line(shell, "reset --all")
    assert line(shell, "history side").messages == ()
    assert line(shell, "history --list").rows == ()


def test_nothing_that_a_model_writes_runs_in_the_page(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.reasoning_parser = "qwen3"
    loaded.words = ["<think><script>1</script></think><img src=x onerror=alert(1)> ![x](http://a/b.png)"]
    cell(shell, "chat", "hi")
    for page in (shown(shell)["text/markdown"], line(shell, "history")._repr_markdown_()):
        assert "<script" not in page
        assert "<img" not in page
        assert "![" not in page
