"""Everything that goes wrong: vLLM's status, type, param and words."""

import json
from typing import Any

import httpx
import openai
import pytest

from engine.openai.http.errors import NOT_OFFERED
from engine.openai.server import ServerHandle
from tests.engine.openai import strict
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


def refused(http: httpx.Client, param: str | None, path: str = CHAT, **body: Any) -> str:
    base: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    return strict.error(http.post(path, json={**base, **body}), 400, "BadRequestError", param)


def test_an_unknown_model_is_not_found(http: httpx.Client, client: openai.OpenAI) -> None:
    for path, body in (
        (CHAT, {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        response = http.post(path, json={"model": "gpt-9", **body})
        assert strict.error(response, 404, "NotFoundError", "model") == "The model `gpt-9` does not exist."
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)


def test_what_json_cannot_carry_is_refused_wherever_it_is(http: httpx.Client) -> None:
    fields = (b'"model": "\\ud800"', b'"x": {"\\uDFFF": 1}', b'"x": [NaN]', b'"x": -Infinity', b'"x": 1e999')
    for field in fields:
        body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], %b}' % field
        response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        strict.error(response, 400, "BadRequestError", None)
        assert "cannot be read" in response.json()["error"]["message"]


def test_every_served_name_is_known(http: httpx.Client) -> None:
    for name in ("fake", "org/fake-model"):
        assert http.post(CHAT, json={"model": name, "messages": MESSAGES}).json()["model"] == "fake"


def test_a_body_that_is_no_json(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{not json", b"", b"\xff\xfe"):
        response = http.post(CHAT, content=content, headers=headers)
        strict.error(response, 400, "BadRequestError")
    response = http.post(CHAT, content=json.dumps({"messages": MESSAGES}), headers={"content-type": "text/plain"})
    assert "application/json" in strict.error(response, 400, "BadRequestError")
    response = http.post(CHAT, content=b"[1]", headers=headers)
    assert "JSON object" in strict.error(response, 400, "BadRequestError")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": []}, "messages"),
        ({"stop": 5}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 100_000}, "truncate_prompt_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        ({"chat_template_kwargs": {"raise_please": True}}, "messages"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(http: httpx.Client, llm: FakeLLM, body: dict[str, Any], param: str) -> None:
    assert refused(http, param, **body)
    assert not llm.submitted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("functions", [{"name": "f"}]),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("best_of", 4),
        ("modalities", ["text", "audio"]),
        ("logprob_token_ids", [1]),
        ("vllm_xargs", {"a": 1}),
    ],
)
def test_what_is_not_built_is_refused_by_name(http: httpx.Client, llm: FakeLLM, field: str, value: Any) -> None:
    assert f"`{field}`" in refused(http, field, **{field: value})
    assert not llm.submitted


def test_values_that_ask_for_nothing_pass(http: httpx.Client) -> None:
    neutral = {
        "response_format": {"type": "text"}, "tools": [], "use_beam_search": False, "length_penalty": 1.0, "best_of": 1,
        "echo": False, "include_reasoning": True, "modalities": ["text"], "functions": [], "tool_choice": "none",
    }  # fmt: skip
    assert http.post(CHAT, json={"messages": MESSAGES, **neutral}).status_code == 200


def test_a_suffix_is_refused_in_completions(http: httpx.Client) -> None:
    assert "`suffix`" in refused(http, "suffix", "/v1/completions", suffix="x")
    assert refused(http, "prompt", "/v1/completions", prompt=[])
    assert refused(http, "prompt", "/v1/completions", prompt=[-1])


def test_unknown_fields_are_accepted_and_logged(http: httpx.Client, server: ServerHandle) -> None:
    assert http.post(CHAT, json={"messages": MESSAGES, "frobnicate": 1}).status_code == 200
    sentence = "The following fields were present in the request but ignored: {'frobnicate'}"
    assert any(sentence in line for line in server.log_lines)


def test_an_over_long_prompt_is_a_bad_request(http: httpx.Client, client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    assert refused(http, "prompt", messages=long) == refused(http, "prompt", messages=long, stream=True)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=long)  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.type) == ("prompt", "BadRequestError")


def test_a_trusted_request_template_is_used(serve: Serve) -> None:
    with http_client(serve(trust_request_chat_template=True)) as http:
        body = {"messages": MESSAGES, "chat_template": "T:{{ messages[0].content }}", "return_prompt_text": True}
        assert http.post(CHAT, json=body).json()["prompt_text"] == "T:Hi"
        assert "line 1" in refused(http, "chat_template", chat_template="{% if %}")
        assert "cannot set" in refused(http, "chat_template_kwargs", chat_template_kwargs={"chat_template": "x"})


def test_an_untrusted_request_template_is_refused_in_vllms_words(http: httpx.Client) -> None:
    expected = "Chat template is passed with request, but --trust-request-chat-template is not set."
    assert expected in refused(http, "chat_template", chat_template="x")
    response = http.post("/tokenize", json={"messages": MESSAGES, "chat_template": "x"})
    assert expected in strict.error(response, 400, "BadRequestError", "chat_template")


def test_a_failure_of_the_engine_is_an_internal_error(http: httpx.Client, llm: FakeLLM) -> None:
    llm.fail_after = 2
    response = http.post(CHAT, json={"messages": MESSAGES})
    assert "out of luck" in strict.error(response, 500, "InternalServerError")
    llm.fail_after, llm.abort_after = None, 2
    response = http.post(CHAT, json={"messages": MESSAGES})
    assert "was cancelled" in strict.error(response, 499, "RequestAbortedError")


def test_a_bug_is_told_in_general_words_and_logged_in_full(
    http: httpx.Client, llm: FakeLLM, server: ServerHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(llm, "submit", broken)
    message = strict.error(http.post(CHAT, json={"messages": MESSAGES}), 500, "InternalServerError")
    assert "ZeroDivisionError" in message
    assert "secret" not in message
    assert any("secret detail" in line for line in server.log_lines)


def test_a_closed_engine_says_so(http: httpx.Client, llm: FakeLLM) -> None:
    llm.closed = True
    response = http.post(CHAT, json={"messages": MESSAGES})
    assert "engine is closed" in strict.error(response, 503, "ServiceUnavailableError")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    assert http.get("/health").status_code == 503


@pytest.mark.parametrize("path", sorted(NOT_OFFERED))
def test_a_route_of_vllms_that_is_not_offered_says_so(http: httpx.Client, path: str) -> None:
    for response in (http.post(path, json={"model": "fake", "input": "x"}), http.get(path)):
        message = strict.error(response, 404, "NotFoundError")
        assert message.startswith(f"This server does not offer {path}: ")


def test_a_route_that_is_not_offered_asks_for_the_key_too(serve: Serve) -> None:
    with http_client(serve()) as http:
        del http.headers["Authorization"]
        assert http.post("/v1/embeddings", json={}).status_code == 401


def test_unknown_paths_and_methods_are_json_errors(http: httpx.Client) -> None:
    assert "/v1/nothing" in strict.error(http.get("/v1/nothing"), 404, "NotFoundError")
    strict.error(http.get(CHAT), 405, "Method Not Allowed")
