"""Strict validation against the ``openai`` package's own types, and the grammar of event streams."""

import json
from typing import Any

import httpx
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

VLLM_FIELDS = {
    *("stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs", "prompt_text"),
    *("reasoning", "reasoning_content"),
    *("root", "parent", "max_model_len", "permission"),
}
"""Fields that vLLM adds to OpenAI's types."""


def check(kind: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """``data`` is exactly of ``kind``: right JSON types, and nothing beyond vLLM's own fields."""
    model = TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    _check_extra(model)
    return data


def _check_extra(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert set(value.model_extra or {}) <= VLLM_FIELDS, (type(value).__name__, value.model_extra)
        for name in type(value).model_fields:
            _check_extra(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _check_extra(item)


def chat(data: dict[str, Any]) -> dict[str, Any]:
    return check(ChatCompletion, data)


def chat_chunk(data: dict[str, Any]) -> dict[str, Any]:
    return check(ChatCompletionChunk, data)


def completion(data: dict[str, Any]) -> dict[str, Any]:
    check(Completion, _without_null_logprobs(data))
    return data


def completion_chunk(data: dict[str, Any]) -> dict[str, Any]:
    """The package has one type for both and asks for a finish reason, which OpenAI sends as null on the way."""
    ended = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in data["choices"]]
    check(Completion, _without_null_logprobs({**data, "choices": ended}))
    return data


def _without_null_logprobs(data: dict[str, Any]) -> dict[str, Any]:
    """An echoed prompt's first token has null logprobs, as OpenAI sent them; the package's types forget it."""
    for choice in data["choices"]:
        logprobs = choice["logprobs"]
        if logprobs and logprobs["token_logprobs"][:1] == [None]:
            assert logprobs["top_logprobs"][0] is None
            trimmed = {name: values[1:] for name, values in logprobs.items()}
            return {**data, "choices": [{**choice, "logprobs": trimmed}]}
    return data


def model(data: dict[str, Any]) -> dict[str, Any]:
    return check(Model, data)


def error(response: httpx.Response, status: int, type: str, param: str | None = None) -> str:
    """The response is vLLM's error; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["param"], body["error"]["code"]) == (type, param, status)
    return str(body["error"]["message"])


def events(text: str) -> tuple[list[dict[str, Any]], int]:
    """The data of an event stream that ended properly, and its number of comments."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    comments = [block for block in blocks if block.startswith(":")]
    data = [block for block in blocks if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in data)
    return [json.loads(block.removeprefix("data: ")) for block in data], len(comments)
