"""The client of a remote server: what it sends, what it reads, how failures are told."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import ConfigError, EngineClosedError, RequestError, UnknownModelError, VMMagicError
from engine.outputs import Usage
from engine.params.sampling_params import StructuredOutputsParams
from tests.vm_magic.fake_vllm import USAGE, FakeVLLM, chunk
from vm_magic.remote.address import Address, RemoteConnectionError, RemoteReplyError
from vm_magic.remote.llm import RemoteLLM
from vm_magic.remote.stream import RemoteStream
from vm_magic.remote.wire import NO_ID, EventReader, read_logprobs, request_body
from vm_magic.show.reply_text import ReplyReader

ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as fake:
        yield fake


@pytest.fixture
def remote(server: FakeVLLM) -> Iterator[RemoteLLM]:
    llm = RemoteLLM(server.url)
    yield llm
    llm.close()


def reading(stream: RemoteStream) -> ReplyReader:
    """Everything of ``stream``, read."""
    reader = ReplyReader()
    reader.read(stream)
    return reader


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/", "https://host/v1"),
        ("http://host/v1/", "http://host/v1"),
        ("http://host/v1/chat/completions", "http://host/v1"),
        ("https://host/proxy/8000/v1", "https://host/proxy/8000/v1"),
    ],
)
def test_an_address_is_read_as_typed(url: str, base_url: str) -> None:
    assert Address.of(url, environment={}).base_url == base_url


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "file:///etc/passwd", "", "http://", "http://host:99999"])
def test_only_http_addresses_are_taken(url: str) -> None:
    with pytest.raises(ConfigError, match="give an http or https address"):
        Address.of(url)


def test_a_key_inside_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        Address.of("http://me:topsecret@host")
    assert "topsecret" not in str(refused.value)


def test_the_key_comes_from_the_flag_then_the_variables_and_is_never_shown() -> None:
    both = {"VLLM_API_KEY": "from-vllm", "OPENAI_API_KEY": "from-openai"}
    assert Address.of("http://h", "flag", both).key == "flag"
    assert Address.of("http://h", None, both).key == "from-vllm"
    address = Address.of("http://h", None, {"OPENAI_API_KEY": "from-openai"})
    assert (address.key, address.key_source) == ("from-openai", "OPENAI_API_KEY")
    assert "from-openai" not in repr(address)
    assert "from-openai" not in str(address.refusal(401, {"error": "bad key from-openai"}))
    assert "from-openai" not in str(address.refusal(500, "you sent from-openai"))


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_come_under_either_name_and_usage_in_the_last_chunk(
    server: FakeVLLM, remote: RemoteLLM, name: str
) -> None:
    server.events = [
        chunk(role="assistant", content=""),
        chunk(**{name: "Let me"}),
        chunk(**{name: " see."}),
        chunk("stop", content="Hello!"),
        USAGE,
    ]
    stream = remote.submit_chat(ASK, {})
    reader = reading(stream)
    assert (reader.shown.text, reader.shown.reasoning, reader.finish_reason) == ("Hello!", "Let me see.", "stop")
    assert reader.shown.num_reasoning_tokens == 2
    assert stream.result().usage == Usage(11, 3, 8, 2)
    metrics = stream.metrics
    assert metrics.first_token_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= (metrics.last_token_time or 0)


def test_a_server_that_sends_both_names_is_read_once(server: FakeVLLM, remote: RemoteLLM) -> None:
    server.events = [chunk(reasoning="Hm.", reasoning_content="Hm."), chunk("stop", content="Yes.")]
    stream = remote.submit_chat(ASK, {})
    assert reading(stream).shown.reasoning == "Hm."
    assert stream.result().usage == Usage(completion_tokens=2), "counted here where the server does not tell"


def test_tool_calls_arrive_in_pieces(server: FakeVLLM, remote: RemoteLLM) -> None:
    server.events = [
        chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"a": '}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
        chunk("tool_calls"),
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    reader = reading(remote.submit_chat(ASK, {}, tools=[tool], tool_choice="auto"))
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert reader.reply.tool_calls == [{"id": "c1", "type": "function", "function": function}]
    assert reader.finish_reason == "tool_calls"
    assert server.bodies[0]["tools"] == [tool]


def test_what_is_sent_are_the_given_values_and_the_live_settings_alone(server: FakeVLLM, remote: RemoteLLM) -> None:
    remote.settings.update(temperature=0.5, top_k=20)
    messages = [*ASK, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, *ASK]
    remote.submit_chat(
        messages,
        {"temperature": 0, "max_tokens": 5, "logprobs": 2, "stop": ["x"]},
        think=False,
        thinking_token_budget=9,
        schema={"type": "object"},
    ).result()
    body = server.bodies[0]
    assert body.pop("messages")[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert body == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "top_k": 20,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["x"],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
        "thinking_token_budget": 9,
        "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"type": "object"}}},
    }
    server.events = [{"choices": [{"index": 0, "text": " two", "finish_reason": "length"}]}]
    reader = reading(remote.submit_completion("One,", {"logprobs": 1}))
    assert (reader.shown.text, reader.finish_reason) == (" two", "length")
    sent = server.bodies[1]
    assert (sent["prompt"], sent["logprobs"], sent["top_k"]) == ("One,", 1, 20)
    with pytest.raises(RequestError, match="temperature must be non-negative"):
        remote.submit_chat(ASK, {"temperature": -1})


def test_aborting_closes_the_connection_and_keeps_the_partial_text(server: FakeVLLM, remote: RemoteLLM) -> None:
    server.events, server.pause = [chunk(content=f"word{i} ") for i in range(3000)], 0.02
    stream = remote.submit_chat(ASK, {})
    reader = ReplyReader()
    reader.read(stream.drain(30))
    stream.abort()
    output = stream.result()
    reader.read(stream.drain(0))
    assert output.outputs[0].finish_reason == "abort"
    assert reader.shown.text.startswith("word0 ")
    assert output.usage.completion_tokens > 0
    assert server.gone.wait(30), "the server saw that the client left"
    stream.abort()


def test_aborting_a_request_that_waits_for_its_first_token_ends_at_once(server: FakeVLLM, remote: RemoteLLM) -> None:
    server.events, server.pause = [chunk("stop", content="late")], 30.0
    stream = remote.submit_chat(ASK, {})
    began = time.monotonic()
    stream.abort()
    assert stream.result().outputs[0].finish_reason == "abort"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("events", "done", "message"),
    [
        ([chunk(content="Hel")], False, "broke off its reply"),
        (
            [chunk(content="Hel"), {"error": {"message": "CUDA out\n of memory", "code": 500}}],
            True,
            "CUDA out of memory",
        ),
        ([chunk(content="Hel"), "data: {not json\n\n"], True, "did not send JSON"),
        ([chunk(content="Hel"), {"choices": [{"index": 0, "delta": {"tool_calls": [3]}}]}], True, "cannot be read"),
        ([chunk(content="Hel"), [1]], True, "cannot be read"),
    ],
)
def test_a_broken_reply_is_one_line_after_what_came(
    server: FakeVLLM, remote: RemoteLLM, events: list[Any], done: bool, message: str
) -> None:
    server.events, server.done = events, done
    stream = remote.submit_chat(ASK, {})
    reader = ReplyReader()
    with pytest.raises(RemoteReplyError, match=message) as broken:
        reader.read(stream)
    assert reader.shown.text == "Hel"
    assert "\n" not in str(broken.value)


def test_events_may_have_comments_other_fields_and_no_space() -> None:
    reader = EventReader()
    lines = [": ping", "", "event: x", 'data:{"a":', "data: 1}", "id: 3", "", "data: [DONE]", ""]
    assert [event for line in lines if (event := reader.feed(line)) is not None] == [{"a": 1}]
    assert reader.done
    last = EventReader()
    assert last.feed('data: {"b": 2}') is None
    assert last.close() == {"b": 2}


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, {"error": {"message": "context length is 10", "code": 400}}, RequestError, "context length is 10"),
        (400, {"object": "error", "message": "old vLLM's form"}, RequestError, "old vLLM's form"),
        (422, {"detail": [{"msg": "field required"}]}, RequestError, "field required"),
        (404, {"error": {"message": "no model x"}}, UnknownModelError, "no model x"),
        (401, "", RemoteConnectionError, "refused the key .*set VLLM_API_KEY"),
        (500, "<html><body>long page</body></html>", RemoteReplyError, "HTTP 500: no reason given"),
    ],
)
def test_a_refusal_keeps_the_servers_words(
    server: FakeVLLM, remote: RemoteLLM, status: int, body: Any, kind: type[VMMagicError], message: str
) -> None:
    server.refusals = [(status, body)]
    with pytest.raises(kind, match=message):
        remote.submit_chat(ASK, {}).result()
    assert remote.submit_chat(ASK, {}).result().outputs[0].text == "Hello!", "the next request is served"


def test_a_busy_server_is_asked_again_and_then_given_up(server: FakeVLLM, remote: RemoteLLM) -> None:
    server.refusals = [(503, {"error": "busy"}), (429, "")]
    assert remote.submit_chat(ASK, {}).result().outputs[0].text == "Hello!"
    assert len(server.bodies) == 3
    server.refusals = [(503, {"error": "busy"})] * 9
    with pytest.raises(RemoteReplyError, match="HTTP 503: busy; try again"):
        remote.submit_chat(ASK, {}).result()
    assert len(server.bodies) == 7


def test_the_key_is_sent_and_a_wrong_one_is_told(server: FakeVLLM) -> None:
    server.key = "right-one"
    with pytest.raises(EngineClosedError, match=r"refused the key \(HTTP 401\): give --api-key, or set VLLM_API_KEY"):
        RemoteLLM(server.url)
    with pytest.raises(EngineClosedError, match="the key from --api-key is wrong") as refused:
        RemoteLLM(server.url, api_key="wrong-one")
    assert "wrong-one" not in str(refused.value)
    llm = RemoteLLM(server.url, api_key="right-one")
    assert llm.submit_chat(ASK, {}).result().outputs[0].text == "Hello!"
    assert "right-one" not in repr(llm)
    llm.close()


def test_a_redirect_is_not_followed_with_the_key(server: FakeVLLM) -> None:
    with pytest.raises(
        RemoteConnectionError, match=r"redirects to http://elsewhere\.invalid; connect to that"
    ) as refused:
        RemoteLLM(f"{server.url}/moved", api_key="k3y")
    assert "secret" not in str(refused.value)
    assert server.keys == ["Bearer k3y"]


def test_nobody_there_and_no_api_are_told_in_one_line(server: FakeVLLM) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        RemoteConnectionError, match=rf"cannot reach http://127.0.0.1:{port}/v1: .*is the server running"
    ):
        RemoteLLM(f"http://127.0.0.1:{port}")
    server.models = "nothing"  # type: ignore[assignment]
    with pytest.raises(RemoteConnectionError, match="is not a list of models"):
        RemoteLLM(server.url)


def test_the_model_is_chosen_among_the_served(server: FakeVLLM) -> None:
    server.models = [{"id": "base"}, {"id": "lora", "parent": "base"}]
    llm = RemoteLLM(server.url)
    assert llm.model == "base"
    llm.close()
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ConfigError, match="several models; choose with -m NAME: a, b"):
        RemoteLLM(server.url)
    with pytest.raises(ConfigError, match=r"-m c: .* serves a, b"):
        RemoteLLM(server.url, model="c")


def test_state_is_read_where_there_are_metrics(server: FakeVLLM, remote: RemoteLLM) -> None:
    state = remote.state()
    assert (state.num_running, state.num_waiting, state.kv_cache_usage) == (3, 4, 0.25)
    server.metrics = None
    assert remote.state().num_running is None
    with pytest.raises(RequestError):
        remote.metrics_text()


def test_logprobs_of_both_routes_are_read() -> None:
    top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.0}]
    (chat,) = read_logprobs({"content": [{"token": "b", "logprob": -2.0, "top_logprobs": top}]}) or []
    assert next(iter(chat)) == NO_ID
    assert (chat[NO_ID].decoded_token, chat[NO_ID].rank) == ("b", 2)
    assert [(one.decoded_token, one.rank) for one in chat.values()] == [("b", 2), ("a", 1)]
    plain = read_logprobs({"tokens": ["x"], "token_logprobs": [-0.5], "top_logprobs": [{"x": -0.5}]})
    assert plain is not None
    assert plain[0][NO_ID].decoded_token == "x"
    assert read_logprobs(None) is None


def test_constraints_go_over_the_wire_as_a_request_writes_them() -> None:
    schema = {"type": "object"}
    body = request_body("m", {"structured_outputs": StructuredOutputsParams(json=schema)}, chat=True)
    assert body["structured_outputs"] == {"json": schema}


def test_a_map_goes_over_the_wire_with_bounded_concurrency_and_marks_failures(
    server: FakeVLLM, remote: RemoteLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vm_magic.remote.llm.MAP_CONCURRENCY", 4)
    server.pause = 0.002
    rows = [{"text": f"row {i}"} if i != 5 else {} for i in range(30)]
    found = remote.map(rows, "Say {{ text }}", temperature=[0, 1], system="S", use_tqdm=False)
    assert server.most_at_once <= 4
    assert list(found.index) == [i for i in range(30) for _ in range(2)]
    good = found[found.error.isna()]
    assert len(good) == 58
    assert set(good.text) == {"Hello!"}
    assert set(good.cached_tokens) == {8}
    assert {tuple(message["role"] for message in body["messages"]) for body in server.bodies} == {("system", "user")}
    server.key = "changed"
    with pytest.raises(EngineClosedError, match="refused the key"):
        remote.map(rows[:3], "Say {{ text }}", use_tqdm=False)


def test_replicas_are_the_servers_own(remote: RemoteLLM) -> None:
    with pytest.raises(RequestError, match=r"replicas: the model is at http.*as many as it was started with"):
        remote.map(["a"], "{{ text }}", replicas=2)


def test_choices_are_refused_with_the_way_back_to_this_kernel(remote: RemoteLLM) -> None:
    with pytest.raises(RequestError, match=r"choices: .* need the model in this kernel.*connect --close"):
        remote.map(["a"], "{{ text }}", choices=["yes", "no"], use_tqdm=False)


def test_closing_ends_what_runs_and_the_thread(server: FakeVLLM) -> None:
    server.events, server.pause = [chunk(content="w ") for _ in range(3000)], 0.02
    llm = RemoteLLM(server.url)
    stream = llm.submit_chat(ASK, {})
    assert stream.drain(30)
    llm.close()
    llm.close()
    assert stream.result().outputs[0].finish_reason == "abort"
    with pytest.raises(EngineClosedError, match="the connection was closed"):
        llm.submit_chat(ASK, {})
    assert not [thread for thread in threading.enumerate() if thread.name == "vm-remote" and thread.is_alive()]
    assert re.search("closed", repr(llm))
