"""Real clients before the real engine: a scripted model thinks, calls tools and answers in grammars."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import anthropic
import openai
import pytest
from pydantic import BaseModel

from engine import LLM
from engine.openai.server import ServerHandle
from tests import scripted_model
from tests.engine.openai import strict, strict_more
from tests.engine.openai.conftest import KEY, http_client

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if tools %}<|im_start|>system\n{{ tools | length }} tools<|im_end|>\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
THOUGHT, ANSWER = "So be it: 12 < 13.", "Hello, «wörld» 🎉!"
ARGUMENTS = {"city": 'Köln "am" Rhein {}', "days": [1, 2]}
CALL = "<tool_call>\n" + json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False) + "\n</tool_call>"
SCRIPTS = (
    f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}",
    f"<think>\n{THOUGHT}\n</think>\n\n{CALL}",
    f"<think>\n{THOUGHT}\n</think>\n\nnothing of the kind",
    f"<think>\n{THOUGHT}\n</think>\n\n" + "Hello, hello. " * 20,
    f"<think>\n{THOUGHT}\n{CALL}",
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
    "required": ["city"],
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALLING, ANYTHING, REPEATING, CALLING_IN_THOUGHT = (f"<|script_{number}|>" for number in range(1, 5))


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = tmp_path_factory.mktemp("scripted")
    scripted_model.write_scripted_model(folder, smollm2_gguf, SCRIPTS, chat_template=TEMPLATE)
    options: dict[str, Any] = {"max_model_len": 1024, "gpu_memory_utilization": 0.2, "served_model_name": "scripted"}
    with LLM(str(folder), reasoning_parser="qwen3", tool_call_parser="hermes", **options) as made:
        yield made


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[ServerHandle]:
    handle = llm.serve(api_key=KEY)
    yield handle
    handle.stop()


@pytest.fixture
def claude(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[anthropic.Anthropic]:
    monkeypatch.setenv("NO_PROXY", "*")
    address = server.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0, timeout=30) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_openai_chats_think_and_answer_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="scripted", messages=user("Hi"))
    message: Any = plain.choices[0].message
    assert (message.reasoning, message.reasoning_content, message.content) == (THOUGHT, THOUGHT, ANSWER)
    assert plain.usage is not None
    assert plain.usage.completion_tokens_details is not None
    assert 0 < (plain.usage.completion_tokens_details.reasoning_tokens or 0) < plain.usage.completion_tokens
    with client.chat.completions.stream(model="scripted", messages=user("Hi")) as events:
        assert "".join(event.delta for event in events if event.type == "content.delta") == ANSWER
        streamed: Any = events.get_final_completion().choices[0].message
    assert (streamed.content, streamed.reasoning) == (ANSWER, THOUGHT)


def test_openai_chats_call_tools_and_take_their_results(client: openai.OpenAI) -> None:
    asked = user(f"Weather? {CALLING}")
    first = client.chat.completions.create(model="scripted", messages=asked, tools=TOOLS)
    call: Any = first.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert (first.choices[0].finish_reason, first.choices[0].message.content) == ("tool_calls", None)
    with client.chat.completions.stream(model="scripted", messages=asked, tools=TOOLS) as events:
        told = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert json.loads("".join(told)) == ARGUMENTS
    assert len(told) > 3
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain <|script_0|>"}
    message: Any = first.choices[0].message.model_dump(exclude_none=True)
    second = client.chat.completions.create(model="scripted", messages=[*asked, message, result], tools=TOOLS)
    assert second.choices[0].message.content == ANSWER


@pytest.mark.parametrize("budget", [None, 0, 2, 4, *range(20, 40)])
def test_no_thinking_budget_writes_into_a_call_that_began_in_a_thought(
    client: openai.OpenAI, budget: int | None
) -> None:
    chat = client.chat.completions.create(
        model="scripted",
        messages=user(f"Weather? {CALLING_IN_THOUGHT}"),
        tools=TOOLS,
        extra_body={} if budget is None else {"thinking_token_budget": budget},
    )
    message: Any = chat.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    assert chat.choices[0].finish_reason == "tool_calls"
    cut = budget is not None and budget < 20
    assert (getattr(message, "reasoning", None) == THOUGHT, chat.choices[0].to_dict().get("thinking_cut")) == (
        not cut,
        "budget" if cut else None,
    )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_comes_whatever_the_model_would_say(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "scripted",
        "messages": user(f"Hi {ANYTHING}"),
        "max_tokens": 300,
        "temperature": 0,
    }
    plain = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=choice).choices[0]
    assert plain.message.tool_calls
    for call in plain.message.tool_calls:
        assert call.function.name == "weather"  # type: ignore[union-attr]
        assert isinstance(json.loads(call.function.arguments)["city"], str)  # type: ignore[union-attr]
    with client.chat.completions.stream(**asked, tools=TOOLS, tool_choice=choice) as events:
        streamed = events.get_final_completion().choices[0]
    shown = [[call.function.arguments for call in one.message.tool_calls or ()] for one in (plain, streamed)]  # type: ignore[union-attr]
    assert shown[0] == shown[1]


def test_structured_output_follows_the_thought_through_every_api(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    described: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    asked: Any = user(f"Hi {ANYTHING}")
    chat = client.chat.completions.create(model="scripted", messages=asked, response_format=described)
    format: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    response = client.responses.create(model="scripted", input=asked, text=format)
    message = claude.messages.create(
        model="scripted", max_tokens=300, messages=asked,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    texts = [chat.choices[0].message.content, response.output_text, message.content[-1].text]  # type: ignore[union-attr]
    assert [json.loads(text or "")["n"] in (1, 2) for text in texts] == [True] * 3
    assert message.content[0].thinking == THOUGHT  # type: ignore[union-attr]


def test_the_clients_parse_helper_gives_an_object(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        fine: bool

    parsed = client.chat.completions.parse(
        model="scripted", messages=user(f"Hi {ANYTHING}"), response_format=Answer
    ).choices[0]
    assert isinstance(parsed.message.parsed, Answer)


@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget", "reasoning_max_tokens"])
def test_a_thinking_budget_ends_the_thought_and_an_answer_follows(server: ServerHandle, name: str) -> None:
    with http_client(server) as http:
        reply = http.post("/v1/chat/completions", json={"messages": user("Hi"), name: 3}).json()
    message = reply["choices"][0]["message"]
    assert message["content"] == ANSWER
    assert THOUGHT.startswith(message["reasoning"])
    assert len(message["reasoning"]) < len(THOUGHT)


def test_a_choice_says_that_its_thought_was_ended_and_no_other_choice_has_the_key(client: openai.OpenAI) -> None:
    for more, expected in (({"thinking_token_budget": 3}, "budget"), ({}, None)):
        asked: dict[str, Any] = {"model": "scripted", "messages": user("Hi"), "extra_body": more}
        plain = client.chat.completions.create(**asked).choices[0]
        *earlier, last = client.chat.completions.create(**asked, stream=True)
        extras = [(one.choices[0].model_extra or {}).get("thinking_cut") for one in (*earlier, last)]
        assert (plain.model_extra or {}).get("thinking_cut") == expected
        assert extras == [None] * len(earlier) + [expected]
        assert ("thinking_cut" in plain.model_dump_json()) == (expected is not None)


def test_a_reply_that_repeats_itself_ends_in_the_words_of_every_api(server: ServerHandle) -> None:
    asked = {"repetition_detection": {"max_pattern_size": 8, "min_count": 3}}
    with http_client(server) as http:
        chat = http.post("/v1/chat/completions", json={"messages": user(REPEATING), **asked}).json()
        response = http.post("/v1/responses", json={"input": REPEATING, **asked}).json()
        message = http.post("/v1/messages", json={"messages": user(REPEATING), "max_tokens": 200, **asked}).json()
    choice = chat["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


def test_thinking_is_switched_off_through_every_api(server: ServerHandle, claude: anthropic.Anthropic) -> None:
    off: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    with http_client(server) as http:
        for more in (off, {"reasoning_effort": "none"}):
            chat = http.post("/v1/chat/completions", json={"messages": user("Hi"), **more}).json()
            assert chat["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
        for more in (off, {"reasoning": {"effort": "none"}}):
            response = strict_more.response(http.post("/v1/responses", json={"input": "Hi", **more}).json())
            assert [item["type"] for item in response["output"]] == ["message"]
            assert response["output"][0]["content"][0]["text"] == ANSWER
        tokens = http.post("/tokenize", json={"messages": user("Hi"), **off}).json()["tokens"]
        shown = http.post("/v1/chat/completions/render", json={"messages": user("Hi"), **off}).json()
        assert shown["token_ids"] == tokens
    message = claude.messages.create(
        model="scripted", max_tokens=99, messages=user("Hi"), thinking={"type": "disabled"}
    )
    assert [block.type for block in message.content] == ["text"]


def test_openai_responses_stream_thoughts_calls_and_go_on(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **TOOLS[0]["function"], "strict": False}]
    with client.responses.stream(model="scripted", input=f"Weather? {CALLING}", tools=tools) as events:
        names = [event.type for event in events]
        first = events.get_final_response()
    for kind in ("reasoning_text", "function_call_arguments"):
        assert names.index(f"response.{kind}.delta") < names.index(f"response.{kind}.done")
    thought, call = first.output
    assert thought.content[0].text == THOUGHT  # type: ignore[union-attr,index]
    assert json.loads(call.arguments) == ARGUMENTS  # type: ignore[union-attr]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain <|script_0|>"}  # type: ignore[union-attr]
    second = client.responses.create(model="scripted", input=[result], previous_response_id=first.id, tools=tools)
    assert second.output_text == ANSWER
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_anthropics_client_thinks_calls_and_takes_results(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "weather", "input_schema": PARAMETERS}]
    asked = user(f"Weather? {CALLING}")
    with claude.messages.stream(model="scripted", max_tokens=300, messages=asked, tools=tools) as events:
        first = events.get_final_message()
    thought, call = first.content
    assert (thought.thinking, call.input) == (THOUGHT, ARGUMENTS)  # type: ignore[union-attr]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain <|script_0|>"}  # type: ignore[union-attr]
    turns: list[Any] = [*asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(model="scripted", max_tokens=300, messages=turns, tools=tools)
    assert second.content[-1].text == ANSWER  # type: ignore[union-attr]
    assert second.stop_reason == "end_turn"


def test_a_call_that_max_tokens_cuts_off_is_valid_says_so_and_can_be_gone_on_from(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "weather", "input_schema": PARAMETERS}]
    asked = user(f"Weather? {CALLING}")
    found: list[dict[str, Any]] = []
    for size in range(22, 52, 3):
        with claude.messages.stream(model="scripted", max_tokens=size, messages=asked, tools=tools) as events:
            first = events.get_final_message()
        plain = claude.messages.create(model="scripted", max_tokens=size, messages=asked, tools=tools)
        assert (first.stop_reason, plain.stop_reason) == ("max_tokens", "max_tokens")
        calls = [block for block in first.content if block.type == "tool_use"]
        assert [call.input for call in calls] == [block.input for block in plain.content if block.type == "tool_use"]
        found += [cast(dict[str, Any], call.input) for call in calls]
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": "It was cut off.", "is_error": True}
            for call in calls
        ]
        said: Any = {"role": "user", "content": [*results, {"type": "text", "text": "Then just talk. <|script_0|>"}]}
        turns: list[Any] = [*asked, {"role": "assistant", "content": first.content}, said]
        second = claude.messages.create(model="scripted", max_tokens=300, messages=turns, tools=tools)
        assert second.content[-1].text == ANSWER  # type: ignore[union-attr]
    cities = {given["city"] for given in found if "city" in given}
    assert len(cities) > 2
    assert all(ARGUMENTS["city"].startswith(city) for city in cities)  # type: ignore[attr-defined]


def test_anthropics_tool_runner_goes_on_without_a_thread_and_sends_the_whole_conversation(
    claude: anthropic.Anthropic,
) -> None:
    @anthropic.beta_tool
    def weather(city: str, days: list[int]) -> str:
        """The weather of a city."""
        return f"{city} {days}: rain <|script_0|>"

    runner = claude.beta.messages.tool_runner(
        model="scripted", max_tokens=300, messages=user(f"Weather? {CALLING}"), tools=[weather]
    )
    assert runner.until_done().content[-1].text == ANSWER  # type: ignore[union-attr]


def test_many_apis_at_once_do_not_mix_up_their_replies(server: ServerHandle) -> None:
    import concurrent.futures

    def ask(number: int) -> str:
        path = ("/v1/chat/completions", "/v1/responses", "/v1/messages")[number % 3]
        body: dict[str, Any] = {"input": "Hi"} if number % 3 == 1 else {"messages": user("Hi"), "max_tokens": 99}
        with http_client(server) as http:
            reply = http.post(path, json=body).json()
        if number % 3 == 1:
            return str(reply["output"][-1]["content"][0]["text"])
        return str(reply["content"][-1]["text"] if number % 3 else reply["choices"][0]["message"]["content"])

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, range(9))) == [ANSWER] * 9


def test_the_llm_command_line_tool_answers(server: ServerHandle, tmp_path: Path) -> None:
    entry = {"model_id": "local", "model_name": "scripted", "api_base": server.base_url, "api_key_name": "local"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (tmp_path / "keys.json").write_text(json.dumps({"local": KEY}))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "NO_PROXY": "*", "PYTHONWARNINGS": "ignore"}
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "local", *more, "Hi"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.strip() == ANSWER, done.stderr


@pytest.mark.filterwarnings("ignore")
def test_langchain_streams_and_calls_tools(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_openai import ChatOpenAI

    monkeypatch.setenv("NO_PROXY", "*")
    chat = ChatOpenAI(model="scripted", base_url=server.base_url, api_key=KEY, max_retries=0)
    assert chat.invoke("Hi").content == ANSWER
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == ANSWER
    bound = chat.bind_tools(TOOLS)
    assert bound.invoke(f"Weather? {CALLING}").tool_calls[0]["args"] == ARGUMENTS
    whole = None
    for chunk in bound.stream(f"Weather? {CALLING}"):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == ARGUMENTS


def test_no_reply_leaves_blocks_behind(llm: LLM, server: ServerHandle) -> None:
    with http_client(server) as http:
        bad = http.post("/v1/chat/completions", json={"messages": user("Hi"), "structured_outputs": {"regex": "("}})
        assert strict.error(bad, 400, "BadRequestError", "structured_outputs")
        with http.stream("POST", "/v1/messages", json={"messages": user("Hi"), "max_tokens": 99, "stream": True}) as r:
            next(r.iter_lines())
    stats = llm.stats()
    while stats.num_running or stats.num_waiting:
        stats = llm.stats()
    assert stats.num_used_blocks == 0
