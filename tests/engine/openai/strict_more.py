"""Strict validation of the Responses and Messages APIs against the ``openai`` and ``anthropic`` packages' types."""

import json
from typing import Any

import anthropic.types
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

MISSING = {"store", "presence_penalty", "frequency_penalty"}
"""Fields that OpenAI sends and its types forget."""
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
_MESSAGE = TypeAdapter(anthropic.types.Message)
_RESPONSE = TypeAdapter(Response)


def response(data: dict[str, Any]) -> dict[str, Any]:
    _RESPONSE.validate_json(json.dumps(data), strict=True)
    assert set(data) <= Response.model_fields.keys() | MISSING
    return data


def message(data: dict[str, Any]) -> dict[str, Any]:
    _MESSAGE.validate_json(json.dumps(data), strict=True)
    assert set(data) <= anthropic.types.Message.model_fields.keys()
    return data


def named_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream whose blocks are ``event: NAME`` and ``data: JSON`` with that type."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def response_events(text: str) -> list[dict[str, Any]]:
    events = named_events(text)
    for event in events:
        _EVENT.validate_json(json.dumps(event), strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def message_events(text: str) -> list[dict[str, Any]]:
    events = named_events(text)
    for event in events:
        if event["type"] not in ("ping", "error"):
            _MESSAGE_EVENT.validate_json(json.dumps(event), strict=True)
    return events
