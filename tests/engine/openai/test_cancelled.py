"""Cancel in the panel, or ``llm.abort``, ends a client's request at once: no client of today asks again by itself."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from engine import LLM
from engine.openai.http.errors import ABORTED
from engine.openai.server import ServerHandle
from tests import scripted_model
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, http_client
from tests.engine.openai.fakes import FakeLLM

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, Any] = {"model": "scripted", "max_tokens": 400}


@pytest.fixture(scope="module")
def slow(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = tmp_path_factory.mktemp("scripted")
    scripted_model.write_scripted_model(folder, smollm2_gguf, "word " * 400, step_seconds=0.02)
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.2, served_model_name="scripted") as made:
        yield made


@pytest.fixture(scope="module")
def slow_server(slow: LLM) -> Iterator[ServerHandle]:
    handle = slow.serve(api_key=KEY)
    yield handle
    handle.stop()


@pytest.fixture
def asked(slow: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all requests that reach the engine."""
    ids: list[str] = []
    submit = slow.submit

    def counted(*args: Any, **options: Any) -> Any:
        ids.append(options["request_id"])
        return submit(*args, **options)

    monkeypatch.setattr(slow, "submit", counted)
    return ids


@pytest.fixture
def openai_client(slow_server: ServerHandle) -> Iterator[openai.OpenAI]:
    """With the retries that it comes with."""
    with openai.OpenAI(base_url=slow_server.base_url, api_key=KEY) as made:
        assert made.max_retries == 2
        yield made


@pytest.fixture
def anthropic_client(slow_server: ServerHandle) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=slow_server.base_url.removesuffix("/v1"), api_key=KEY) as made:
        assert made.max_retries == 2
        yield made


def cancelled(slow: LLM, ask: Callable[[], Any]) -> Exception:
    """What ``ask`` raises once its request was cancelled with its first tokens there."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        while not (running := [one for one in slow.activity().requests if one.num_output_tokens]):
            assert not answer.done(), answer.result()
            time.sleep(0.01)
        slow.abort(running[0].request_id)
        error = answer.exception(timeout=30)
    assert isinstance(error, Exception)
    while slow.activity().requests:  # those of a batch end with the one
        time.sleep(0.01)
    return error


OPENAI: dict[str, Callable[[openai.OpenAI], Any]] = {
    "chat": lambda client: client.chat.completions.create(messages=MESSAGES, **ASKED),
    "two choices": lambda client: client.chat.completions.create(messages=MESSAGES, n=2, **ASKED),
    "completion": lambda client: client.completions.create(prompt="Hi<|im_start|>assistant\n", **ASKED),
    "response": lambda client: client.responses.create(input="Hi", model="scripted", max_output_tokens=400),
    "batch": lambda client: client.post(
        "/chat/completions/batch", cast_to=httpx.Response, body={"messages": [MESSAGES, MESSAGES], **ASKED}
    ),
}


@pytest.mark.parametrize("door", OPENAI)
def test_openais_client_is_told_once(slow: LLM, openai_client: openai.OpenAI, asked: list[str], door: str) -> None:
    error = cancelled(slow, lambda: OPENAI[door](openai_client))
    assert isinstance(error, openai.APIStatusError)
    assert error.status_code == ABORTED
    assert "was cancelled where the model runs" in error.message
    assert len(asked) == (2 if door == "batch" else 1)


def test_anthropics_client_is_told_once(slow: LLM, anthropic_client: anthropic.Anthropic, asked: list[str]) -> None:
    error = cancelled(slow, lambda: anthropic_client.messages.create(messages=MESSAGES, **ASKED))
    assert isinstance(error, anthropic.APIStatusError)
    assert error.status_code == ABORTED
    assert "was cancelled where the model runs" in error.message
    assert len(asked) == 1


def test_streams_end_with_the_error(
    slow: LLM, openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, asked: list[str]
) -> None:
    read: list[Any] = []
    chat = cancelled(
        slow,
        lambda: read.extend(openai_client.chat.completions.create(messages=MESSAGES, stream=True, **ASKED)),
    )
    assert isinstance(chat, openai.APIError)
    assert "was cancelled" in chat.message
    messages = cancelled(
        slow, lambda: read.extend(anthropic_client.messages.create(messages=MESSAGES, stream=True, **ASKED))
    )
    assert isinstance(messages, anthropic.APIStatusError)
    assert "was cancelled" in str(messages.body)
    assert len(read) > 4, "what came before the end arrived"
    assert len(asked) == 2


def test_a_streamed_response_fails_with_a_code_that_agents_do_not_repeat(
    slow: LLM, openai_client: openai.OpenAI
) -> None:
    def ask() -> None:
        events = list(openai_client.responses.create(input="Hi", model="scripted", stream=True))
        assert events[-1].type == "response.failed"
        raise LookupError(events[-1].response.error)

    error = cancelled(slow, ask)
    assert error.args[0].code == "invalid_prompt"
    assert "was cancelled" in error.args[0].message


def test_what_stays_wrong_is_not_asked_again_and_a_port_that_closes_may_be(server: ServerHandle, llm: FakeLLM) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key=KEY) as client:
        llm.fail_after = 1
        with pytest.raises(openai.InternalServerError, match="out of luck"):
            client.chat.completions.create(model="fake", messages=MESSAGES)
        assert len(llm.submitted) == 1
        llm.closed = True
        with pytest.raises(openai.InternalServerError, match="load a model again"):
            client.chat.completions.create(model="fake", messages=MESSAGES)
    llm.closed, llm.fail_after, llm.token_seconds = False, None, 5
    with http_client(server) as http, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/v1/chat/completions", json={"messages": MESSAGES})
        while len(llm.submitted) < 2:
            time.sleep(0.01)
        server.stop()
        refused = answer.result()
    assert strict.error(refused, 503, "ServiceUnavailableError")
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers
