"""What clients may hold of this process, with a key or without: files, time, memory, places in the queue."""

import contextlib
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError, GrammarError
from engine.openai.http import connections, http_metrics
from engine.openai.http.connections import default_max_connections
from engine.openai.http.ring_log import CAPACITY, LONGEST, RingLog
from engine.openai.server import ServerHandle, start_server
from engine.runtime.stream import RequestStream
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, Serve, http_client
from tests.engine.openai.fakes import FakeLLM

HEAD = f"Host: 127.0.0.1\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n".encode()
COMPLETIONS = "/v1/completions"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are looked at without a second between."""
    monkeypatch.setattr(connections, "TICK", 0.02)


@contextlib.contextmanager
def connected(server: ServerHandle, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as made:
        with contextlib.suppress(OSError):  # an answer may come before all is sent
            made.sendall(data)
        yield made


def all_of(made: socket.socket) -> bytes:
    """What comes until the port closes the connection."""
    return b"".join(iter(lambda: made.recv(65536), b""))


def answer(server: ServerHandle, data: bytes) -> tuple[int, str]:
    """Status and message of the last answer on a connection that the port then closes."""
    with connected(server, data) as made:
        head, _, body = all_of(made).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def get(path: str, version: str = "1.1", more: bytes = b"") -> bytes:
    return f"GET {path} HTTP/{version}\r\n".encode() + HEAD + more + b"\r\n"


def post(body: bytes, more: bytes = b"", path: str = COMPLETIONS) -> bytes:
    return f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n".encode() + HEAD + more + b"\r\n" + body


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def silent(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes requests and gives nothing."""
    monkeypatch.setattr(llm, "_generate", lambda stream, gone: None)


