"""``/v1/messages``: Anthropic's blocks, events and errors."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from engine.openai.server import ServerHandle
from tests.engine.openai import strict_more
from tests.engine.openai.conftest import KEY, Serve, http_client
from tests.engine.openai.fakes import FakeLLM
from tests.engine.openai.routes.test_responses import CALLS, THOUGHT

REPLY = "Hello, wörld!"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {
    "name": "weather", "description": "…",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip


@pytest.fixture
def claude(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[anthropic.Anthropic]:
    monkeypatch.setenv("NO_PROXY", "*")
    address = server.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0, timeout=20) as made:
        yield made


def body_of(**body: Any) -> dict[str, Any]:
    return {"model": "fake", "max_tokens": 200, "messages": MESSAGES, **body}


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/messages", json=body_of(**body))
    assert response.status_code == 200, response.text
    return strict_more.message(response.json())


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/messages", json=body_of(**body, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    return strict_more.message_events(response.text)


def error(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"], set(body["error"]) - {"details"}) == (
        "error",
        kind,
        {"type", "message"},
    )
    return str(body["error"]["message"])


def prompt_of(llm: FakeLLM) -> str:
    return llm.tokenizer.decode(llm.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def blocks_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks that a stream tells."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            arguments = ""
        elif event["type"] == "content_block_delta":
            delta = dict(event["delta"])
            kind = delta.pop("type")
            if kind == "input_json_delta":
                arguments += delta["partial_json"]
                continue
            assert event["index"] == len(blocks) - 1
            for name, text in delta.items():
                blocks[-1][name] += text
        elif event["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = json.loads(arguments)
    return blocks


def test_a_message_is_answered(http: httpx.Client) -> None:
    reply = post(http, system="Be kind.")
    assert reply["content"] == [{"type": "text", "text": REPLY, "citations": None}]
    assert (reply["stop_reason"], reply["model"]) == ("end_turn", "fake")
    assert reply["usage"]["output_tokens"] == len(REPLY.encode())


def test_the_events_come_in_anthropics_order(http: httpx.Client) -> None:
    events = stream(http)
    names = [event["type"] for event in events]
    deltas = names.count("content_block_delta")
    assert names == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == events[-2]["usage"]["input_tokens"] > 0
    assert events[-2]["usage"]["output_tokens"] == len(REPLY.encode())


def test_a_thought_comes_as_a_thinking_block_plain_and_streamed(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reasoning_parser, llm.reply = "qwen3", THOUGHT
    content = post(http)["content"]
    assert content[0] == {"type": "thinking", "thinking": "So be it.", "signature": ""}
    assert content[1]["text"] == "Hello!"
    assert blocks_of(stream(http)) == content


def test_tools_are_called_plain_and_streamed(http: httpx.Client, llm: FakeLLM) -> None:
    llm.tool_call_parser, llm.reply = "hermes", CALLS
    reply = post(http, tools=[TOOL])
    assert reply["stop_reason"] == "tool_use"
    _, first, second = reply["content"]
    assert (first["name"], first["input"]) == ("weather", {"city": 'Bad "Oeynhausen" {}'})
    assert second["input"] == {"city": "Köln"}
    events = stream(http, tools=[TOOL])
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    told = [{key: value for key, value in block.items() if key != "id"} for block in blocks_of(events)]
    assert told == [{key: value for key, value in block.items() if key != "id"} for block in reply["content"]]


def test_a_tools_result_goes_back_to_the_template(http: httpx.Client, llm: FakeLLM) -> None:
    llm.tool_call_parser = "hermes"
    post(http, tools=[TOOL], system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
         messages=[
             *MESSAGES,
             {"role": "assistant", "content": [
                 {"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "I look."},
                 {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
             ]},
             {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                 {"type": "text", "text": "And?"},
             ]},
         ])  # fmt: skip
    assert prompt_of(llm).startswith(
        "<|start|>system:Be kind.<|start|>user:Hi<|start|>assistant:I look.<|start|>tool:rain<|start|>user:And?1 tools"
    )


def test_stop_sequences_and_the_token_limit_are_told(http: httpx.Client) -> None:
    reply = post(http, stop_sequences=["zzz", "wö"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "wö")
    assert reply["content"][0]["text"] == "Hello, "
    assert post(http, max_tokens=4)["stop_reason"] == "max_tokens"
    assert stream(http, max_tokens=4)[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


def test_thinking_reaches_the_template_and_its_own_variables_win(serve: Serve, llm: FakeLLM) -> None:
    with http_client(serve(trust_request_chat_template=True)) as http:
        template = "{{ messages[-1].content }} {{ enable_thinking }} {{ reasoning_effort }}"
        for given, expected in (
            ({"thinking": {"type": "adaptive"}}, "True "),
            ({"thinking": {"type": "disabled"}}, "False "),
            ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": "!"}}, "! "),
            ({"output_config": {"effort": "low"}}, "True low"),
        ):
            post(http, chat_template=template, **given)
            assert prompt_of(llm) == f"Hi {expected}"


def test_tokens_are_counted_as_the_prompt_has_them(http: httpx.Client, llm: FakeLLM) -> None:
    body = {"model": "fake", "messages": MESSAGES, "system": "Be kind.", "chat_template_kwargs": {"extra": "!!"}}
    count = http.post("/v1/messages/count_tokens", json=body).json()
    assert not llm.submitted
    post(http, system="Be kind.", chat_template_kwargs={"extra": "!!"})
    assert count == {"input_tokens": len(llm.submitted[-1].prompt_token_ids)}


def test_sampling_fields_reach_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "ignore_eos": True}
    post(http, **given)
    params = llm.submitted[-1].params
    assert {name: getattr(params, name) for name in given} == given
    assert params.max_tokens == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": 3}]},
        {
            "tools": [{"type": "web_search_20250305", "name": "web_search"}],
            "tool_choice": {"type": "tool", "name": "web_search"},
        },
        {"tools": [TOOL]},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "all"}},
        {"compaction": {"type": "summarize"}},
        {"thread": {"type": "continue", "previous_message_id": "msg_1"}},
        {"response_format": {"type": "json_object"}},
        {"output_config": {"effort": "much"}},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"chat_template": "x"},
        {"vllm_xargs": {"a": 1}},
    ],
)
def test_what_cannot_be_honoured_is_refused_in_anthropics_form(
    http: httpx.Client, llm: FakeLLM, body: dict[str, Any]
) -> None:
    assert error(http.post("/v1/messages", json=body_of(**body)), 400, "invalid_request_error")
    assert not llm.submitted


def test_every_status_has_anthropics_type(serve: Serve, llm: FakeLLM) -> None:
    server = serve(max_body_bytes=4000)
    with http_client(server) as http:
        assert error(http.post("/v1/messages", json=body_of(model="other")), 404, "not_found_error")
        assert error(http.post("/v1/messages", json=body_of(system="x" * 5000)), 413, "request_too_large")
        assert error(http.get("/v1/messages"), 405, "invalid_request_error")
        wrong = {"authorization": "", "x-api-key": "wrong"}
        assert error(http.post("/v1/messages", json=body_of(), headers=wrong), 401, "authentication_error")
        right = {"authorization": "", "x-api-key": KEY}
        assert http.post("/v1/messages", json=body_of(), headers=right).status_code == 200
        foreign = {"origin": "https://elsewhere.example"}
        assert error(http.post("/v1/messages", json=body_of(), headers=foreign), 403, "permission_error")
        llm.fail_after = 3
        assert "out of luck" in error(http.post("/v1/messages", json=body_of()), 500, "api_error")


def test_a_failure_midway_is_an_error_event(http: httpx.Client, llm: FakeLLM) -> None:
    llm.fail_after = 4
    events = stream(http)
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", "api_error")
    assert "".join(block["text"] for block in blocks_of(events[:-1])) == "Hell"


def test_silence_is_bridged_by_pings(serve: Serve, llm: FakeLLM) -> None:
    llm.prefill_seconds = 0.3
    with http_client(serve(keep_alive_seconds=0.05)) as http:
        names = [event["type"] for event in stream(http)]
    assert names[:4] == ["message_start", "ping", "ping", "ping"]


def test_a_client_that_leaves_frees_its_request(http: httpx.Client, llm: FakeLLM) -> None:
    llm.token_seconds = 0.1
    with http.stream("POST", "/v1/messages", json=body_of(stream=True)) as response:
        next(response.iter_lines())
    assert llm.aborted.wait(30)


def test_the_anthropic_client_reads_messages_streams_counts_and_errors(
    claude: anthropic.Anthropic, llm: FakeLLM
) -> None:
    llm.reasoning_parser, llm.tool_call_parser = "qwen3", "hermes"
    llm.reply = "<think>\nSo be it.\n</think>\n\n" + CALLS
    plain = claude.messages.create(model="fake", max_tokens=300, messages=MESSAGES, tools=[TOOL])
    with claude.messages.stream(model="fake", max_tokens=300, messages=MESSAGES, tools=[TOOL]) as events:
        streamed = events.get_final_message()
    for message in (plain, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert message.content[3].input == {"city": "Köln"}  # type: ignore[union-attr]
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens == len(llm.reply.encode())
    assert claude.messages.count_tokens(model="fake", messages=MESSAGES).input_tokens > 0
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="other", max_tokens=3, messages=MESSAGES)
