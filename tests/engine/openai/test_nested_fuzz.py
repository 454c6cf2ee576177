"""Right requests with one odd value at any depth: each is answered, none with a 500."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from fastapi import FastAPI

from engine.openai.app import create_app
from engine.openai.http.options import ServerOptions
from tests.engine.openai.fakes import FakeLLM
from tests.engine.openai.rich_requests import RICH, spoilt
from tests.engine.openai.test_fuzz import ask_all
from tests.nightly import size

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 5, 2**70, 0.5, 1e999, float("nan"), "", "x", "self", "\ud800", "a\u0000b"),
    *([], {}, [1], ["a"], [None], [[]], [{}], {"a": 1}, {"type": {}}, {"type": "text"}, [{"type": []}]),
)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    llm = FakeLLM(max_model_len=2048)
    llm.reasoning_parser, llm.tool_call_parser = "qwen3", "hermes"
    llm.reply = '<think>\nHm.\n</think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    return create_app(llm, ServerOptions(trust_request_chat_template=True, keep_alive_seconds=60))


def test_the_right_requests_are_right(app: FastAPI) -> None:
    assert asyncio.run(ask_all(app, list(RICH))) == [200] * len(RICH)


@pytest.mark.nightly
def test_one_odd_value_at_any_depth_is_never_an_internal_error(app: FastAPI) -> None:
    step = size(7, 1)
    drawn = [(path, one) for path, body in RICH for odd in ODD for one in spoilt(body, odd)]
    counts = Counter(asyncio.run(ask_all(app, drawn[::step])))
    assert len(drawn) > 10_000
    assert min(counts[200], counts[400]) > len(drawn) // step // 10
    assert set(counts) <= {200, 400, 404}


def test_what_a_leading_system_message_holds_beside_text_is_refused_not_dropped(app: FastAPI) -> None:
    text = {"type": "input_text", "text": "Be brief."}
    parts = [{"type": "input_image", "image_url": "data:,"}, {"type": "input_file", "file_data": "x"}, 5]
    bodies = [{"input": [{"role": "system", "content": [text, *more]}, {"role": "user", "content": "Hi"}]} for more in
              ([], *([part] for part in parts))]  # fmt: skip
    assert asyncio.run(ask_all(app, [("/v1/responses", body) for body in bodies])) == [200, 400, 400, 400]
