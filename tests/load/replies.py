"""A reply of any of the four APIs, whole or streamed, as what was said: the same for all."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.load.questions import CHAT, COMPLETIONS, MESSAGES, RESPONSES

GENERATING = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
_ENDS = {
    "max_tokens": "length", "end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls",
    "incomplete": "length", "completed": "stop",
}  # fmt: skip
"""How the APIs say what chat completions call ``length``, ``stop`` and ``tool_calls``."""


class BrokenReplyError(Exception):
    """A reply that is not what its API promises."""


@dataclass(frozen=True)
class Said:
    """The choices' texts, calls and ends. ``num_tokens`` are those written, None where it is not told."""

    texts: tuple[str, ...]
    calls: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()
    num_tokens: int | None = field(default=None, compare=False)
    logprobs: tuple[float, ...] = field(default=(), compare=False)
    token_ids: tuple[int, ...] = field(default=(), compare=False)
    prompt_token_ids: tuple[int, ...] = field(default=(), compare=False)


def whole(path: str, data: Mapping[str, Any]) -> Said:
    """What a whole reply says."""
    if path == CHAT:
        return _of_chat(data["choices"], data["usage"])
    if path == COMPLETIONS:
        return _of_completion(data["choices"], data["usage"])
    return _of_message(data) if path == MESSAGES else _of_response(data)


def streamed(path: str, events: Sequence[Mapping[str, Any]]) -> Said:
    """What the events of a stream say. Raises BrokenReplyError where the stream breaks off or says an error."""
    for event in events:
        if event.get("error"):
            raise BrokenReplyError(f"an error in the stream: {event['error']}")
    if path == CHAT:
        return _chat_stream(events)
    if path == COMPLETIONS:
        return _completion_stream(events)
    return _message_stream(events) if path == MESSAGES else _response_stream(events)


def is_first_token(path: str, event: Mapping[str, Any]) -> bool:
    """Whether an event of a stream carries something that the model wrote."""
    if path == CHAT:
        return any(
            choice["delta"].get("content") or choice["delta"].get("tool_calls") for choice in event.get("choices", [])
        )
    if path == COMPLETIONS:
        return any(choice["text"] or choice.get("finish_reason") for choice in event.get("choices", []))
    return str(event.get("type", "")).endswith(("_delta", ".delta"))


def same(one: Said, other: Said) -> bool:
    """Whether two replies say the same; log-probabilities may differ by rounding."""
    pairs = zip(one.logprobs, other.logprobs, strict=False)
    close = len(one.logprobs) == len(other.logprobs) and all(abs(a - b) < 1e-3 for a, b in pairs)
    return one == other and close


def _of_chat(choices: Iterable[Mapping[str, Any]], usage: Mapping[str, Any] | None) -> Said:
    texts, calls, ends, logprobs = [], [], [], []
    ids: list[int] = []
    for choice in choices:
        message = choice["message"]
        texts.append(message["content"] or "")
        calls += [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
        ends.append(choice["finish_reason"])
        logprobs += [entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or []]
        ids += choice.get("token_ids") or []
    number = None if usage is None else usage["completion_tokens"]
    return Said(tuple(texts), tuple(calls), tuple(ends), number, tuple(logprobs), tuple(ids))


def _of_completion(choices: Iterable[Mapping[str, Any]], usage: Mapping[str, Any] | None) -> Said:
    texts, ends, logprobs = [], [], []
    ids: list[int] = []
    prompt: list[int] = []
    for choice in choices:
        texts.append(choice["text"])
        ends.append(choice["finish_reason"])
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        logprobs += [value for value in told if value is not None]
        ids += choice.get("token_ids") or []
        prompt = choice.get("prompt_token_ids") or []
    number = None if usage is None else usage["completion_tokens"]
    return Said(tuple(texts), (), tuple(ends), number, tuple(logprobs), tuple(ids), tuple(prompt))


def _of_message(data: Mapping[str, Any]) -> Said:
    text = "".join(block["text"] for block in data["content"] if block["type"] == "text")
    calls = [(b["name"], json.dumps(b["input"])) for b in data["content"] if b["type"] == "tool_use"]
    end = _ENDS[data["stop_reason"]]
    return Said((text,), _plain_calls(calls), (end,), data["usage"]["output_tokens"])


def _of_response(data: Mapping[str, Any]) -> Said:
    parts = [part for item in data["output"] if item["type"] == "message" for part in item["content"]]
    calls = [(item["name"], item["arguments"]) for item in data["output"] if item["type"] == "function_call"]
    if data["status"] not in _ENDS:
        raise BrokenReplyError(f"a response that is {data['status']}: {data.get('error')}")
    end = "tool_calls" if calls else _ENDS[data["status"]]
    text = "".join(part["text"] for part in parts)
    return Said((text,), _plain_calls(calls), (end,), data["usage"]["output_tokens"])


def _chat_stream(events: Sequence[Mapping[str, Any]]) -> Said:
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            known = choices.setdefault(
                choice["index"],
                {"message": {"content": "", "tool_calls": []}, "finish_reason": None, "logprobs": {"content": []}},
            )
            delta = choice["delta"]
            known["message"]["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                _extend(known["message"]["tool_calls"], call)
            known["finish_reason"] = choice.get("finish_reason") or known["finish_reason"]
            known["logprobs"]["content"] += (choice.get("logprobs") or {}).get("content") or []
    return _of_chat([choices[index] for index in sorted(choices)], _usage(events))


def _extend(calls: list[dict[str, Any]], delta: Mapping[str, Any]) -> None:
    if delta["index"] == len(calls):
        calls.append({"function": {"name": "", "arguments": ""}})
    function = calls[delta["index"]]["function"]
    for name in ("name", "arguments"):
        function[name] += delta["function"].get(name) or ""


def _completion_stream(events: Sequence[Mapping[str, Any]]) -> Said:
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            known = choices.setdefault(
                choice["index"], {"text": "", "finish_reason": None, "logprobs": {"token_logprobs": []}}
            )
            known["text"] += choice["text"]
            known["finish_reason"] = choice.get("finish_reason") or known["finish_reason"]
            known["logprobs"]["token_logprobs"] += (choice.get("logprobs") or {}).get("token_logprobs") or []
    return _of_completion([choices[index] for index in sorted(choices)], _usage(events))


def _usage(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((event["usage"] for event in reversed(events) if event.get("usage")), None)


def _message_stream(events: Sequence[Mapping[str, Any]]) -> Said:
    if not events or events[-1]["type"] != "message_stop":
        raise BrokenReplyError("the stream ends without message_stop")
    blocks: list[dict[str, Any]] = []
    ended: Mapping[str, Any] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta":
                blocks[-1]["text"] += delta["text"]
            else:
                blocks[-1]["json"] += delta["partial_json"]
        elif event["type"] == "message_delta":
            ended = event
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"])
    return _of_message({"content": blocks, "stop_reason": ended["delta"]["stop_reason"], "usage": ended["usage"]})


def _response_stream(events: Sequence[Mapping[str, Any]]) -> Said:
    if not events or events[-1]["type"] not in ("response.completed", "response.incomplete"):
        raise BrokenReplyError(f"the stream ends with {events[-1] if events else 'nothing'}")
    said = _of_response(events[-1]["response"])
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    if text != said.texts[0]:
        raise BrokenReplyError(f"the deltas say {text!r}, the response at the end {said.texts[0]!r}")
    return said


def _plain_calls(calls: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, json.dumps(json.loads(arguments))) for name, arguments in calls)
