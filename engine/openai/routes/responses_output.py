"""A response under way: its object, and its events in the order that clients rely on.

Plain, streamed and background responses are all built here, so the final object is the same for each.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.openai.http.errors import RequestAbortedError, describe
from engine.openai.routes.responses_calls import CallItems, FunctionCall
from engine.openai.schema.responses_tools import Toolbox
from engine.openai.schema.sealed_thought import seal
from engine.openai.serving.generation import Job
from engine.text.parse.scan.output_sink import ContentDelta, ParsedDelta, ReasoningDelta, ToolCallDelta

JsonObject = dict[str, Any]
TERMINAL = ("completed", "incomplete", "failed", "cancelled")
_PART_TYPES = {"reasoning": "reasoning_text", "message": "output_text"}


class ResponseBuilder:
    """Turns deltas into items and events. ``response`` is the object as it stands now."""

    def __init__(self, response: JsonObject, calls: CallItems, *, seals_thoughts: bool = False) -> None:
        self.response = response
        self._calls = calls
        self._seals_thoughts = seals_thoughts
        self._open: JsonObject | None = None
        self._call_item: FunctionCall | None = None
        self._call_index = -1
        self._number = 0

    @property
    def toolbox(self) -> Toolbox:
        """The tools that the calls are read by."""
        return self._calls.toolbox

    @property
    def over(self) -> bool:
        """Whether the response has its final status."""
        return self.response["status"] in TERMINAL

    def queued(self) -> Iterator[JsonObject]:
        """The events before a background response runs."""
        yield self._snapshot("response.created")
        yield self._snapshot("response.queued")
        self.response["status"] = "in_progress"
        yield self._snapshot("response.in_progress")

    def started(self) -> Iterator[JsonObject]:
        """The events before any output."""
        yield self._snapshot("response.created")
        yield self._snapshot("response.in_progress")

    def feed(self, parsed: ParsedDelta, logprobs: Sequence[JsonObject] = ()) -> Iterator[JsonObject]:
        """The events of one delta; ``logprobs`` are those of its tokens, if asked for."""
        for event in parsed.events:
            match event:
                case ReasoningDelta(text):
                    yield from self._text("reasoning", text, ())
                case ContentDelta(text) if self._calls.written is not None:
                    yield from self._call(self._calls.written_call(text))
                case ContentDelta(text):
                    yield from self._text("message", text, logprobs)
                    logprobs = ()
                case ToolCallDelta():
                    yield from self._call(event)

    def finished(self, job: Job) -> Iterator[JsonObject]:
        """The last events of a response that the model ended, or that ran out of tokens."""
        status = "incomplete" if job.choices[0].reply.finish_reason == "length" else "completed"
        yield from self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        self._end(status, job)
        yield self._snapshot(f"response.{status}")

    def failed(self, error: Exception, job: Job) -> Iterator[JsonObject]:
        """The last event of a response that went wrong; what was written stays. Nothing if it was over."""
        if self.over:
            return
        yield from self._close("incomplete")
        # Agents (Codex) repeat what failed with any other code of OpenAI's, so that Cancel would want many clicks.
        code = "invalid_prompt" if isinstance(error, RequestAbortedError) else "server_error"
        self.response["error"] = {"code": code, "message": describe(error)["error"]["message"]}
        self._end("failed", job)
        yield self._snapshot("response.failed")

    def cancelled(self, job: Job) -> None:
        """End the response because somebody asked for it; there is no event for this. Nothing if it was over."""
        if self.over:
            return
        for _ in self._close("incomplete"):
            pass
        self._end("cancelled", job)

    def _end(self, status: str, job: Job) -> None:
        self.response["status"] = status
        self.response["usage"] = usage(job)

    def _text(self, kind: str, text: str, logprobs: Sequence[JsonObject]) -> Iterator[JsonObject]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._open_text(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: JsonObject = {"delta": text}
        if kind == "message":
            part["logprobs"].extend(logprobs)
            more["logprobs"] = list(logprobs)
        yield self._event(f"response.{_PART_TYPES[kind]}.delta", content_index=0, **more)

    def _open_text(self, kind: str) -> Iterator[JsonObject]:
        own: JsonObject = {"role": "assistant"} if kind == "message" else {"summary": []}
        item = {"id": f"{_ID_PREFIX[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **own}
        part: JsonObject = {"type": _PART_TYPES[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
        yield from self._open_item({**item, "content": []})
        yield self._event("response.content_part.added", content_index=0, part=_copy(part))
        assert self._open is not None
        self._open["content"].append(part)

    def _call(self, piece: ToolCallDelta) -> Iterator[JsonObject]:
        if piece.index != self._call_index:
            yield from self._close()
            self._call_index = piece.index
            self._call_item = self._calls.item(piece)
            yield from self._open_item(self._call_item.json)
        if self._call_item is not None and piece.arguments:
            yield from self._arguments(self._call_item, self._call_item.add(piece.arguments))

    def _arguments(self, call: FunctionCall, delta: str) -> Iterator[JsonObject]:
        if delta:
            yield self._event(f"response.{call.event}.delta", delta=delta)

    def _open_item(self, item: JsonObject) -> Iterator[JsonObject]:
        self._open = item
        self.response["output"].append(item)
        yield self._numbered("response.output_item.added", output_index=self._output_index, item=_copy(item))

    def _close(self, status: str = "completed") -> Iterator[JsonObject]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if self._call_item is not None and item is self._call_item.json:
            yield from self._arguments(self._call_item, self._call_item.finish())
            if self._call_item.event:
                yield self._event(f"response.{self._call_item.event}.done", **self._call_item.done())
        else:
            part = item["content"][0]
            text = {key: part[key] for key in ("text", "logprobs") if key in part}
            yield self._event(f"response.{part['type']}.done", content_index=0, **text)
            yield self._event("response.content_part.done", content_index=0, part=_copy(part))
            if item["type"] == "reasoning" and self._seals_thoughts:
                item["encrypted_content"] = seal(part["text"])
        yield self._numbered("response.output_item.done", output_index=self._output_index, item=_copy(item))
        self._open = None

    @property
    def _output_index(self) -> int:
        return len(self.response["output"]) - 1

    def _event(self, type: str, **fields: Any) -> JsonObject:
        assert self._open is not None
        return self._numbered(type, item_id=self._open["id"], output_index=self._output_index, **fields)

    def _snapshot(self, type: str) -> JsonObject:
        return self._numbered(type, response=_copy(self.response))

    def _numbered(self, type: str, **fields: Any) -> JsonObject:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **fields}


_ID_PREFIX = {"reasoning": "rs", "message": "msg"}


def usage(job: Job) -> JsonObject:
    """Token counts in the Responses API's form."""
    counts = job.chat_usage()
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }


def _copy(value: Any) -> Any:
    """A copy of JSON: an event must not change when its item grows."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
