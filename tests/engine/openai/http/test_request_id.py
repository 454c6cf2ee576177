"""Which request a line of the port's log is about, and what its client can find it by."""

import contextvars
import logging
from typing import Any

import httpx
import pytest

from engine.openai.http.request_id import RequestLogger, begin_request
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM

NAMED = {"X-Request-Id": "mine-7"}


@pytest.fixture
def lines(serve: Serve) -> Any:
    """Sends a completion and gives what the port then logged, with the response."""

    def send(headers: dict[str, str], **body: Any) -> tuple[httpx.Response, list[str]]:
        server = serve(enable_log_requests=True, enable_request_id_headers=True)
        with http_client(server) as http:
            response = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, **body}, headers=headers)
        server.stop()
        return response, server.log_lines

    return send


def test_every_line_about_a_request_ends_with_its_clients_id(lines: Any) -> None:
    response, logged = lines(NAMED, no_such_field=1)
    assert response.headers["x-request-id"] == "mine-7"
    about = [line for line in logged if "no_such_field" in line or "POST /v1/completions 200" in line]
    assert len(about) == 2
    assert all(line.endswith(" (request mine-7)") for line in about)


def test_a_failure_of_ours_is_logged_and_answered_with_the_id(
    lines: Any, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "submit", None)
    response, logged = lines(NAMED)
    assert (response.status_code, response.headers.get_list("x-request-id")) == (500, ["mine-7"])
    assert any("request failed (request mine-7)\nTraceback" in line for line in logged)


def test_an_id_made_here_is_in_the_header_the_reply_the_engines_id_and_the_log(lines: Any, llm: FakeLLM) -> None:
    response, logged = lines({})
    made = response.headers["x-request-id"]
    assert response.json()["id"] == f"cmpl-{made}" == llm.submitted[-1].request_id
    assert any(line.endswith(f"(request {made})") for line in logged)


def test_an_id_in_the_body_names_the_request_where_there_is_no_header(lines: Any, llm: FakeLLM) -> None:
    response, logged = lines({}, request_id="from-the-body")
    assert response.headers["x-request-id"] == "from-the-body"
    assert llm.submitted[-1].request_id.startswith("cmpl-from-the-body-")
    assert any("POST" in line and line.endswith("(request from-the-body)") for line in logged)
    response, _ = lines(NAMED, request_id="from-the-body")
    assert response.headers["x-request-id"] == "mine-7"


def test_an_id_cannot_write_lines_of_its_own_and_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    logger = RequestLogger(logging.getLogger("engine.openai"), {})

    def log() -> None:
        begin_request({"type": "http", "headers": [(b"x-request-id", b"a%s\nERROR (b) \xe9" + b"x" * 500)]})
        logger.info("%d lines", 1)
        logger.info("no values")

    with caplog.at_level(logging.INFO, "engine.openai"):
        contextvars.copy_context().run(log)
        logger.info("about nobody")
    shown = "a_s_ERROR__b___" + "x" * 113
    assert caplog.messages == [f"1 lines (request {shown})", f"no values (request {shown})", "about nobody"]
