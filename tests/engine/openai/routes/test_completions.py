"""``/v1/completions``: prompts in every form, echo, logprobs, streams."""

from typing import Any

import httpx
import openai
import pytest

from tests.engine.openai import strict
from tests.engine.openai.fakes import FakeLLM

REPLY = "Hello, wörld!"


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    return strict.completion(response.json())


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 50, "stream": True, **body})
    chunks, _ = strict.events(response.text)
    return [strict.completion_chunk(chunk) for chunk in chunks]


def texts(data: list[dict[str, Any]], num: int) -> list[str]:
    found = [""] * num
    for chunk in data:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice["text"]
    return found


def joined_logprobs(chunks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    joined: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(values)
    return joined


def test_a_prompt_is_continued(http: httpx.Client, llm: FakeLLM) -> None:
    reply = post(http)
    assert reply["choices"][0]["text"] == REPLY
    assert reply["usage"]["prompt_tokens"] == 3
    assert llm.submitted[-1].prompt_token_ids == llm.tokenizer.encode("ab")
    post(http, add_special_tokens=False)
    assert llm.submitted[-1].prompt_token_ids == llm.tokenizer.encode("ab")[1:]


def test_sixteen_tokens_are_the_default_below_live_settings(http: httpx.Client, llm: FakeLLM) -> None:
    post(http, max_tokens=None)
    assert llm.submitted[-1].params.max_tokens == 16
    llm.settings.update(max_tokens=3)
    assert post(http, max_tokens=None)["choices"][0]["text"] == "Hel"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([97, 98], [[97, 98]]),
        (["a", "b"], [[256, 64], [256, 65]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_prompts_come_as_text_or_tokens_one_or_many(
    http: httpx.Client, llm: FakeLLM, prompt: Any, expected: list[list[int]]
) -> None:
    reply = post(http, prompt=prompt)
    assert len(reply["choices"]) == len(expected)
    assert [s.prompt_token_ids for s in llm.submitted] == expected
    assert len({options["request_id"] for options in llm.options}) == len(expected)
    assert texts(stream(http, prompt=prompt), len(expected)) == [REPLY] * len(expected)


def test_several_prompts_with_n_choices_are_numbered_prompt_by_prompt(http: httpx.Client) -> None:
    reply = post(http, prompt=["a", "b"], n=2, echo=True)
    assert [c["text"][0] for c in reply["choices"]] == ["a", "a", "b", "b"]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    streamed = texts(stream(http, prompt=["a", "b"], n=2, echo=True), 4)
    assert streamed == [c["text"] for c in reply["choices"]]


def test_echo_puts_the_prompt_before_the_text(http: httpx.Client) -> None:
    assert post(http, echo=True)["choices"][0]["text"] == "ab" + REPLY
    assert texts(stream(http, echo=True), 1) == ["ab" + REPLY]
    assert post(http, echo=True, prompt=[64, 65])["choices"][0]["text"] == "ab" + REPLY


def test_echo_without_tokens_gives_the_prompt_and_its_logprobs_only(http: httpx.Client) -> None:
    reply = post(http, echo=True, max_tokens=0, logprobs=1)
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["logprobs"]["tokens"] == ["<|start|>", "a", "b"]
    assert reply["usage"]["completion_tokens"] == 0
    chunks = stream(http, echo=True, max_tokens=0, logprobs=1)
    assert texts(chunks, 1) == ["ab"]
    assert joined_logprobs(chunks) == reply["choices"][0]["logprobs"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_parallel_lists_and_the_same_streamed(http: httpx.Client, echo: bool) -> None:
    logprobs = post(http, logprobs=2, echo=echo, max_tokens=4)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == (["<|start|>", "a", "b"] if echo else []) + list("Hell")
    assert len({len(values) for values in logprobs.values()}) == 1
    assert logprobs["text_offset"] == ([0, *range(6)] if echo else [0, 1, 2, 3])  # the text lacks <|start|>
    assert logprobs["top_logprobs"][-1]["l"] == logprobs["token_logprobs"][-1] == -1.5
    assert joined_logprobs(stream(http, logprobs=2, echo=echo, max_tokens=4)) == logprobs


def test_prompt_logprobs_and_token_ids_stand_at_each_choice(http: httpx.Client, llm: FakeLLM) -> None:
    choice = post(http, prompt_logprobs=0, return_token_ids=True)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["prompt_token_ids"] == llm.tokenizer.encode("ab")
    assert llm.tokenizer.decode(choice["token_ids"]) == REPLY
    chunks = stream(http, return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == llm.tokenizer.encode("ab")
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == choice["token_ids"]


def test_usage_counts_all_prompts_and_choices(http: httpx.Client) -> None:
    expected = {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20}
    usage = post(http, prompt=["a", "b"], n=2, max_tokens=4)["usage"]
    assert {name: usage[name] for name in expected} == expected
    chunks = stream(http, prompt=["a", "b"], n=2, max_tokens=4, stream_options={"include_usage": True})
    assert {name: chunks[-1]["usage"][name] for name in expected} == expected


def test_the_openai_client_reads_both(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="ab", max_tokens=5).choices[0].text == "Hello"
    with client.completions.create(model="fake", prompt="ab", max_tokens=5, stream=True) as chunks:
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"


def test_one_refused_prompt_of_many_lets_none_run(http: httpx.Client, llm: FakeLLM) -> None:
    llm.prefill_seconds = 60
    response = http.post("/v1/completions", json={"prompt": ["ok", "x" * 1000], "max_tokens": 5})
    strict.error(response, 400, "BadRequestError", "prompt")
    assert llm.aborted.wait(30)
