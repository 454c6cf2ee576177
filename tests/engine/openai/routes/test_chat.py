"""``/v1/chat/completions``: every field's effect, and replies that are exactly of OpenAI's types."""

from typing import Any

import httpx
import openai
import pytest

from tests.engine.openai import strict
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
REPLY = "Hello, wörld!"


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    return strict.chat(response.json())


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks, _ = strict.events(response.text)
    return [strict.chat_chunk(chunk) for chunk in chunks]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_a_chat_is_answered(http: httpx.Client) -> None:
    reply = post(http)
    choice = reply["choices"][0]
    assert choice["message"]["content"] == REPLY
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert reply["model"] == "fake"
    usage = reply["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["completion_tokens"] == len(REPLY.encode())


def test_a_stream_says_the_same_as_the_plain_reply(http: httpx.Client) -> None:
    chunks = stream(http)
    assert text_of(chunks) == REPLY
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_the_openai_client_reads_both(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert plain.choices[0].message.content == REPLY
    with client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as chunks:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY


def test_usage_comes_last_when_asked_for_and_in_every_chunk_when_wanted(http: httpx.Client) -> None:
    chunks = stream(http, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(REPLY.encode())
    assert not any("usage" in chunk for chunk in chunks[:-1])
    chunks = stream(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0, "the first chunk brings the role and no token"
    assert counts[1] > 0
    assert chunks[0]["usage"]["total_tokens"] == chunks[0]["usage"]["prompt_tokens"] > 0
    assert counts[-1] == counts[-2] == len(REPLY.encode())


def test_n_choices_come_each_with_its_index(http: httpx.Client) -> None:
    assert [c["index"] for c in post(http, n=3)["choices"]] == [0, 1, 2]
    chunks = stream(http, n=3)
    assert [text_of(chunks, index) for index in range(3)] == [REPLY] * 3
    roles = [c for chunk in chunks for c in chunk["choices"] if "role" in c["delta"]]
    assert sorted(c["index"] for c in roles) == [0, 1, 2]


@pytest.mark.parametrize("stop", ["wö", ["zzz", "wö"], ["lo, w", "ö"]])
def test_a_stop_string_ends_the_reply_and_is_told(http: httpx.Client, stop: Any) -> None:
    choice = post(http, stop=stop)["choices"][0]
    met = choice["stop_reason"]
    assert met in stop
    assert choice["message"]["content"] == REPLY[: REPLY.index(met)]
    chunks = stream(http, stop=stop)
    assert text_of(chunks) == REPLY[: REPLY.index(met)]
    assert chunks[-1]["choices"][0]["stop_reason"] == met


def test_max_tokens_under_both_names_and_to_the_end_of_the_context_without(http: httpx.Client, llm: FakeLLM) -> None:
    for given in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_completion_tokens": 4, "max_tokens": 9}):
        choice = post(http, **given)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "length")
    post(http)
    assert llm.submitted[-1].params.max_tokens is None


def test_every_sampling_field_reaches_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop_token_ids": [9], "min_tokens": 1,
        "ignore_eos": True, "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1,
        "bad_words": ["no"], "allowed_token_ids": [1, 2], "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "prompt_logprobs": 1,
    }  # fmt: skip
    reply = post(http, **given, logit_bias={"5": 200, "6": -3})
    params = llm.submitted[-1].params
    for name, value in given.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert params.logit_bias == {5: 100.0, 6: -3.0}
    assert reply["prompt_logprobs"][0] is None
    token_id, entry = next(iter(reply["prompt_logprobs"][1].items()))
    assert int(token_id) == llm.submitted[-1].prompt_token_ids[1]
    assert set(entry) == {"logprob", "rank", "decoded_token"}


def test_nulls_mean_the_default(http: httpx.Client, llm: FakeLLM) -> None:
    post(http, temperature=None, max_tokens=None, stop=None, n=None, stream=None, tools=None, logit_bias=None)
    assert llm.submitted[-1].params == llm.sampling_params()


def test_live_settings_count_where_the_request_says_nothing(http: httpx.Client, llm: FakeLLM) -> None:
    llm.settings.update(temperature=0.25, n=2)
    assert len(post(http)["choices"]) == 2
    assert llm.submitted[-1].params.temperature == 0.25
    assert len(post(http, n=1, temperature=0.5)["choices"]) == 1
    assert llm.submitted[-1].params.temperature == 0.5


def test_logprobs_have_one_entry_per_token_and_the_likeliest_first(http: httpx.Client) -> None:
    content = post(http, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(content) == len(REPLY.encode())
    assert (content[0]["token"], content[0]["bytes"], content[0]["logprob"]) == ("H", [72], -1.5)
    first, second = content[0]["top_logprobs"]
    assert (first["logprob"], second["token"]) == (-0.25, "H")
    lowest = post(http, logprobs=True, top_logprobs=3, max_tokens=1)["choices"][0]["logprobs"]["content"][0]
    assert [entry["logprob"] for entry in lowest["top_logprobs"]] == [-0.25, -1.5, -9999.0], "-inf is not JSON"
    streamed = [e for chunk in stream(http, logprobs=True, top_logprobs=2) for e in entries(chunk)]
    assert streamed == content


def entries(chunk: dict[str, Any]) -> list[Any]:
    logprobs = chunk["choices"][0]["logprobs"]
    return logprobs["content"] if logprobs else []


def test_logprobs_without_alternatives_have_an_empty_list(http: httpx.Client) -> None:
    content = post(http, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * len(REPLY.encode())
    assert post(http)["choices"][0]["logprobs"] is None


def test_token_ids_and_prompt_text_come_when_asked_for(http: httpx.Client, llm: FakeLLM) -> None:
    reply = post(http, return_token_ids=True, return_prompt_text=True, logprobs=True, return_tokens_as_token_ids=True)
    assert reply["prompt_token_ids"] == llm.submitted[-1].prompt_token_ids
    assert reply["prompt_text"] == "<|start|>user:Hi<|start|>assistant:"
    ids = reply["choices"][0]["token_ids"]
    assert llm.tokenizer.decode(ids) == REPLY
    assert [e["token"] for e in reply["choices"][0]["logprobs"]["content"]] == [f"token_id:{i}" for i in ids]
    chunks = stream(http, return_token_ids=True)
    assert [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids", [])] == ids
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


def test_template_fields_reach_the_template(http: httpx.Client, llm: FakeLLM) -> None:
    def prompt(**body: Any) -> str:
        return str(post(http, return_prompt_text=True, **body)["prompt_text"])

    assert prompt(add_generation_prompt=False) == "<|start|>user:Hi"
    assert prompt(add_generation_prompt=False, continue_final_message=True).endswith("user:Hi")
    assert prompt(chat_template_kwargs={"extra": "more"}).endswith("assistant:more")
    assert "1 tools" in prompt(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")
    without = llm.submitted[-1].prompt_token_ids
    prompt(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none", add_special_tokens=True)
    assert llm.submitted[-1].prompt_token_ids == [256, *without]


def test_tools_that_may_not_be_called_are_left_out_of_the_prompt_where_the_port_is_told_so(serve: Serve) -> None:
    asked: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f"}}], "return_prompt_text": True}
    with http_client(serve(exclude_tools_when_tool_choice_none=True)) as http:
        assert "1 tools" not in post(http, **asked, tool_choice="none")["prompt_text"]
        assert "1 tools" in post(http, **asked, tool_choice="required")["prompt_text"]


def test_usage_ends_every_stream_of_a_port_that_is_told_so(serve: Serve) -> None:
    with http_client(serve(enable_force_include_usage=True)) as http:
        for more in ({}, {"stream_options": {"include_usage": False}}):
            chunks = stream(http, **more)
            assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        text = http.post("/v1/completions", json={"prompt": "a", "stream": True}).text
        assert strict.events(text)[0][-1]["usage"]["completion_tokens"] > 0


def test_reasoning_effort_switches_thinking_unless_the_request_says_otherwise(
    http: httpx.Client, serve: Serve, llm: FakeLLM
) -> None:
    with http_client(serve(trust_request_chat_template=True)) as trusting:

        def rendered(**body: Any) -> str:
            body["chat_template"] = "{{ enable_thinking }}/{{ reasoning_effort }}"
            return str(post(trusting, return_prompt_text=True, **body)["prompt_text"])

        assert rendered(reasoning_effort="none") == "False/none"
        assert rendered(reasoning_effort="high") == "True/high"
        assert rendered(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}) == "False/high"


def test_truncated_prompts_keep_the_asked_side(http: httpx.Client, llm: FakeLLM) -> None:
    post(http)
    whole = llm.submitted[-1].prompt_token_ids
    post(http, truncate_prompt_tokens=4)
    assert llm.submitted[-1].prompt_token_ids == whole[-4:]
    post(http, truncate_prompt_tokens=4, truncation_side="right")
    assert llm.submitted[-1].prompt_token_ids == whole[:4]
    long = [{"role": "user", "content": "x" * 1000}]
    post(http, messages=long, truncate_prompt_tokens=-1, max_tokens=10)
    assert len(llm.submitted[-1].prompt_token_ids) == 512 - 10


def test_ids_priority_and_salt_reach_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    assert post(http, request_id="mine", priority=-2, cache_salt="pepper")["id"] == "chatcmpl-mine"
    assert llm.options[-1]["priority"] == -2
    assert llm.options[-1]["cache_salt"] == "pepper"
    assert llm.options[-1]["request_id"].startswith("chatcmpl-mine-")
    post(http, request_id="mine")
    assert llm.options[-1]["request_id"] != llm.options[-2]["request_id"]


def test_the_request_id_header_names_the_reply(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES}, headers={"X-Request-Id": "abc"})
    assert response.json()["id"] == "chatcmpl-abc"
