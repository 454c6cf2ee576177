"""Five thousand odd requests over ``/openapi.json``, in process: each is answered, none with a 500.

Bodies are drawn from the schemas that the port itself publishes: mostly right types, odd values, fields left
out, fields of other routes, and now and then any JSON at all.
"""

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.openai.app import create_app
from engine.openai.http.options import ServerOptions
from tests.engine.openai.fakes import FakeLLM

NUM_REQUESTS = 5000
BATCH = 50
FORMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/chat/completions/render": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "Hi"}]]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/completions/render": {"prompt": ["Hi", "you"]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""A right request for each route, to be spoilt."""
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 17, 2**31, 2**63, -(2**64), 0.5, 1e308, -1e-9, "", "a", "1", "ö🎉\u0000", "none"),
    *([], {}, [[]], [{}], ["a"], [1], [-1], [None], {"a": 1}, {"type": "text"}, {"type": "function"}, {"": None}),
    *(
        [{"role": "user", "content": "Hi"}],
        [{"role": "assistant"}],
        [{"role": 3}],
        [{"content": []}],
        [[{"role": "x"}]],
    ),
    *([{"type": "message", "role": "user", "content": "Hi"}], [{"type": "reasoning"}], [{"type": "function_call"}]),
    *([{"type": "function", "function": {"name": "f", "parameters": {}}}], [{"name": "f", "input_schema": {}}]),
    *([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}], "content": None}], {"type": "any"}),
    *([{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": [{"type": "text"}]}]),
    *([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": 3}]}], "required", "auto"),
    *({"effort": "none"}, {"format": {"type": "json_schema"}}, {"include_usage": True}, {"json": {"type": "object"}}),
    *({"regex": "("}, {"regex": "a", "json": "{"}, {"choice": []}, {"min_count": -1}, {"type": "enabled"}),
]


def names_of(schema: dict[str, Any], path: str) -> list[str]:
    """The fields of a route's body, after the port's own description."""
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])


@pytest.fixture(scope="module")
def llm() -> FakeLLM:
    made = FakeLLM(max_model_len=256)
    made.reasoning_parser, made.tool_call_parser = "qwen3", "hermes"
    made.reply = '<think>\nHm.\n</think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    return made


@pytest.fixture(scope="module")
def app(llm: FakeLLM) -> FastAPI:
    return create_app(llm, ServerOptions(trust_request_chat_template=True, keep_alive_seconds=60))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALUES = st.one_of(st.sampled_from(ODD), st.sampled_from(ODD), JSON)


def requests(names: dict[str, list[str]]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """Batches of a route and a body each: a right one with up to four fields spoilt, sometimes any JSON."""
    every = sorted({name for known in names.values() for name in known})

    def bodies(path: str) -> st.SearchStrategy[tuple[str, Any]]:
        fields = st.sampled_from(names[path] * 5 + every)
        spoilt = st.dictionaries(fields, VALUES, min_size=1, max_size=4)
        made = st.tuples(spoilt, st.booleans()).map(
            lambda drawn: {**FORMS[path], **drawn[0], **({"stream": True} if drawn[1] else {})}
        )
        return st.one_of(*[made] * 20, VALUES).map(lambda body: (path, body))

    return st.lists(st.sampled_from(sorted(FORMS)).flatmap(bodies), min_size=BATCH, max_size=BATCH)


async def ask(client: httpx.AsyncClient, path: str, body: Any) -> int:
    response = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    text = response.text
    assert response.status_code < 500, (path, body, text)
    assert "InternalServerError" not in text, (path, body, text)
    assert '"api_error"' not in text, (path, body, text)
    assert '"response.failed"' not in text, (path, body, text)
    if response.status_code >= 400:
        assert json.loads(text)["error"]["message"], (path, body)
    return response.status_code


async def ask_all(app: FastAPI, drawn: list[tuple[str, Any]]) -> list[int]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
        return [await ask(client, path, body) for path, body in drawn]


def test_no_odd_request_is_an_internal_error(app: FastAPI) -> None:
    schema = app.openapi()
    names = {path: names_of(schema, path) for path in FORMS}
    assert set(FORMS) == {path for path, item in schema["paths"].items() if "requestBody" in item.get("post", {})}
    counts: Counter[int] = Counter()

    @settings(
        max_examples=NUM_REQUESTS // BATCH, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
    )  # fmt: skip
    @given(requests(names))
    def run(drawn: list[tuple[str, Any]]) -> None:
        counts.update(asyncio.run(ask_all(app, drawn)))

    run()
    assert sum(counts.values()) >= NUM_REQUESTS
    assert counts[200] > NUM_REQUESTS // 10
    assert counts[400] > NUM_REQUESTS // 10
    assert set(counts) <= {200, 400, 404}
