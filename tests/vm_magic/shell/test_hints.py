"""Names that nobody has lead to the right one, and take nobody's place."""

from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, RequestError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("%llm What is this", "%chat TEXT"),
        ("%ask hi", "%chat TEXT"),
        ("%caht hi", "%chat TEXT"),
        ("%%llm\nhi", "%%chat"),
        ("%%ask\nhi", "%%chat"),
        ("%%prompt\nhi", "%%chat"),
        ("%vllm status", "%vllm_metal"),
        ("%vllm-metal status", "%vllm_metal"),
        ("%vllm_mteal status", "%vllm_metal"),
        ("%%vllm\nhi", "%%vllm_metal"),
        ("%serve smollm2", "%vllm_metal serve"),
        ("%%grid\nhi", "%%vllm_metal grid"),
    ],
)
def test_a_magic_that_nobody_has_leads_to_ours(shell: Any, capsys: Capture, code: str, meant: str) -> None:
    shell.run_cell(code)
    captured = capsys.readouterr()
    assert "not found" in captured.out + captured.err
    assert f"did you mean {meant}?" in captured.err


@pytest.mark.parametrize("code", ["%ai hi", "%%ai\nhi", "%sql select", "%%status\nhi", "1/0", "x = 1"])
def test_names_of_others_get_no_hint(shell: Any, capsys: Capture, code: str) -> None:
    shell.run_cell(code)
    assert "did you mean" not in capsys.readouterr().err


def test_a_name_that_another_extension_brings_later_is_its_own(shell: Any, capsys: Capture) -> None:
    shell.register_magic_function(lambda text: text.upper(), "line", "llm")
    assert shell.run_cell("%llm hi").result == "HI"
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ask hi", "did you mean chat"),
        ("generate x", "did you mean complete"),
        ("start", "did you mean serve"),
        ("run smollm2", "did you mean serve"),
        ("info", "did you mean status"),
        ("gpu", "did you mean status"),
        ("version", "did you mean status"),
        ("list", "did you mean models"),
        ("disconnect", "did you mean connect --close"),
        ("compare temperature=0,1 hi", "did you mean chat --compare"),
        ("record", "did you mean chat --record"),
        ("error", "did you mean chat --error"),
        ("laod smollm2", "did you mean load"),
        ("smollm2", "did you mean serve smollm2"),
        ("Qwen/Qwen3-4B", "did you mean serve Qwen/Qwen3-4B"),
        ("What is this?", "to send a message, write %vllm_metal chat TEXT"),
        ("zzz", "see %vllm_metal --help"),
        ("set temprature=1", "temprature is not a setting; did you mean temperature"),
        ("set top-q=1", "did you mean top_[kp]"),
        ("set preset=qwen-codin", "did you mean qwen-coding"),
        ("export --client opnai", "did you mean openai"),
        ("chat -f cod hi", "did you mean code"),
        ("chat -c new --fork sdie hi", "no such conversation; did you mean side"),
        ("chat --tools get_wether hi", "did you mean get_weather"),
        ("reset sdie", "no conversation 'sdie' yet; did you mean side"),
    ],
)
def test_a_slip_in_a_name_is_answered_with_the_name(shell: Any, loaded: fakes.FakeLLM, text: str, meant: str) -> None:
    line(shell, "chat -c side hello")
    shell.user_ns["get_weather"] = lambda city: city
    with pytest.raises((UsageError, ConfigError, RequestError), match=meant):
        line(shell, text)


def test_history_of_a_name_that_is_a_slip_names_the_one_meant(shell: Any, loaded: fakes.FakeLLM) -> None:
    line(shell, "chat -c side hello")
    assert repr(line(shell, "history sdie")) == "no messages in conversation 'sdie' yet; did you mean side?"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("Hello there --max-tokens 5", "%vllm_metal chat --max-tokens 5 Hello there"),
        ("Hello --seed=3 -t 0.2", "%vllm_metal chat --seed=3 -t 0.2 Hello"),
        ('Hello --json {"type": "object"}', '%vllm_metal chat --json {"type": "object"} Hello'),
    ],
)
def test_flags_behind_the_text_are_refused_with_the_line_that_works(
    shell: Any, loaded: fakes.FakeLLM, text: str, fix: str
) -> None:
    with pytest.raises(UsageError, match="flags go before the text") as raised:
        line(shell, f"chat {text}")
    assert fix in str(raised.value)
    assert line(shell, f"chat -- {text}").messages[0]["content"] == text


@pytest.mark.parametrize("text", ["What does --max-tokens do", "a -n b", "What is --seed", "a --unknown 5"])
def test_flags_within_a_text_are_text(shell: Any, loaded: fakes.FakeLLM, text: str) -> None:
    assert line(shell, f"chat {text}").messages[-2]["content"] == text


def test_flags_in_the_first_line_of_a_body_are_refused_unless_they_are_meant(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(UsageError, match="are flags: they go behind %%vllm_metal chat"):
        cell(shell, "chat", "--max-tokens 5\nHello")
    assert cell(shell, "chat --", "--max-tokens 5\nHello").messages[0]["content"] == "--max-tokens 5\nHello"


def test_the_chat_line_and_cell_take_braces_and_dollars_as_typed(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.user_ns["x"] = "filled in"
    assert cell(shell, "chat -n -s 'about {x} and $x'", "hi").messages[0]["content"] == "about {x} and $x"
    reply = shell.run_cell("%chat -n What are {x} and $x in 2+2?").result
    assert [one["content"] for one in reply.messages][:1] == ["What are {x} and $x in 2+2?"]
