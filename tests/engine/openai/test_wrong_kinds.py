"""Values of the wrong kind in what agents send are their error, or left out: never the server's."""

import base64
import hashlib
import time
from typing import Any

import httpx
import pytest

from engine.errors import RequestError
from engine.openai.schema.sealed_thought import unseal
from engine.text.guide.ascii_regex import ascii_regex
from engine.text.guide.json_schema import written_schema
from engine.text.template.system_messages import fold_system_messages
from tests.engine.openai.fakes import FakeLLM

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
TOOL: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}}
ODD: list[Any] = [["x"], {"a": 1}, 5, True]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_wrong_kind_is_no_error_of_the_servers(http: httpx.Client, llm: FakeLLM, odd: Any) -> None:
    llm.tool_call_parser = "hermes"
    spoken = {"model": "fake", "max_tokens": 5, "messages": [USER]}
    part = [{"role": "user", "content": [{"type": odd, "text": "x"}]}]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": odd}]}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": odd, "name": "f"}]}),
        ("/v1/responses", {"input": [{"type": odd, "role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": part}),
        ("/v1/chat/completions", {"messages": part}),
        ("/v1/messages", {**spoken, "context_management": {"edits": [odd, "clear_thinking_1"]}}),
        ("/v1/messages", {**spoken, "tools": [TOOL], "tool_choice": {"type": odd}}),
        ("/v1/messages", {**spoken, "tools": [TOOL], "tool_choice": {"type": "tool", "name": odd}}),
        ("/v1/messages", {**spoken, "messages": part}),
    ]
    for path, body in asked:
        assert http.post(path, json=body).status_code in (200, 400), (path, body)


def test_a_sealed_thought_that_somebody_made_up_is_none_of_ours(http: httpx.Client) -> None:
    data = b"\xff\xfe"
    sealed = "vm1." + base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:8] + data).decode()
    assert unseal(sealed) is None
    items = [{"type": "reasoning", "summary": [], "encrypted_content": sealed}, USER]
    assert http.post("/v1/responses", json={"input": items}).status_code == 200


def test_an_empty_system_message_adds_nothing_to_the_turn_beside_it() -> None:
    history = [USER, {"role": "assistant", "content": "Yes?"}, {"role": "system", "content": ""}, USER]
    folded, _ = fold_system_messages(history, "first")
    assert folded == [USER, history[1], USER]


def test_schemas_that_refer_to_one_another_take_no_long_time() -> None:
    near = {
        f"d{i}": {
            "type": "object",
            "properties": {f"p{i}": {}},
            "anyOf": [{"$ref": f"#/$defs/d{(i + j) % 60}"} for j in range(1, 21)],
        }
        for i in range(60)
    }
    before = time.process_time()
    written, _ = written_schema({"$defs": near, "$ref": "#/$defs/d0"})
    assert isinstance(written, dict)
    assert time.process_time() - before < 5, "a minute, where each looks through all others anew"
    row = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1500)} | {"d1500": {}}
    written, _ = written_schema({"$defs": row, "$ref": "#/$defs/d0"})
    assert isinstance(written, dict)
    assert len(written["$defs"]) == 1501
    many = {f"d{i}": {} for i in range(6000)}
    with pytest.raises(RequestError, match="too many schemas"):
        written_schema({"$defs": many, "allOf": [{"$ref": f"#/$defs/d{i}"} for i in range(6000)]})


def test_a_long_pattern_of_open_braces_takes_no_long_time() -> None:
    before = time.process_time()
    ascii_regex(r"\p{" * 40_000, anchored=True)
    assert time.process_time() - before < 1
