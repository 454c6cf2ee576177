"""Where prompts are made: short ones in the event loop, whatever else may take long in a thread."""

import threading
from typing import Any

import httpx
import pytest

from engine.chat.request import ChatRequest, PreparedRequest, PromptRequest
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM

LONG = "word " * 2000
SHORT_CHAT = [{"role": "user", "content": "Hi"}]


class WatchedLLM(FakeLLM):
    """Remembers which threads prepared requests."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1_000_000)
        self.threads: list[str] = []

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        self.threads.append(threading.current_thread().name)
        return super().prepare(request)


@pytest.fixture
def llm() -> WatchedLLM:
    return WatchedLLM()


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json={"model": "fake", **body})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SHORT_CHAT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 4}),
        ("/v1/completions", {"prompt": list(range(65, 91)) * 100, "max_tokens": 4}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": SHORT_CHAT, "max_tokens": 4}),
    ],
)
def test_a_short_prompt_waits_for_no_thread(serve: Serve, llm: WatchedLLM, path: str, body: dict[str, Any]) -> None:
    with http_client(serve()) as http:
        ask(http, path, body)
    assert set(llm.threads) == {"openai-port"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi", "name": LONG}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 1000}),
        ("/v1/chat/completions", {"messages": SHORT_CHAT, "chat_template_kwargs": {"extra": LONG}}),
        ("/v1/completions", {"prompt": LONG, "max_tokens": 4}),
        ("/v1/completions", {"prompt": ["Hi", *[""] * 200], "max_tokens": 4}),
        ("/v1/completions", {"prompt": [[65]] * 200, "max_tokens": 4}),
        ("/v1/completions", {"prompt": [65] * 10_000, "max_tokens": 4}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]}),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}], "max_tokens": 4},
        ),
    ],
)
def test_what_may_take_long_holds_up_no_other_client(
    serve: Serve, llm: WatchedLLM, path: str, body: dict[str, Any]
) -> None:
    with http_client(serve()) as http:
        ask(http, path, body)
    assert llm.threads
    assert "openai-port" not in llm.threads
