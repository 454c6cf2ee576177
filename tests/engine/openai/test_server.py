"""The server's life: start, ports, stop, logs, and what it leaves behind."""

import gc
import io
import socket
import sys
import threading
import weakref
from contextlib import redirect_stderr, redirect_stdout

import httpx
import pytest

from engine.errors import ConfigError, ServerError
from engine.openai.server import start_server
from tests.engine.openai.conftest import KEY, Serve, http_client
from tests.engine.openai.fakes import FakeLLM


def taken_port() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_a_free_port_is_found_and_told(serve: Serve) -> None:
    server = serve()
    assert server.running
    assert server.port > 0
    assert server.base_url == f"http://127.0.0.1:{server.port}/v1"
    assert server.api_key == KEY


def test_a_taken_port_is_one_line_that_says_what_to_do(llm: FakeLLM) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} on 127.0.0.1 is in use: choose another with --port N"):
            start_server(llm, port=port, api_key=KEY)


def test_a_port_nobody_asked_for_moves_to_the_next_free_one(serve: Serve) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
        server = serve(port=port, port_is_default=True)
        assert port < server.port <= port + 100
        with http_client(server) as http:
            assert http.get("/health").status_code == 200


def test_a_server_that_cannot_take_over_leaves_the_running_one_alone(serve: Serve) -> None:
    first = serve()
    with taken_port() as listener, pytest.raises(ServerError, match="is in use"):
        serve(replaced=first, port=listener.getsockname()[1])
    with pytest.raises(ConfigError, match="--no-api-key"):
        serve(replaced=first, port=first.port, host="0.0.0.0", api_key=None, no_api_key=True)
    with pytest.raises(ServerError, match=r"Cannot listen on 203\.0\.113\.1"):
        serve(replaced=first, port=first.port, host="203.0.113.1")
    with http_client(first) as http:
        assert http.get("/health").status_code == 200


def test_a_server_takes_over_from_the_running_one_on_its_port_or_another(serve: Serve) -> None:
    first = serve()
    second = serve(replaced=first, port=first.port)
    third = serve(replaced=second)
    assert second.port == first.port != third.port
    assert [server.running for server in (first, second, third)] == [False, False, True]
    with http_client(third) as http:
        assert http.get("/health").status_code == 200


def test_a_stopped_handle_says_so_and_keeps_no_model() -> None:
    llm = FakeLLM()
    held = weakref.ref(llm)
    server = start_server(llm, api_key=KEY)
    assert repr(server) == f"fake at {server.base_url} (the key is in .api_key)"
    with http_client(server) as http:
        assert http.get("/v1/models").status_code == 200
    server.stop()
    del llm
    gc.collect()
    assert held() is None
    assert repr(server) == f"fake at {server.base_url}, closed"


def test_hosts_and_ports_that_cannot_be(llm: FakeLLM) -> None:
    with pytest.raises(ConfigError, match="--port 70000"):
        start_server(llm, port=70000)
    with pytest.raises(ServerError, match=r"Cannot listen on 203\.0\.113\.1:0"):
        start_server(llm, host="203.0.113.1")
    with pytest.raises(ServerError, match=r"Cannot listen on no\.such\.host\.invalid"):
        start_server(llm, host="no.such.host.invalid")
    with pytest.raises(ConfigError, match="--root-path"):
        start_server(llm, root_path="proxy")


def test_ipv6_loopback_works(serve: Serve) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = serve(host="::1")
    except ServerError as error:
        pytest.skip(str(error))
    assert server.base_url == f"http://[::1]:{server.port}/v1"
    with http_client(server) as http:
        assert http.get("/v1/models").status_code == 200


def test_stop_frees_the_port_and_the_thread_and_may_be_repeated(llm: FakeLLM, serve: Serve) -> None:
    server = serve()
    before = threading.active_count()
    client = http_client(server)
    assert client.get("/health").status_code == 200
    server.stop()
    server.stop()
    assert not server.running
    assert threading.active_count() == before - 1
    with pytest.raises(httpx.TransportError):
        client.get("/health")
    client.close()
    again = serve(port=server.port)
    assert again.port == server.port


def test_two_servers_stand_side_by_side(serve: Serve) -> None:
    first, second = serve(), serve()
    first.stop()
    with http_client(second) as http:
        assert http.get("/health").status_code == 200


def test_nothing_is_printed(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        monkeypatch.setattr(sys, "__stderr__", err)
        server = start_server(llm, api_key=KEY, enable_log_requests=True)
        with http_client(server) as http:
            http.get("/health")
            monkeypatch.setattr(llm, "submit", None)
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        server.stop()
    assert (out.getvalue(), err.getvalue()) == ("", "")
    assert any("Traceback" in line for line in server.log_lines)


def test_requests_are_logged_only_when_asked_for(serve: Serve) -> None:
    quiet, talkative = serve(), serve(enable_log_requests=True)
    with http_client(quiet) as http:
        http.get("/version")
    assert not any("/version" in line for line in quiet.log_lines)
    with http_client(talkative) as http:
        http.get("/version")
        http.get("/health")
    assert any("GET /version 200" in line for line in talkative.log_lines)


def test_request_id_headers_come_only_when_asked_for(serve: Serve) -> None:
    with http_client(serve()) as http:
        assert "x-request-id" not in http.get("/health").headers
    with http_client(serve(enable_request_id_headers=True)) as http:
        assert http.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
        assert len(http.get("/health").headers["x-request-id"]) == 32


def test_answers_are_not_held_back_by_nagles_algorithm(serve: Serve) -> None:
    server = serve()
    assert server._listener.proto == socket.IPPROTO_TCP