def test_connections_leave_the_kernel_most_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((1024, 256), (256, 64), (10, 16), (10**6, 2048), (resource.RLIM_INFINITY, 2048)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert default_max_connections() == most


def test_connections_that_wait_for_nothing_do_not_lock_others_out(serve: Serve) -> None:
    server = serve(max_connections=8)
    with contextlib.ExitStack() as stack:
        for number in range(40):
            stack.enter_context(connected(server, b"POST /v1/completions HTTP/1.1\r\nHo" if number % 2 else b""))
        with http_client(server) as http:
            assert http.get("/v1/models").status_code == 200
            app = server._server.config.app  # type: ignore[union-attr]
            until(lambda: len(app.state.connections) <= 8)  # type: ignore[union-attr]


def test_who_has_no_key_gives_way_before_who_has_one(serve: Serve) -> None:
    server = serve(max_connections=4)
    with http_client(server) as http, contextlib.ExitStack() as stack:
        assert http.get("/v1/models").status_code == 200
        before = http._transport._pool.connections  # type: ignore[attr-defined]
        for _ in range(20):
            stack.enter_context(connected(server))
        assert http.get("/v1/models").status_code == 200
        assert http._transport._pool.connections == before, "the connection that has the key stayed"  # type: ignore


def test_one_too_many_is_refused_in_words_where_all_others_work(
    serve: Serve, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent(llm, monkeypatch)
    server = serve(max_connections=2)
    with connected(server, post(b'{"prompt": "x"}')), connected(server, post(b'{"prompt": "x"}')):
        until(lambda: len(llm.submitted) == 2)
        status, message = answer(server, get("/v1/models"))
        assert (status, "--max-connections" in message) == (503, True)
    with http_client(server) as http:
        until(lambda: http.get("/health").status_code == 200)


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", post(b"x" * 9)[:-4]])
def test_a_request_that_does_not_come_is_answered_and_closed(serve: Serve, sent: bytes) -> None:
    status, _ = answer(serve(request_seconds=0.2), sent)
    assert status == 408


def test_a_body_that_follows_its_answer_is_not_awaited_for_ever(serve: Serve) -> None:
    server = serve(request_seconds=0.2)
    with connected(server, b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx") as made:
        assert all_of(made).count(b"HTTP/1.1 401") == 1


def test_a_client_that_never_reads_is_dropped_and_its_request_ends(serve: Serve, llm: FakeLLM) -> None:
    llm.reply = "x" * 40_000
    llm.plan.max_model_len = 50_000  # type: ignore[misc]
    server = serve(stalled_seconds=0.2)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with made:
        made.connect(("127.0.0.1", server.port))
        made.sendall(post(b'{"prompt": "x", "stream": true, "n": 8, "logprobs": 5, "max_tokens": 40000}'))
        assert llm.aborted.wait(30)
    assert any("reads nothing" in line for line in server.log_lines)


def test_methods_and_paths_that_clients_invent_do_not_stay_in_the_metrics(serve: Serve) -> None:
    server = serve()
    with http_client(server) as http, httpx.Client(base_url=str(http.base_url), trust_env=False) as bare:
        for client in (bare, http):
            for number in range(30):
                client.request(f"MAKE{number}", f"/v1/x{number}")
        text = http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("http_requests_total")]
    assert len(lines) < 5
    assert 'method="other"' in text
    assert "MAKE" not in text
    assert "/v1/x" not in text


def test_log_lines_are_bounded_and_begin_no_lines_of_their_own() -> None:
    log = RingLog(("engine.openai.test",))
    log.attach()
    logger = logging.getLogger("engine.openai.test")
    logger.warning("a %s", "b\nc\x1b[31m" + "x" * 10**6)
    try:
        raise ValueError("y" * 10**6)
    except ValueError:
        logger.exception("failed")
    log.detach()
    first, second = log.lines
    assert "\n" not in first
    assert "\x1b" not in first
    assert "Traceback" in second
    assert max(map(len, log.lines)) < LONGEST + 10
    assert CAPACITY * LONGEST < 20e6


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (post(b"\x1f\x8bx", b"Content-Encoding: gzip\r\n"), 415, "'gzip' is not supported"),
        (get("/" + "a" * 9000), 414, "longer than"),
        (get("/" + "a" * 200_000), 414, "too long"),
        (get("/health", more=b"".join(b"X-%d: a\r\n" % n for n in range(300))), 431, "headers"),
        (get("/health", more=b"X: " + b"a" * 300_000 + b"\r\n"), 431, "too long"),
        (post(b"abc", b"Content-Length: 4\r\n"), 400, "conflicting Content-Length"),
        (get("/health", more=b"Content-Length: -1\r\n"), 400, "Content-Length"),
        (get("/health", more=b"Transfer-Encoding: gzip\r\n"), 501, "chunked"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "illegal request line"),
        (b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "chunk"),
        (b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999\r\n\r\n" + b"x" * 9999, 413, "longer than"),
        (
            b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"400\r\n" + b"x" * 0x400 + b"\r\n" for _ in range(2000)),
            413,
            "longer than",
        ),
        (b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999\r\nExpect: 100-continue\r\n\r\n", 413, "than"),
    ],
)  # fmt: skip
def test_what_is_no_good_http_gets_one_clear_answer_and_is_closed(
    serve: Serve, data: bytes, status: int, words: str
) -> None:
    server = serve(max_body_bytes=5000)
    found, message = answer(server, data)
    assert (found, words in message) == (status, True), message
    assert not [line for line in server.log_lines if "Traceback" in line]


def test_what_is_good_http_is_served_however_it_is_written(serve: Serve) -> None:
    server = serve()
    with connected(server, get("/health") + get("/version") + get("/version", "1.0")) as made:
        assert all_of(made).count(b"HTTP/1.1 200 OK") == 3
    body = b'{"prompt": "Hi"}'
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\n" + HEAD
    for data in (
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        post(body, b"Expect: 100-continue\r\nConnection: close\r\n"),
    ):
        with connected(server, data) as made:
            assert b"HTTP/1.1 200 OK" in all_of(made)


def test_a_connection_serves_on_after_a_failure(serve: Serve, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(llm, "submit", broken)
    data = post(b'{"prompt": "x"}') + get("/health", more=b"Connection: close\r\n")
    with connected(serve(enable_request_id_headers=True), data) as made:
        text = all_of(made).lower()
    assert text.count(b"http/1.1 500") == text.count(b"http/1.1 200") == 1
    assert text.count(b"x-request-id") == 2


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": ' + DEEP, "nested too deeply"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b', "prompt": "x"}', "limit"),
        (b'{"prompt"', "not valid JSON"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(server: ServerHandle, body: bytes, words: str) -> None:
    with http_client(server) as http:
        response = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert words in strict.error(response, 400, "BadRequestError")


BODIES: list[tuple[str, Any]] = [
    (COMPLETIONS, {"prompt": [-1] * 50_000}),
    (COMPLETIONS, {"prompt": "x", "stop": [1] * 50_000, "logit_bias": {str(n): "a" for n in range(50_000)}}),
    ("/v1/chat/completions", {"messages": [1] * 50_000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": ["a"] * 50_000}),
    ("/v1/responses", {"input": [1] * 50_000, "metadata": {str(n): n for n in range(50_000)}}),
    ("/v1/messages", {"messages": [1] * 50_000, "max_tokens": 1}),
    ("/detokenize", {"tokens": ["a"] * 50_000}),
    (COMPLETIONS, {"prompt": "x", "model": "\x1b[31m\n" + "m" * 10**6}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"x" * 10**6: 1}}),
    ("/v1/" + "a" * 4000, {}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_errors_are_short_whatever_they_quote_and_cost_no_more_than_their_body(
    server: ServerHandle, path: str, body: Any
) -> None:
    with http_client(server) as http:
        response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert len(response.content) < 4000
    message = response.json()["error"]["message"]
    assert message.isprintable()


def test_ids_of_clients_are_bounded_and_clean_wherever_they_go(serve: Serve, llm: FakeLLM) -> None:
    server = serve(enable_request_id_headers=True)
    with http_client(server) as http:
        body = {"prompt": "x", "request_id": "a\r\nb: c\x1b" + "d" * 1000}
        made = http.post(COMPLETIONS, json=body).json()["id"]
        assert made == "cmpl-a__b:_c_" + "d" * (128 - 8)
        assert all(len(given["request_id"]) < 200 for given in llm.options)
        shown = http.get("/health", headers={"X-Request-Id": "e" * 1000}).headers["x-request-id"]
        assert shown == "e" * 128


def test_a_full_queue_is_said_at_once_and_has_room_again(
    serve: Serve, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent(llm, monkeypatch)
    server = serve(max_num_queued_reqs=5)
    with http_client(server) as http:
        assert all(http.post("/v1/responses", json={"input": "x", "background": True}).is_success for _ in range(4))
        prepared = len(llm.prepared)
        for path, body in (
            (COMPLETIONS, {"prompt": ["a", "b"]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        ):
            response = http.post(path, json=body)
            assert "4 of at most 5" in strict.error(response, 503, "ServiceUnavailableError")
            assert response.headers["retry-after"]
        assert len(llm.prepared) == prepared, "who is refused costs little"
        end_all(llm.submitted)
        assert all(http.post("/v1/responses", json={"input": "x", "background": True}).is_success for _ in range(5))
        end_all(llm.submitted)


def end_all(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.end()


def test_prompts_that_wait_are_bounded_in_tokens_but_one_is_always_taken(
    serve: Serve, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent(llm, monkeypatch)
    server = serve(max_num_queued_tokens=50)
    with http_client(server) as http:
        background = {"background": True, "input": "x" * 100}
        assert http.post("/v1/responses", json=background).status_code == 200
        message = strict.error(http.post(COMPLETIONS, json={"prompt": "abc"}), 503, "ServiceUnavailableError")
        assert "at most 50" in message
        llm.submitted[0].metrics.first_token_time = 1.0  # it waits no more
        assert http.post("/v1/responses", json=background).status_code == 200
        end_all(llm.submitted)


def test_completions_of_one_request_are_bounded_by_name(serve: Serve, llm: FakeLLM) -> None:
    with http_client(serve(max_num_queued_reqs=100)) as http:
        response = http.post(COMPLETIONS, json={"prompt": ["x"] * 51, "n": 2})
        assert "102 completions in one request, at most 100" in strict.error(response, 400, "BadRequestError", "n")
        response = http.post(COMPLETIONS, json={"prompt": ["x"] * 101})
        strict.error(response, 400, "BadRequestError", "prompt")
        assert not llm.submitted


def test_a_request_of_the_port_is_known_as_one_and_no_salt_hides_it(http: httpx.Client, llm: FakeLLM) -> None:
    assert http.post(COMPLETIONS, json={"prompt": "x", "cache_salt": "\x00traceless"}).status_code == 200
    given = llm.options[-1]
    assert (given["served"], given["cache_salt"], given.get("traceless", False)) == (True, "\x00traceless", False)


def test_many_prompts_let_others_have_their_turn(serve: Serve, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(llm, monkeypatch)
    server, turns, submit = serve(), [], llm.submit

    def counted(*args: Any, **given: Any) -> RequestStream:
        stream = submit(*args, **given)
        stream.end()
        loop = server._loop
        assert loop is not None
        if threading.current_thread().name == "openai-port" and len(llm.submitted) % 50 == 0:
            loop.call_soon(lambda: turns.append(len(llm.submitted)))
        return stream

    monkeypatch.setattr(llm, "submit", counted)
    with http_client(server) as http:
        http.post(COMPLETIONS, json={"prompt": ["x"] * 500})
    assert len(llm.submitted) == 500
    assert max(turn % 50 for turn in turns) < 20, "each was soon followed by a turn of the loop"


def test_a_grammar_that_fails_while_it_runs_is_the_requests_fault(
    http: httpx.Client, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_generate", lambda stream, gone: stream.end(GrammarError("the grammar failed: too big")))
    response = http.post(COMPLETIONS, json={"prompt": "x"})
    assert "too big" in strict.error(response, 400, "BadRequestError", "structured_outputs")


def test_a_server_whose_thread_died_says_so_and_its_port_is_free(llm: FakeLLM) -> None:
    def die() -> None:
        raise SystemExit("died")

    server = start_server(llm, api_key=KEY)
    with connected(server, get("/health")[:20]) as made:
        assert server._loop is not None
        until(lambda: bool(server._server.server_state.connections))  # type: ignore[union-attr]
        server._loop.call_soon_threadsafe(die)
        with contextlib.suppress(ConnectionResetError):
            assert made.recv(1) == b""
    server._thread.join(20)
    assert not server.running
    assert repr(server).endswith("closed")
    assert any("the server thread failed" in line for line in server.log_lines)
    again = start_server(llm, api_key=KEY, port=server.port)
    with http_client(again) as http:
        assert http.get("/health").status_code == 200
    again.stop()
    server.stop()


def test_limits_have_ranges(llm: FakeLLM) -> None:
    for name in ("max_num_queued_reqs", "max_num_queued_tokens", "request_seconds", "stalled_seconds"):
        with pytest.raises(ConfigError, match="must be greater than 0"):
            start_server(llm, api_key=KEY, **{name: 0})
    with pytest.raises(TypeError, match="no such option of the port: max_conections"):
        start_server(llm, api_key=KEY, max_conections=3)


def test_known_methods_are_counted_by_name() -> None:
    metrics = http_metrics.HttpMetrics()
    metrics.observe("GET", 200, "/health", 0.1)
    assert b'method="GET"' in metrics.render()
