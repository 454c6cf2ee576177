"""The port before the real engine: the same tokens as in Python, and no block left behind."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.openai.server import ServerHandle
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, http_client

NUM_TOKENS = 24
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
PROMPTS = [" ".join(f"word{number}" for number in range(start, start + 4 * start + 3)) for start in range(8)]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=2048, gpu_memory_utilization=0.2) as made:
        yield made


def test_llm_server_is_the_running_servers_handle_or_none(llm: LLM) -> None:
    assert llm.server is None
    handle = llm.serve(api_key=KEY)
    assert llm.server is handle
    handle.stop()
    assert llm.server is None


@pytest.fixture
def server(llm: LLM) -> Iterator[ServerHandle]:
    handle = llm.serve(api_key=KEY)
    yield handle
    handle.stop()


def leave_early(server: ServerHandle, body: dict[str, Any], leave: threading.Event) -> None:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        leave.wait(60)


def wait_for(llm: LLM, num_requests: int) -> None:
    deadline = time.monotonic() + 60
    while (stats := llm.stats()).num_running + stats.num_waiting < num_requests:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def wait_for_rest(llm: LLM) -> None:
    deadline = time.monotonic() + 60
    while (stats := llm.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)
    assert stats.num_used_blocks == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def test_eight_clients_get_pythons_tokens_while_others_leave(llm: LLM, server: ServerHandle) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    llm.reset_prefix_cache()
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        body = {"prompt": PROMPTS[number], **GREEDY, "return_token_ids": True, "stream": number % 2 == 0}
        with http_client(server) as http:
            response = http.post("/v1/completions", json=body)
        if number % 2:
            found[number] = strict.completion(response.json())["choices"][0]["token_ids"]
        else:
            chunks, _ = strict.events(response.text)
            found[number] = [i for c in chunks for i in strict.completion_chunk(c)["choices"][0]["token_ids"]]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    long = {"prompt": "x " * 900, "max_tokens": 800, "ignore_eos": True}
    leave = threading.Event()
    leaving = [threading.Thread(target=leave_early, args=(server, {**long, "stream": s}, leave)) for s in (True, False)]
    for thread in leaving:
        thread.start()
    wait_for(llm, 2)
    for thread in threads:
        thread.start()
    leave.set()
    for thread in [*threads, *leaving]:
        thread.join()
    assert [found[number] for number in range(len(PROMPTS))] == expected
    wait_for_rest(llm)
    samples = [sample for family in llm.metrics.registry.collect() for sample in family.samples]
    ended = {one.labels["finished_reason"]: one.value for one in samples if one.name == "vllm:request_success_total"}
    assert ended["abort"] == 2


def test_a_chat_is_what_python_says(llm: LLM, server: ServerHandle) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=2, ignore_eos=True)
    wanted = llm.chat(messages, params, chat_template=template)[0].outputs[0]
    server.stop()
    with http_client(llm.serve(api_key=KEY, trust_request_chat_template=True)) as http:
        body = {"messages": messages, **GREEDY, "chat_template": template, "logprobs": True, "top_logprobs": 2}
        choice = strict.chat(http.post("/v1/chat/completions", json=body).json())["choices"][0]
    assert choice["message"]["content"] == wanted.text
    assert wanted.logprobs is not None
    for entry, token, at in zip(choice["logprobs"]["content"], wanted.token_ids, wanted.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(at[token].logprob, abs=1e-3)
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]


def test_echoed_logprobs_cover_prompt_and_output(server: ServerHandle) -> None:
    with http_client(server) as http:
        body = {"prompt": PROMPTS[1], **GREEDY, "echo": True, "logprobs": 1, "return_token_ids": True}
        choice = strict.completion(http.post("/v1/completions", json=body).json())["choices"][0]
    num_prompt = len(choice["prompt_token_ids"])
    assert len(choice["logprobs"]["tokens"]) == num_prompt + NUM_TOKENS
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_the_same_seed_gives_the_same_text_over_http(server: ServerHandle) -> None:
    body = {"prompt": "once", "seed": 7, "max_tokens": 12, "n": 2, "temperature": 1.0}
    with http_client(server) as http:
        first, second = (http.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in second]


def test_an_over_long_prompt_keeps_vllms_first_words(server: ServerHandle) -> None:
    with http_client(server) as http:
        chat = {"messages": [{"role": "user", "content": "word " * 3000}]}
        replies = [
            http.post("/v1/completions", json={"prompt": [5] * 3000}),
            http.post("/v1/chat/completions", json=chat),
            http.post("/v1/chat/completions", json={**chat, "stream": True}),
        ]
    for response in replies:
        assert response.json()["error"]["message"].startswith("This model's maximum context length is 2048 tokens. ")
        assert response.status_code == 400


def test_tokens_outside_the_vocabulary_are_refused(server: ServerHandle) -> None:
    with http_client(server) as http:
        for body in ({"prompt": [10**7]}, {"prompt": "x", "logit_bias": {str(10**7): 1}}):
            strict_error(http.post("/v1/completions", json=body))


def strict_error(response: httpx.Response) -> None:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "BadRequestError"


def test_serving_metrics_count_what_was_asked(llm: LLM, server: ServerHandle) -> None:
    with http_client(server) as http:
        before = generated(http)
        http.post("/v1/completions", json={"prompt": "x", **GREEDY})
        wait_for_rest(llm)
        assert generated(http) - before == NUM_TOKENS


def generated(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm:generation_tokens_total")).split()[-1])


def test_the_engine_goes_on_to_the_end_while_the_ports_thread_stands_still(llm: LLM, server: ServerHandle) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        entered.set()
        go_on.wait(60)

    [alone] = llm.generate([PROMPTS[1]], SamplingParams(**{**GREEDY, "max_tokens": 200}), use_tqdm=False)
    body = {"model": llm.args.names[0], "prompt": PROMPTS[1], **GREEDY, "max_tokens": 200, "stream": True}
    loop = server._loop
    assert loop is not None
    with http_client(server) as http, http.stream("POST", "/v1/completions", json=body) as response:
        try:
            loop.call_soon_threadsafe(stand_still)
            assert entered.wait(60)
            [other] = llm.generate([PROMPTS[2]], SamplingParams(**GREEDY), use_tqdm=False)
            wait_for_rest(llm)  # every token of the stream too, of which nothing more was written
            assert not go_on.is_set()
        finally:
            go_on.set()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert len(other.outputs[0].token_ids) == NUM_TOKENS
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == alone.outputs[0].text
