"""Thinking, budgets and schemas in cells over the real engine, with a model that says what the test wrote."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from engine.errors import RequestError
from tests.vm_magic.helpers import cell, line, shown
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.reply_view import TerminalView
from vm_magic.state.session import current_session

TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
"""
THOUGHT = "one two three four five six seven eight nine ten"


@pytest.fixture
def talk(shell: Any, scripted_llm: Callable[..., LLM]) -> Iterator[Callable[..., LLM]]:
    """Makes a scripted model the notebook's own."""

    def make(*scripts: str, **options: Any) -> LLM:
        llm = scripted_llm(*scripts, reasoning_parser="qwen3", **options)
        current_session().llm = llm
        return llm

    yield make
    current_session().llm = None


def test_a_thought_is_folded_counted_and_not_sent_again(shell: Any, talk: Callable[..., LLM]) -> None:
    llm = talk(f"<think>\n{THOUGHT}\n</think>\n\nThe answer.")
    reply = cell(shell, "chat -t 0", "Why?")
    assert (reply.text, reply.reasoning) == ("The answer.", THOUGHT)
    thought = llm.tokenize(f"<think>\n{THOUGHT}", add_special_tokens=False)
    assert len(thought) <= reply.usage.reasoning_tokens <= len(thought) + 2
    assert shown(shell)["text/plain"] == "The answer."
    assert f"<summary>thinking ({reply.usage.reasoning_tokens} tokens)</summary>" in shown(shell)["text/markdown"]
    assert line(shell, "history").messages[-1]["reasoning"] == THOUGHT
    cell(shell, "chat -t 0", "And?")
    told = llm.explain()
    assert "The answer." in told.prompt
    assert THOUGHT not in told.prompt
    assert (told.outputs[0].content, told.outputs[0].reasoning) == ("The answer.", THOUGHT)


def test_a_template_that_wants_earlier_thoughts_gets_them(shell: Any, talk: Callable[..., LLM]) -> None:
    llm = talk(f"<think>{THOUGHT}</think>Yes.", chat_template=TEMPLATE)
    cell(shell, "chat -t 0", "Why?")
    cell(shell, "chat -t 0", "And?")
    assert f"<think>{THOUGHT}</think>Yes." in llm.explain().prompt


def test_no_think_reaches_the_template_and_the_parser(shell: Any, talk: Callable[..., LLM]) -> None:
    llm = talk("<think>hm</think>\n\nYes.", chat_template=TEMPLATE)
    assert cell(shell, "chat -t 0 --think", "Why?").reasoning == "hm"
    reply = cell(shell, "chat -t 0 --no-think --new", "Why?")
    assert llm.explain().prompt.endswith("</think>\n\n")
    assert (reply.text, reply.reasoning) == ("Yes.", None)
    line(shell, "set thinking_token_budget=5")
    cell(shell, "chat -t 0 --no-think --new", "Why?")
    told = line(shell, "explain")
    rows = "\n  enable_thinking        False  flag\n  thinking_token_budget  5      set\n"
    assert f"\nchat template and thinking{rows}" in repr(told)
    assert ">enable_thinking</td>" in told._repr_html_()
    cell(shell, "chat -t 0 --new --thinking-token-budget 7", "Why?")
    assert "\nchat template and thinking\n  thinking_token_budget  7  flag\n" in repr(line(shell, "explain"))


def test_a_budget_ends_the_thought_and_the_answer_follows(shell: Any, talk: Callable[..., LLM]) -> None:
    talk(f"<think>\n{THOUGHT}\n</think>\n\nThe answer.")
    reply = cell(shell, "chat -t 0 --thinking-token-budget 4", "Why?")
    assert reply.text == "The answer."
    assert THOUGHT.startswith(str(reply.reasoning))
    assert len(str(reply.reasoning)) < len(THOUGHT)
    assert reply.usage.reasoning_tokens < 10
    assert any("max_tokens=4" in row for row in line(shell, "explain").explanation.constraints)


def test_a_thought_that_was_ended_says_so_in_the_cell_the_log_and_explain(
    shell: Any, talk: Callable[..., LLM], capsys: pytest.CaptureFixture[str]
) -> None:
    talk("<think>\n" + "Wait, let me think again. " * 100 + "</think>\n\nFine.")
    for flags, how in (("--thinking-token-budget 4", "ended at its budget"), ("", "ended: it repeated itself")):
        reply = cell(shell, f"chat -t 0 --max-tokens 400 --new {flags}", "Why?")
        title = f"thinking ({reply.usage.reasoning_tokens} tokens, {how})"
        assert f"<summary>{title}</summary>" in shown(shell)["text/markdown"]
        told = line(shell, "explain")
        assert f"tokens; thinking {how})" in repr(told)
        assert f"tokens; thinking {how})" in told._repr_html_()
        line(shell, "logs")
        assert f": thinking {how}.\n" in capsys.readouterr().out
        view = TerminalView()
        view.finish(ReplyText("Fine.", "Wait", 7, thinking_cut="budget"))
        assert capsys.readouterr().out.endswith("thinking … 7 tokens, ended at its budget\n\nFine.\n")
    cell(shell, "chat -t 0 --max-tokens 30 --new", "Why?")
    assert "thinking ended" not in repr(line(shell, "explain")) + shown(shell)["text/markdown"]


def test_json_with_a_schema_comes_after_the_thought_and_is_valid(shell: Any, talk: Callable[..., LLM]) -> None:
    shell.user_ns["city"] = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
        "required": ["name", "people"],
        "additionalProperties": False,
    }
    talk('<think>Which city?</think>{"name": "Ulm", "people": 126000}')
    reply = cell(shell, "chat -t 0 --json city", "A city?")
    assert json.loads(reply.text) == {"name": "Ulm", "people": 126000}
    assert reply.reasoning == "Which city?"
    assert shown(shell)["application/json"] == {"name": "Ulm", "people": 126000}
    talk("I would rather tell you a story about it.")
    reply = cell(shell, "chat -t 0 --json city --new --max-tokens 60 --no-think", "A city?")
    if reply.finish_reason == "stop":
        assert set(json.loads(reply.text)) == {"name", "people"}
    assert reply.text.lstrip().startswith("{")


def test_a_budget_without_a_reasoning_parser_is_refused_by_name(shell: Any, scripted_llm: Callable[..., LLM]) -> None:
    current_session().llm = scripted_llm("Hello.")
    try:
        with pytest.raises(RequestError, match=r"reasoning[-_]parser"):
            cell(shell, "chat --thinking-token-budget 4", "Why?")
    finally:
        current_session().llm = None


def test_a_reply_in_out_is_readable_text(shell: Any, talk: Callable[..., LLM]) -> None:
    talk("The answer.")
    shell.user_ns["reply"] = line(shell, "chat -t 0 Why?")
    assert shell.display_formatter.format(shell.user_ns["reply"])[0]["text/plain"] == "The answer."
    plan = shell.display_formatter.format(line(shell, "plan"))[0]
    assert "KV cache" in plan["text/plain"]
    assert "max_model_len" in plan["text/plain"]
    assert "<table" in plan["text/html"]


def test_the_llm_tool_talks_to_the_notebook_through_its_entry(
    shell: Any, talk: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    llm = talk("Hello from the notebook.")
    session = current_session()
    session.serve({"port": 0})
    line(shell, "llm --model-id here")
    for extra in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "here", "--no-log", "-o", "temperature", "0", *extra, "Hi"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert said.stdout == "Hello from the notebook.\n", said.stderr
    assert llm.explain().sampling[0].value == 0
    session.stop()
