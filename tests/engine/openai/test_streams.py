"""Streams over time: keep-alive comments, failures on the way, clients that leave, a server that stops."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from engine.openai.server import ServerHandle
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, Serve, http_client
from tests.engine.openai.fakes import FakeLLM

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = ((CHAT, BODY), ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 50}))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def load(server: ServerHandle) -> int:
    with http_client(server) as http:
        return int(http.get("/load").json()["server_load"])


@contextmanager
def raw_request(server: ServerHandle, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that sends its request and reads only what the test reads."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def test_headers_and_comments_come_while_a_long_prefill_runs(serve: Serve, llm: FakeLLM) -> None:
    llm.prefill_seconds = 2
    server = serve(keep_alive_seconds=0.1)
    with http_client(server) as http, http.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
        assert not llm.submitted[0].finished
        assert response.headers["cache-control"] == "no-cache"
        chunks, num_comments = strict.events(response.read().decode())
    assert num_comments >= 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_quick_stream_has_no_comments(server: ServerHandle) -> None:
    with http_client(server) as http:
        assert strict.events(http.post(CHAT, json={**BODY, "stream": True}).text)[1] == 0


def test_comments_come_between_slow_tokens_too(serve: Serve, llm: FakeLLM) -> None:
    llm.token_seconds = 1
    with http_client(serve(keep_alive_seconds=0.1)) as http:
        text = http.post(CHAT, json={**BODY, "stream": True, "max_tokens": 3}).text
    chunks, num_comments = strict.events(text)
    assert num_comments >= 3
    assert len(chunks) == 4


@pytest.mark.parametrize(("steer", "code"), [("fail_after", 500), ("abort_after", 499)])
def test_a_failure_on_the_way_is_an_error_event_and_the_stream_ends_properly(
    server: ServerHandle, llm: FakeLLM, steer: str, code: int
) -> None:
    setattr(llm, steer, 3)
    with http_client(server) as http:
        for path, body in PATHS:
            chunks, _ = strict.events(http.post(path, json={**body, "stream": True}).text)
            assert set(chunks[-1]) == {"error"}
            assert chunks[-1]["error"]["code"] == code
            assert any(chunk.get("choices") for chunk in chunks)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_client_that_leaves_frees_its_requests(
    server: ServerHandle, llm: FakeLLM, path: str, body: dict[str, Any], phase: str, streamed: bool
) -> None:
    if phase == "prefill":
        llm.prefill_seconds = 60
    else:
        llm.token_seconds = 60
    with raw_request(server, path, {**body, "stream": streamed}):
        wait_until(lambda: load(server) == 1)
    wait_until(lambda: all(stream.finished for stream in llm.submitted))
    wait_until(lambda: load(server) == 0)


def test_other_clients_go_on_when_one_leaves(server: ServerHandle, llm: FakeLLM) -> None:
    llm.token_seconds = 0.05
    replies: list[str] = []

    def stay() -> None:
        with http_client(server) as http:
            replies.append(http.post(CHAT, json=BODY).json()["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=stay) for _ in range(4)]
    for thread in threads:
        thread.start()
    with raw_request(server, CHAT, {**BODY, "stream": True}) as connection:
        connection.recv(10)
    for thread in threads:
        thread.join()
    assert replies == [llm.reply] * 4


def test_load_counts_requests_under_way(server: ServerHandle, llm: FakeLLM) -> None:
    llm.prefill_seconds = 60
    assert load(server) == 0
    with raw_request(server, CHAT, BODY), raw_request(server, CHAT, {**BODY, "stream": True}):
        wait_until(lambda: load(server) == 2)
    wait_until(lambda: load(server) == 0)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_stop_ends_open_streams_with_an_error_event(
    server: ServerHandle, llm: FakeLLM, path: str, body: dict[str, Any]
) -> None:
    llm.token_seconds = 0.05
    llm.reply = "x" * 400
    received: list[str] = []

    def read() -> None:
        with http_client(server) as http:
            received.append(http.post(path, json={**body, "max_tokens": 400, "stream": True}).text)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: load(server) == 1)
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 15, "the stream alone would have taken 20 s"
    thread.join()
    chunks, _ = strict.events(received[0])
    assert chunks[-1]["error"]["code"] == 503
    assert "stopped" in chunks[-1]["error"]["message"]
    wait_until(lambda: all(stream.finished for stream in llm.submitted))


def test_a_stop_answers_plain_requests_under_way(server: ServerHandle, llm: FakeLLM) -> None:
    llm.prefill_seconds = 60
    answers: list[httpx.Response] = []

    def ask() -> None:
        with http_client(server) as http:
            answers.append(http.post(CHAT, json=BODY))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: load(server) == 1)
    server.stop()
    thread.join()
    strict.error(answers[0], 503, "ServiceUnavailableError")
    assert llm.aborted.is_set()


def test_a_stop_is_not_held_up_by_a_client_that_does_not_read(server: ServerHandle, llm: FakeLLM) -> None:
    llm.reply = "x" * 100
    llm.plan.max_model_len = 100_000
    body = {"prompt": "x" * 60_000, "echo": True, "n": 100, "max_tokens": 100, "stream": True}
    with raw_request(server, "/v1/completions", body):
        wait_until(lambda: load(server) == 1)
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 15
    assert not server.running


def test_many_streams_at_once_keep_their_texts_apart(server: ServerHandle, llm: FakeLLM) -> None:
    async def all_at_once() -> list[str]:
        headers = {"x-api-key": KEY}
        async with httpx.AsyncClient(base_url=server.base_url, headers=headers, timeout=60, trust_env=False) as http:
            bodies = [{"prompt": f"<{number}>", "echo": True, "stream": True} for number in range(16)]
            replies = await asyncio.gather(*(http.post("/completions", json=body) for body in bodies))
        return ["".join(c["choices"][0]["text"] for c in strict.events(reply.text)[0]) for reply in replies]

    assert asyncio.run(all_at_once()) == [f"<{number}>{llm.reply}" for number in range(16)]
