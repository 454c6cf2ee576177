"""A message under way: content blocks, and their events (Anthropic's Messages API)."""

import json
from collections.abc import Iterator
from typing import Any

from engine.chat.reply import ReplyBuilder
from engine.openai.serving.generation import Job
from engine.text.parse.scan.output_sink import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta

JsonObject = dict[str, Any]
_CALLER = {"type": "direct"}
_DELTA_TYPES = {"thinking": "thinking_delta", "text": "text_delta"}


def message_object(job: Job, content: list[JsonObject]) -> JsonObject:
    """A message that has not ended yet."""
    return {
        "id": f"msg_{job.id.removeprefix('msg-')}",
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": {
            **usage(job),
            "cache_creation": {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 0},
            "inference_geo": None,
            "service_tier": "standard",
        },
    }


def ending(reply: ReplyBuilder) -> JsonObject:
    """Why the message ended, in Anthropic's words."""
    sequence = reply.stop_reason
    if reply.finish_reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if reply.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(sequence, str) and reply.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def usage(job: Job) -> JsonObject:
    """Token counts; cached prompt tokens are counted apart, as Anthropic does."""
    counts = job.chat_usage()
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": counts["completion_tokens_details"]["reasoning_tokens"]},
        "server_tool_use": None,
    }


class MessageEvents:
    """The events of a message's content, and ``blocks``: the content itself. One block is open at a time."""

    def __init__(self) -> None:
        self.blocks: list[JsonObject] = []
        self._kind: str | None = None
        self._call_index = -1
        self._arguments = ""

    def feed(self, parsed: ParsedDelta) -> Iterator[JsonObject]:
        """The events of one delta."""
        for event in parsed.events:
            match event:
                case ReasoningDelta(text):
                    yield from self._text("thinking", text, {"signature": ""})
                case ContentDelta(text):
                    yield from self._text("text", text, {"citations": None})
                case ToolCallDelta():
                    yield from self._call(event)

    def close(self) -> Iterator[JsonObject]:
        """End the open block, if there is one."""
        if self._kind is not None:
            if self._kind == "thinking":
                # Clients keep the signature with the thought; a local model has nothing to sign.
                yield self._delta({"type": "signature_delta", "signature": ""})
            elif self._kind == "tool_use":
                self.blocks[-1]["input"] = json.loads(self._arguments or "{}")
            yield {"type": "content_block_stop", "index": self._index}
        self._kind = None

    def _text(self, kind: str, text: str, more: JsonObject) -> Iterator[JsonObject]:
        if self._kind != kind:
            yield from self._open(kind, {kind: "", **more})
        self.blocks[-1][kind] += text
        yield self._delta({"type": _DELTA_TYPES[kind], kind: text})

    def _call(self, piece: ToolCallDelta) -> Iterator[JsonObject]:
        if piece.index != self._call_index:
            yield from self._open("tool_use", {"id": piece.id, "name": piece.name, "input": {}, "caller": _CALLER})
            self._call_index, self._arguments = piece.index, ""
        if piece.arguments:
            self._arguments += piece.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _open(self, kind: str, block: JsonObject) -> Iterator[JsonObject]:
        yield from self.close()
        self._kind = kind
        self.blocks.append({"type": kind, **block})
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(self.blocks[-1])}

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
