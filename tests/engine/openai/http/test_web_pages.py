"""What a web page in the user's browser can send to the port without being asked, and where keys never stand."""

import logging

import httpx
import pytest

from engine.openai.http.options import ServerOptions
from engine.openai.server import ServerHandle
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, Serve, http_client

FOREIGN = "http://evil.example"


@pytest.fixture
def open_port(serve: Serve) -> ServerHandle:
    """A port without a key: nothing but the browser's headers tells a page from a program."""
    return serve(api_key=None, no_api_key=True)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_a_form_or_a_simple_request_of_a_foreign_page_does_nothing(open_port: ServerHandle, kind: str) -> None:
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
    with http_client(open_port) as http:
        for origin in (FOREIGN, "null"):  # null: a sandboxed frame, a file, a redirect
            headers = {
                "Origin": origin,
                "Content-Type": kind,
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "no-cors",
            }
            strict.error(http.post("/v1/chat/completions", content=body, headers=headers), 403, "Forbidden")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_an_image_or_a_script_that_a_foreign_page_names_is_refused(open_port: ServerHandle, site: str) -> None:
    with http_client(open_port) as http:
        for dest in ("image", "script", "iframe", "empty"):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": dest}
            strict.error(http.get("/v1/models", headers=headers), 403, "Forbidden")


def test_a_link_that_a_person_follows_and_the_ports_own_page_are_served(open_port: ServerHandle) -> None:
    with http_client(open_port) as http:
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert http.get("/docs", headers=link).status_code == 200
        for site in ("same-origin", "none"):
            assert http.get("/openapi.json", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_no_websocket_is_opened_for_anyone(open_port: ServerHandle) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    with http_client(open_port) as http:
        strict.error(http.get("/v1/chat/completions", headers={**upgrade, "Origin": FOREIGN}), 403, "Forbidden")
        assert http.get("/v1/models", headers=upgrade).status_code == 200  # plain HTTP, not switched


def test_no_page_may_read_an_answer_unless_its_origin_was_allowed(open_port: ServerHandle) -> None:
    with http_client(open_port) as http:
        answers = [http.get("/v1/models", headers=headers) for headers in ({"Origin": FOREIGN}, {})]
        preflight = {"Origin": FOREIGN, "Access-Control-Request-Method": "POST"}
        answers.append(http.options("/v1/chat/completions", headers=preflight))
        assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)


def test_the_key_stands_in_no_answer_no_log_line_and_no_repr(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(enable_log_requests=True)
    said = [repr(server), repr(ServerOptions(api_keys=(KEY,)))]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with http_client(server) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/version", "/load", f"/{KEY[:3]}", "/health"):
            said.append(answer_text(http.get(path)))
        said.append(answer_text(http.post("/v1/chat/completions", json=chat)))
        said.append(answer_text(http.post("/v1/chat/completions", json={**chat, "temperature": "x"})))
        said.append(answer_text(http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}x"})))
    said += [*server.log_lines, caplog.text]
    assert not [text for text in said if KEY in text]


def answer_text(answer: httpx.Response) -> str:
    return f"{answer.headers}\n{answer.text}"
