"""A conversation in which a call's arguments are broken goes on through every route: the model sees what it wrote."""

import json
from typing import Any

import httpx
import pytest

from engine.text.template.chat_template import ChatTemplate
from tests.engine.openai.fakes import FakeLLM

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }};"
    "{% endfor %}{% endfor %}<|start|>assistant:"
)
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}}
NOT_OBJECTS = ['{"command": "l', '"ls"', "[1]", "ls -l", "12", "false"]
NOTHING = ["", " ", "\n", "null", "[]", '""']


def chat(written: Any) -> tuple[str, dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": written}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Error: bad arguments"},
    ]
    return "/v1/chat/completions", {"messages": messages}


def response(written: Any) -> tuple[str, dict[str, Any]]:
    items = [
        {"role": "user", "content": "Go"},
        {"type": "function_call", "call_id": "c1", "name": "Bash", "arguments": written},
        {"type": "function_call_output", "call_id": "c1", "output": "Error: bad arguments"},
    ]
    return "/v1/responses", {"input": items, "tools": [{"type": "function", "name": "Bash", "parameters": PARAMETERS}]}


def message(written: Any) -> tuple[str, dict[str, Any]]:
    call = {"type": "tool_use", "id": "c1", "name": "Bash", "input": written}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "Error: bad arguments", "is_error": True}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    tools = [{"name": "Bash", "input_schema": PARAMETERS}]
    return "/v1/messages", {"messages": messages, "max_tokens": 50, "tools": tools}


@pytest.fixture(autouse=True)
def _shows_calls(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.chat_template = ChatTemplate(TEMPLATE)
    llm.tool_call_parser = "hermes"


def shown(http: httpx.Client, llm: FakeLLM, path: str, body: dict[str, Any]) -> str:
    """What the prompt says behind the function's name."""
    for more in ({}, {"stream": True}):
        answer = http.post(path, json={**body, **more})
        assert answer.status_code == 200, answer.text
    prompts = [stream.prompt or "" for stream in llm.submitted[-2:]]
    assert prompts[0] == prompts[1]
    return prompts[0].partition("CALL Bash ")[2].partition(";")[0]


@pytest.mark.parametrize("ask", [chat, response, message])
@pytest.mark.parametrize("written", NOT_OBJECTS)
def test_the_model_sees_arguments_that_are_not_an_object(
    http: httpx.Client, llm: FakeLLM, ask: Any, written: str
) -> None:
    assert shown(http, llm, *ask(written)) == written


@pytest.mark.parametrize("ask", [chat, response, message])
@pytest.mark.parametrize("written", NOTHING)
def test_no_arguments_are_an_empty_object(http: httpx.Client, llm: FakeLLM, ask: Any, written: str) -> None:
    assert shown(http, llm, *ask(written)) == "{}"


@pytest.mark.parametrize("ask", [chat, message])
@pytest.mark.parametrize("written", [["ls"], 12, True, None, {"command": "ls"}])
def test_arguments_may_be_any_json(http: httpx.Client, llm: FakeLLM, ask: Any, written: Any) -> None:
    assert json.loads(shown(http, llm, *ask(written))) == ({} if written is None else written)


@pytest.mark.parametrize("ask", [chat, response, message])
def test_text_of_an_object_is_that_object(http: httpx.Client, llm: FakeLLM, ask: Any) -> None:
    assert json.loads(shown(http, llm, *ask('{"command":\n"ls"}'))) == {"command": "ls"}
    assert shown(http, llm, *ask('{"command":\n"ls"}')) == '{"command": "ls"}'


def test_tokens_of_such_a_conversation_are_counted(http: httpx.Client) -> None:
    _, body = message("ls -l")
    del body["max_tokens"]
    counted = http.post("/v1/messages/count_tokens", json=body)
    assert counted.status_code == 200, counted.text
    assert counted.json()["input_tokens"] > 0
