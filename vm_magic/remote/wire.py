"""OpenAI's wire format: request bodies out, server-sent events in. No sockets here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.chat.reply import ParsedCompletionDelta
from engine.outputs import THINKING_CUTS, Logprob, LogprobsAtPosition, RequestOutput, Usage

if TYPE_CHECKING:
    from engine.text.parse.output_parser import ParsedDelta

NO_ID = -1
"""Stands for a token whose id the server does not send; alternatives have -2, -3 and so on."""


@dataclass(slots=True)
class RemoteOutput(RequestOutput):
    """A :class:`RequestOutput` whose counts come from the server: it knows the prompt's tokens, this side does not."""

    usage: Usage = field(default_factory=Usage)

    def counted(self, num_reasoning_tokens: int) -> Usage:
        """The usage with the thought's tokens as counted here, for servers that do not report them."""
        return replace(self.usage, reasoning_tokens=num_reasoning_tokens)


@dataclass
class EventReader:
    """Takes a stream's lines; gives the JSON of each event. ``done`` after ``[DONE]``."""

    done: bool = False
    _data: list[str] = field(default_factory=list)

    def feed(self, line: str) -> Any:
        """The event that ``line`` ends, or None. Raises ValueError for data that is not JSON."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
            return None
        if line.strip() or not self._data:
            return None
        return self.close()

    def close(self) -> Any:
        """The event under way when the stream ends."""
        data, self._data = "\n".join(self._data).strip(), []
        if data == "[DONE]":
            self.done = True
            return None
        try:
            return json.loads(data) if data else None
        except RecursionError:
            raise ValueError("an event that is nested too deeply") from None


def request_body(model: str, sampling: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """Fields common to both routes; sampling values under the names of the route, those of vLLM beside OpenAI's."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    for name, value in sampling.items():
        if name == "logprobs" and chat:
            body |= {"logprobs": True, "top_logprobs": value}
        elif name == "logit_bias":
            body[name] = {str(token): bias for token, bias in value.items()}
        elif is_dataclass(value):  # structured_outputs and the like: what is set of them
            set_fields = ((field.name, getattr(value, field.name)) for field in fields(value))
            body[name] = {field: one for field, one in set_fields if one not in (None, False)}
        else:
            body[name] = list(value) if isinstance(value, tuple) else value
    return body


def response_format(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """OpenAI's ``response_format`` for a JSON schema, or True for any JSON object."""
    if schema is True:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}


def sent_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without our own fields: earlier thoughts go back under the name that vLLM reads.

    Servers refuse a conversation with arguments that are not a JSON object; such a text goes inside one.
    """
    sent = {name: value for name, value in message.items() if name != "reasoning"}
    if message.get("reasoning"):
        sent["reasoning_content"] = message["reasoning"]
    if message.get("tool_calls"):
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _sent_arguments(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return sent


def _sent_arguments(written: str) -> str:
    try:
        if isinstance(json.loads(written or "{}"), dict):
            return written or "{}"
    except (ValueError, RecursionError):
        pass
    return json.dumps({"arguments": written}, ensure_ascii=False) if written.strip() else "{}"


def read_chat_choice(choice: Mapping[str, Any]) -> ParsedCompletionDelta:
    """One choice of a chat chunk. The thought may be called ``reasoning`` or ``reasoning_content``."""
    from engine.text.parse.output_parser import ParsedDelta, ToolCallDelta

    delta = choice.get("delta") or {}
    content = delta.get("content") or ""
    reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
    calls = [
        ToolCallDelta(
            int(call.get("index") or 0),
            call.get("id"),
            (call.get("function") or {}).get("name") or None,
            (call.get("function") or {}).get("arguments") or "",
        )
        for call in delta.get("tool_calls") or ()
    ]
    parsed = ParsedDelta.of(_text(reasoning), _text(content), calls)
    return _delta(choice, parsed.content, bool(parsed), parsed)


def read_text_choice(choice: Mapping[str, Any]) -> ParsedCompletionDelta:
    """One choice of a plain completion's chunk."""
    text = choice.get("text") or ""
    return _delta(choice, text, bool(text), None)


def _delta(choice: Mapping[str, Any], text: str, news: bool, parsed: "ParsedDelta | None") -> ParsedCompletionDelta:
    logprobs, cut = read_logprobs(choice.get("logprobs")), str(choice.get("thinking_cut"))
    count = len(logprobs) if logprobs else int(news)  # servers send a chunk per token, unless they report otherwise
    return ParsedCompletionDelta(
        int(choice.get("index") or 0),
        text,
        [NO_ID] * count,
        logprobs,
        choice.get("finish_reason"),
        choice.get("stop_reason"),
        cut if cut in THINKING_CUTS else None,
        parsed=parsed,
    )


def read_logprobs(value: Mapping[str, Any] | None) -> list[LogprobsAtPosition] | None:
    """A chat's ``logprobs.content``, or a completion's ``tokens`` and ``top_logprobs``; None where there are none."""
    if not value:
        return None
    if value.get("content") is not None:
        return [
            _position(
                one["token"], one["logprob"], [(top["token"], top["logprob"]) for top in one["top_logprobs"] or ()]
            )
            for one in value["content"]
        ]
    tokens, chosen = value.get("tokens") or (), value.get("token_logprobs") or ()
    tops: Sequence[Mapping[str, float] | None] = value.get("top_logprobs") or [None] * len(tokens)
    return [
        _position(token, logprob, list((top or {}).items()))
        for token, logprob, top in zip(tokens, chosen, tops, strict=False)
        if logprob is not None
    ]


def _position(token: str, logprob: float, tops: Iterable[tuple[str, float]]) -> LogprobsAtPosition:
    ranked = sorted(tops, key=lambda one: -one[1])
    rank = next((i for i, (text, _) in enumerate(ranked, 1) if text == token), None)
    position = {NO_ID: Logprob(logprob, rank, token)}
    others = [(i, one) for i, one in enumerate(ranked, 1) if one[0] != token]
    position |= {NO_ID - 1 - n: Logprob(value, i, text) for n, (i, (text, value)) in enumerate(others)}
    return position


def read_usage(value: Mapping[str, Any]) -> Usage:
    """OpenAI's ``usage``."""
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (value.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return Usage(value.get("prompt_tokens") or 0, value.get("completion_tokens") or 0, cached, reasoning)


def _text(value: Any) -> str:
    """Text, also where a server sends a list of parts."""
    if isinstance(value, str):
        return value
    return "".join(str(part.get("text") or "") for part in value if isinstance(part, Mapping))
