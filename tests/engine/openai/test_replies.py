"""Chats whose text is split: reasoning, tool calls, constraints, echo, batches, rendering."""

from typing import Any

import httpx
import openai
import pytest

from engine.params.structured_outputs import (
    Constraints,
    RepetitionDetection,
    StructuredOutput,
    ThinkingBudget,
    ToolCalls,
)
from tests.engine.openai import strict
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM
from tests.engine.openai.routes.test_responses import CALLS, THOUGHT, prompt_of

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
FUNCTION = {
    "name": "weather", "description": "…",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]


@pytest.fixture
def agent(llm: FakeLLM) -> FakeLLM:
    """Thinks, says something, calls twice."""
    llm.reasoning_parser, llm.tool_call_parser = "qwen3", "hermes"
    llm.reply = "<think>\nSo be it.\n</think>\n\n" + CALLS
    return llm


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post(CHAT, json={"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    return strict.chat(response.json())


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post(CHAT, json={"messages": MESSAGES, "stream": True, **body})
    chunks, _ = strict.events(response.text)
    return [strict.chat_chunk(chunk) for chunk in chunks]


def summed(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that a stream's deltas make up."""
    message: dict[str, Any] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append({"name": piece["function"]["name"], "arguments": ""})
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    return message


def test_a_chat_is_split_alike_plain_and_streamed(http: httpx.Client, agent: FakeLLM) -> None:
    reply = post(http, tools=TOOLS)
    choice = reply["choices"][0]
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"] == "So be it."
    assert message["content"].strip() == "I look."
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [
        '{"city": "Bad \\"Oeynhausen\\" {}"}', '{"city": "Köln"}',
    ]  # fmt: skip
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"
    chunks = stream(http, tools=TOOLS, n=2)
    for index in range(2):
        told = summed(chunks, index)
        assert told.pop("tool_calls") == [call["function"] for call in message["tool_calls"]]
        assert told == {name: message[name] for name in ("content", "reasoning", "reasoning_content")}
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == [
        "tool_calls"
    ] * 2
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_arguments_are_streamed_as_they_come(http: httpx.Client, agent: FakeLLM) -> None:
    agent.token_seconds = 0.001  # what comes at once is one chunk
    pieces = [
        piece["function"]["arguments"]
        for chunk in stream(http, tools=TOOLS)
        for choice in chunk["choices"]
        for piece in choice["delta"].get("tool_calls", ())
    ]
    assert len([piece for piece in pieces if piece]) > 4


def test_a_call_alone_has_no_content(http: httpx.Client, agent: FakeLLM) -> None:
    agent.reply = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    message = post(http, tools=TOOLS)["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning" not in message


def test_tool_choice_none_leaves_the_text_alone(http: httpx.Client, agent: FakeLLM) -> None:
    choice = post(http, tools=TOOLS, tool_choice="none")["choices"][0]
    assert "<tool_call>" in choice["message"]["content"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)


def test_parallel_tool_calls_false_means_one_call(http: httpx.Client, agent: FakeLLM) -> None:
    assert len(post(http, tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1
    assert len(summed(stream(http, tools=TOOLS, parallel_tool_calls=False))["tool_calls"]) == 1


def test_a_named_function_gets_bare_arguments(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reply = '{"city": "Köln"}'
    named = {"type": "function", "function": {"name": "weather"}}
    call = post(http, tools=TOOLS, tool_choice=named)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
    expected = ToolCalls(tuple(TOOLS), ("weather",), parallel=False)
    assert llm.options[-1]["constraints"].structured == StructuredOutput(tool_calls=expected)


def test_include_reasoning_false_leaves_the_thought_out(http: httpx.Client, agent: FakeLLM) -> None:
    assert "reasoning" not in post(http, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning" not in summed(stream(http, include_reasoning=False))


def test_a_model_without_a_tool_parser_refuses_auto_tools_as_vllm_does(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": MESSAGES, "tools": TOOLS})
    assert "--tool-call-parser" in strict.error(response, 400, "BadRequestError", "tools")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"guess": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"repetition_detection": {"min_count": "x"}}, "repetition_detection"),
        ({"repetition_detection": {"max": 1}}, "repetition_detection"),
    ],
)
def test_what_makes_no_sense_is_refused(http: httpx.Client, agent: FakeLLM, body: dict[str, Any], param: str) -> None:
    response = http.post(CHAT, json={"messages": MESSAGES, **body})
    assert strict.error(response, 400, "BadRequestError", param)
    assert not agent.submitted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "runs no tools itself"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "free text"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "send only the tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}], "tool_choice": "required"}, "'a b'"),
        (
            {"tools": [{"type": "function", "function": {"name": "listing", "parameters": {"type": "array"}}}]},
            "'listing'",
        ),
    ],
)
def test_a_tool_that_cannot_be_called_is_told_apart(
    http: httpx.Client, agent: FakeLLM, body: dict[str, Any], words: str
) -> None:
    response = http.post(CHAT, json={"messages": MESSAGES, **body})
    param = "tool_choice" if "allowed_tools" in str(body) else "tools"
    assert words in strict.error(response, 400, "BadRequestError", param)


REPETITION = {"max_pattern_size": 8, "min_pattern_size": 2, "min_count": 4}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraints(StructuredOutput(json_object=True))),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            Constraints(StructuredOutput(json=SCHEMA)),
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraints(StructuredOutput(choice=["a", "b"]))),
        ({"thinking_token_budget": 9}, Constraints(thinking=ThinkingBudget(9))),
        ({"thinking_budget": 9}, Constraints(thinking=ThinkingBudget(9))),
        ({"reasoning_max_tokens": 9}, Constraints(thinking=ThinkingBudget(9))),
        ({"thinking_token_budget": -1}, Constraints(thinking=ThinkingBudget(-1))),
        ({"repetition_detection": REPETITION}, Constraints(repetition=RepetitionDetection(**REPETITION))),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_constraints_reach_the_engine_through_every_route(
    http: httpx.Client, llm: FakeLLM, path: str, body: dict[str, Any], expected: Constraints | None
) -> None:
    if path == "/v1/responses" and "response_format" in body:
        described = body["response_format"]
        body = {"text": {"format": {"type": described["type"], **described.get("json_schema", {})}}}
    if path == "/v1/messages" and "response_format" in body:
        if body["response_format"]["type"] != "json_schema":
            pytest.skip("Anthropic has schemas only")
        body = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    given = {CHAT: {"messages": MESSAGES}, "/v1/completions": {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"}}
    base = given.get(path, {"messages": MESSAGES, "max_tokens": 9})
    response = http.post(path, json={**base, **body})
    assert response.status_code == 200, response.text
    assert llm.options[-1]["constraints"] == expected


def test_apis_with_one_reply_take_no_n_from_the_live_settings(http: httpx.Client, llm: FakeLLM) -> None:
    llm.settings.update(n=2)
    response = http.post("/v1/responses", json={"input": "Hi"}).json()
    assert response["output"][0]["content"][0]["text"] == "Hello, wörld!"
    message = http.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 99}).json()
    assert message["content"][0]["text"] == "Hello, wörld!"
    assert [stream.params.n for stream in llm.submitted] == [1, 1]


def test_anthropics_budget_is_the_thinking_budget(http: httpx.Client, llm: FakeLLM) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    assert http.post("/v1/messages", json=body).status_code == 200
    assert llm.options[-1]["constraints"] == Constraints(thinking=ThinkingBudget(1024))


def test_echo_repeats_the_final_message_that_is_continued(http: httpx.Client, llm: FakeLLM) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Well: "}]
    given = {"messages": begun, "echo": True, "add_generation_prompt": False, "continue_final_message": True}
    assert post(http, **given)["choices"][0]["message"]["content"] == "Well: Hello, wörld!"
    assert summed(stream(http, **given))["content"] == "Well: Hello, wörld!"
    assert prompt_of(llm).endswith("assistant:Well: ")
    assert post(http, echo=True)["choices"][0]["message"]["content"] == "Hello, wörld!"


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/responses", f"{CHAT}/render", "/v1/messages/count_tokens"])
def test_what_shapes_the_prompt_shapes_it_in_every_route(serve: Serve, llm: FakeLLM, path: str) -> None:
    template = "{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ documents }}|{{ extra }}"
    shaping = {
        "chat_template": template, "chat_template_kwargs": {"extra": "!"},
        "reasoning_effort": "none", "documents": [{"title": "T"}],
    }  # fmt: skip
    with http_client(serve(trust_request_chat_template=True)) as http:
        base = {"input": "Hi"} if path == "/v1/responses" else {"messages": MESSAGES}
        response = http.post(path, json={**base, **shaping})
        assert response.status_code == 200, response.text
        found = response.json()
        expected = "Hi|False|none|[{'title': 'T'}]|!"
        ids = found.get("tokens") or found.get("token_ids")
        if ids is None and path.endswith("count_tokens"):
            assert found["input_tokens"] == len(expected)
        else:
            shown = llm.tokenizer.decode(ids, skip_special_tokens=False) if ids else prompt_of(llm)
            assert shown == expected


def test_the_developers_role_is_the_systems(http: httpx.Client, llm: FakeLLM) -> None:
    post(http, messages=[{"role": "developer", "content": "Be kind."}, *MESSAGES])
    assert prompt_of(llm).startswith("<|start|>system:Be kind.")


def test_rendering_shows_what_would_run_and_runs_nothing(http: httpx.Client, llm: FakeLLM) -> None:
    body = {"messages": MESSAGES, "temperature": 0.5, "cache_salt": "pepper", "priority": 3, "logit_bias": {"5": 1}}
    shown = http.post(f"{CHAT}/render", json={**body, "return_prompt_text": True}).json()
    assert not llm.submitted
    post(http, **body)
    assert shown["token_ids"] == llm.submitted[-1].prompt_token_ids
    assert shown["prompt_text"] == prompt_of(llm)
    assert (shown["cache_salt"], shown["priority"], shown["features"]) == ("pepper", 3, None)
    values = shown["sampling_params"]
    assert (values["temperature"], values["logit_bias"]) == (0.5, {"5": 1.0})
    assert values["max_tokens"] == 512 - len(shown["token_ids"])
    prompts = http.post("/v1/completions/render", json={"prompt": ["a", "bc"], "max_tokens": 3}).json()
    assert [len(prompt["token_ids"]) for prompt in prompts] == [2, 3]
    assert prompts[0]["sampling_params"]["max_tokens"] == 3


def test_a_batch_of_conversations_is_answered_in_order(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reasoning_parser, llm.reply = "qwen3", THOUGHT
    conversations = [MESSAGES, [{"role": "user", "content": "You"}]]
    response = http.post(f"{CHAT}/batch", json={"messages": conversations})
    choices = strict.chat(response.json())["choices"]
    assert [(c["index"], c["message"]["content"], c["message"]["reasoning"]) for c in choices] == [
        (0, "Hello!", "So be it."), (1, "Hello!", "So be it."),
    ]  # fmt: skip
    assert [prompt_of(llm, -2), prompt_of(llm)] == [f"<|start|>user:{t}<|start|>assistant:" for t in ("Hi", "You")]
    for wrong, param in (({"stream": True}, "stream"), ({"n": 2}, "n"), ({"messages": []}, "messages")):
        refused = http.post(f"{CHAT}/batch", json={"messages": conversations, **wrong})
        assert strict.error(refused, 400, "BadRequestError", param)


def test_the_openai_clients_stream_helper_puts_the_message_together(client: openai.OpenAI, agent: FakeLLM) -> None:
    strict_tools: list[Any] = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
    with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=strict_tools) as events:
        kinds = {event.type for event in events}
        message = events.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls is not None
    assert message.tool_calls[1].function.parsed_arguments == {"city": "Köln"}
    assert message.content is not None
    assert message.content.strip() == "I look."
