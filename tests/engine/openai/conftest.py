"""A server on a real socket before a fake engine, and clients for it."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from engine.openai.server import ServerHandle, start_server
from tests.engine.openai.fakes import FakeLLM

Serve = Callable[..., ServerHandle]
KEY = "sk-test"


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def serve(llm: FakeLLM) -> Iterator[Serve]:
    """Start servers; all are stopped afterwards and must leave no thread."""
    handles: list[ServerHandle] = []
    before = set(threading.enumerate())

    def start(**options: Any) -> ServerHandle:
        handles.append(start_server(llm, **{"api_key": KEY, **options}))
        return handles[-1]

    yield start
    for handle in handles:
        handle.stop()
    left = [t for t in set(threading.enumerate()) - before if not t.name.startswith("Thread-")]
    assert not left, left


@pytest.fixture
def server(serve: Serve) -> ServerHandle:
    return serve()


def http_client(server: ServerHandle, **options: Any) -> httpx.Client:
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    return httpx.Client(
        base_url=server.base_url.removesuffix("/v1"), headers=headers, timeout=60, trust_env=False, **options
    )


@pytest.fixture
def http(server: ServerHandle) -> Iterator[httpx.Client]:
    with http_client(server) as client:
        yield client


@pytest.fixture
def client(server: ServerHandle) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.base_url,
        api_key=server.api_key,
        max_retries=0,
        http_client=httpx.Client(timeout=60, trust_env=False),
    ) as made:
        yield made
