"""The port as ``doctor`` finds it: answering, with another key, closed, silent."""

import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.checkup.port import check_port
from engine.checkup.subject import Model
from tests.engine.openai.conftest import Serve


def state(server: Any) -> str:
    (finding,) = check_port(Model("a/b", "folder, llama", False, 1, "", (), cast(Any, server), 0, 0))
    return finding.state


def test_the_port_is_asked_as_a_client_would(serve: Serve) -> None:
    server = serve()
    assert state(server) == "ok"
    real, server.api_key = server.api_key, "another"
    assert state(server) == "problem"
    server.api_key = real
    server.stop()
    assert state(server) == "problem"
    assert state(None) == "ok"


def test_a_port_that_accepts_and_says_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.checkup.port._PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = SimpleNamespace(base_url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1", api_key=None)
        assert state(server) == "problem"
