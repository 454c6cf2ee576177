"""Text, calls and thoughts keep the order in which the model wrote them: in three formats, plain and streamed."""

import json
from typing import Any

import httpx
import pytest

from tests.engine.openai import strict
from tests.engine.openai.fakes import FakeLLM

FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "%s"}}\n</tool_call>'
REPLY = f"<think>\nWhy?\n</think>\n\nFirst.\n{CALL % 'a'}\nThen.\n{CALL % 'b'}\nLast."
ORDER = ["thought Why?", "text First.", 'call {"at": "a"}', "text Then.", 'call {"at": "b"}', "text Last."]


@pytest.fixture(autouse=True)
def _talks_between_calls(llm: FakeLLM) -> None:
    llm.reasoning_parser, llm.tool_call_parser, llm.reply = "qwen3", "hermes", REPLY


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def named_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream of named events."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def joined(pieces: list[tuple[str, str]]) -> list[str]:
    """Neighbours of one kind as one text."""
    found: list[tuple[str, str]] = []
    for kind, text in pieces:
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + text)
        elif text:
            found.append((kind, text))
    return [f"{kind.split('#')[0]} {text.strip()}" for kind, text in found]


def test_chunks_of_a_chat_come_in_the_models_order(http: httpx.Client) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    body = {"messages": [{"role": "user", "content": "Go"}], "tools": tools}
    chunks, _ = strict.events(post(http, "/v1/chat/completions", stream=True, **body).text)
    pieces: list[tuple[str, str]] = []
    for delta in (choice["delta"] for chunk in chunks for choice in chunk["choices"]):
        pieces += [("thought", delta["reasoning"])] if "reasoning" in delta else []
        pieces += [("text", delta["content"])] if delta.get("content") else []
        pieces += [(f"call#{call['index']}", call["function"]["arguments"]) for call in delta.get("tool_calls", ())]
    assert joined(pieces) == ORDER
    message = post(http, "/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert message["content"].split() == ["First.", "Then.", "Last."]
    assert len(message["tool_calls"]) == 2


def response_items(items: list[dict[str, Any]]) -> list[str]:
    """Output items as words."""
    kinds = {"reasoning": "thought", "message": "text", "function_call": "call"}
    return [
        f"{kinds[item['type']]} {(item['arguments'] if 'arguments' in item else item['content'][0]['text']).strip()}"
        for item in items
    ]


def test_items_of_a_response_come_in_the_models_order(http: httpx.Client) -> None:
    body = {"input": "Go", "tools": [{"type": "function", **FUNCTION}]}
    plain = post(http, "/v1/responses", **body).json()
    assert response_items(plain["output"]) == ORDER
    events = named_events(post(http, "/v1/responses", stream=True, **body).text)
    assert response_items([e["item"] for e in events if e["type"] == "response.output_item.done"]) == ORDER
    assert response_items(events[-1]["response"]["output"]) == ORDER


def message_blocks(blocks: list[dict[str, Any]]) -> list[str]:
    """Content blocks as words."""
    kinds = {"thinking": "thought", "text": "text", "tool_use": "call"}
    texts = [str(block.get("thinking") or block.get("text") or "").strip() for block in blocks]
    inputs = [f'{{"at": "{block["input"]["at"]}"}}' if block["type"] == "tool_use" else "" for block in blocks]
    return [f"{kinds[block['type']]} {text or own}" for block, text, own in zip(blocks, texts, inputs, strict=True)]


def test_blocks_of_a_message_come_in_the_models_order(http: httpx.Client) -> None:
    tool = {"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}
    body = {"messages": [{"role": "user", "content": "Go"}], "tools": [tool], "max_tokens": 400}
    assert message_blocks(post(http, "/v1/messages", **body).json()["content"]) == ORDER
    events = named_events(post(http, "/v1/messages", stream=True, **body).text)
    kinds: dict[int, str] = {}
    pieces: list[tuple[str, str]] = []
    for event in events:
        if event["type"] == "content_block_start":
            kind = {"thinking": "thought", "text": "text", "tool_use": "call"}[event["content_block"]["type"]]
            kinds[event["index"]] = f"{kind}#{event['index']}"
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            text = delta.get("thinking") or delta.get("text") or delta.get("partial_json") or ""
            pieces.append((kinds[event["index"]], text))
    assert joined(pieces) == ORDER
