"""Damaged calls through every format: nothing raises, arguments are JSON, plain is streamed is by character.

Hundreds of calls of every form, with one or two random edits each, go through the parser and what the three routes make
of its deltas.
"""

import asyncio
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from engine.chat.reply import read_whole
from engine.chat.request import Account, PreparedRequest
from engine.openai.routes import chat, messages, responses
from engine.openai.routes.messages_output import ending, message_object
from engine.openai.routes.responses_calls import CallItems
from engine.openai.routes.responses_output import ResponseBuilder
from engine.openai.routes.responses_store import RunningResponse
from engine.openai.schema.protocol import ChatCompletionRequest, StreamOptions
from engine.openai.schema.responses_protocol import ResponsesRequest
from engine.openai.schema.responses_tools import Toolbox
from engine.openai.serving.generation import EventWriter, Job, JobEvents
from engine.openai.serving.logprobs import TokenNames
from engine.outputs import CompletionDelta, Reply
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from engine.text.parse.output_parser import OutputParser, make_output_parser
from engine.text.parse.tool_parsers import TOOL_PARSERS
from tests.engine.openai import strict, strict_more
from tests.engine.text.parse import damaged_calls

NUM_CALLS = 200
NUM_IN_FORMATS = 40
NUM_BY_CHARACTER = 12
"""Of these calls: those read by all formats, and those that come character by character there and are checked against
the client packages' types.
"""
KINDS = {"thinking": "thought", "text": "text", "tool_use": "call"}
ITEM_KINDS = {"reasoning": "thought", "message": "text", "function_call": "call"}
CHAT = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}])
Part = tuple[str, str]
"""A thought, a text or a call: what it is, and its text or arguments."""


def parser_of(name: str) -> OutputParser:
    return make_output_parser(
        reasoning_parser=damaged_calls.THOUGHTS.get(name),
        tool_call_parser=name,
        tools=damaged_calls.TOOLS,
        prompt_suffix="x",
        make_call_id=lambda index, _: f"call_{index}",
    )


class OneByOne(RequestStream):
    """Gives its deltas as to a client that keeps up."""

    def take(self) -> list[CompletionDelta]:
        return [self._deltas.popleft()] if self._deltas else []


async def events_of(job: Job, writer: EventWriter) -> list[dict[str, Any]]:
    """What a client reads."""
    found = [event async for some in JobEvents(job, writer) for event in some]
    return [
        json.loads(event.removeprefix(b"data: ")) if isinstance(event, bytes) else sendable(event) for event in found
    ]


def job_of(name: str, pieces: Sequence[str], reason: str) -> Job:
    """A reply of ``pieces`` that has come already."""
    params = SamplingParams(max_tokens=None)
    stream = OneByOne("x", None, [1], params, lambda: None)
    for place, piece in enumerate(pieces, 1):
        stream.put(CompletionDelta(0, piece, [7], finish_reason=reason if place == len(pieces) else None))
    stream.end()
    prompt = PreparedRequest(None, [1], params, account=Account(make_parser=lambda: parser_of(name)))
    return Job("id", "m", [prompt], [stream], TokenNames(str), str)


def joined(pieces: Sequence[tuple[str, Any, str]]) -> list[Part]:
    """Neighbours of one kind (and of one call) as one part."""
    groups = itertools.groupby(pieces, key=lambda piece: piece[:2])
    return [(kind, "".join(text for *_, text in group)) for (kind, _), group in groups]


def sendable(data: Any) -> Any:
    """``data`` as a client reads it: what cannot be sent as JSON raises."""
    return json.loads(json.dumps(data, ensure_ascii=False, allow_nan=False).encode())


async def chat_parts(job: Job) -> tuple[list[Part], dict[str, Any]]:
    """What the chunks say in order, and the plain choice."""
    body = CHAT
    pieces: list[tuple[str, Any, str]] = []
    ends = []
    for chunk in await events_of(job, chat._Chunks(job, body, "", StreamOptions(include_usage=False))):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            pieces += [("thought", None, delta["reasoning"])] if "reasoning" in delta else []
            pieces += [("text", None, delta["content"])] if delta.get("content") else []
            calls = delta.get("tool_calls", ())
            pieces += [("call", call["index"], call["function"]["arguments"]) for call in calls]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    choice = sendable(chat._response(job, body, [""]))["choices"][0]
    assert ends == [choice["finish_reason"]]
    parts, message = joined(pieces), choice["message"]
    assert [text for kind, text in parts if kind == "call"] == [
        call["function"]["arguments"] for call in message.get("tool_calls", ())
    ]
    assert "".join(text for kind, text in parts if kind == "text") == (message["content"] or "")
    assert "".join(text for kind, text in parts if kind == "thought") == message.get("reasoning", "")
    return parts, choice


async def message_parts(job: Job) -> tuple[list[Part], dict[str, Any]]:
    """What the events say in order, and the plain message."""
    made = messages._Events(job)
    pieces: list[tuple[str, Any, str]] = []
    opened: int | None = None
    for event in await events_of(job, made):
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert opened is None
                assert index == len({number for _, number, _ in pieces})
                opened, kind = index, KINDS[block["type"]]
                pieces.append((kind, index, ""))
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert index == opened
                text = delta.get("thinking") or delta.get("text") or delta.get("partial_json") or ""
                pieces.append((kind, index, text))
            case {"type": "content_block_stop", "index": index}:
                assert index == opened
                opened = None
    assert opened is None
    parts = joined(pieces)
    plain = sendable(message_object(job, made.blocks) | ending(job.choices[0].reply))
    assert [KINDS[block["type"]] for block in plain["content"]] == [kind for kind, _ in parts]
    for block, (_, text) in zip(plain["content"], parts, strict=True):
        assert block.get("thinking", block.get("text")) == text or block["input"] == json.loads(text or "{}")
    return parts, plain


async def response_parts(job: Job) -> tuple[list[Part], dict[str, Any]]:
    """What the events say in order, and the plain response."""
    body = ResponsesRequest(input="x")
    calls = CallItems(Toolbox())
    builder = ResponseBuilder(responses._response(body, job, calls), calls)
    running = RunningResponse(builder, job, [])
    events = await events_of(job, responses._Events(body, running))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    plain = sendable(running.builder.response)
    assert events[-1]["response"] == plain
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == plain["output"]
    texts = {"response.reasoning_text.delta", "response.output_text.delta", "response.function_call_arguments.delta"}
    told = [(event["output_index"], event["delta"]) for event in events if event["type"] in texts]
    parts = [
        (ITEM_KINDS[item["type"]], item["arguments"] if "arguments" in item else item["content"][0]["text"])
        for item in plain["output"]
    ]
    for number, (_, text) in enumerate(parts):
        assert "".join(delta for index, delta in told if index == number) == text
    return parts, plain


async def through_every_format(name: str, pieces: Sequence[str], reason: str, *, typed: bool = False) -> list[Part]:
    """The reply's parts, the same in every format, and how each ends; ``typed``: the packages' types agree."""
    parts, choice = await chat_parts(job_of(name, pieces, reason))
    of_message, message = await message_parts(job_of(name, pieces, reason))
    of_response, response = await response_parts(job_of(name, pieces, reason))
    assert of_message == of_response == parts
    if typed:
        strict.chat(chat._response(job_of(name, pieces, reason), CHAT, [""]) | {"choices": [choice]})
        strict_more.message(message)
        strict_more.response(response)
    calls = choice["message"].get("tool_calls", [])
    for call in calls:
        assert isinstance(json.loads(call["function"]["arguments"], parse_constant=pytest.fail), dict)
    called = [(call["id"], call["function"]["name"]) for call in calls]
    assert len({call_id for call_id, _ in called}) == len(called)
    assert [(block["id"], block["name"]) for block in message["content"] if block["type"] == "tool_use"] == called
    assert [(item["call_id"], item["name"]) for item in response["output"] if "call_id" in item] == called
    over = "length" if reason == "length" else "tool_calls" if calls else "stop"
    assert choice["finish_reason"] == over
    assert message["stop_reason"] == {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}[over]
    assert response["status"] == ("incomplete" if over == "length" else "completed")
    return parts


def damaged(name: str) -> list[tuple[str, list[str], str]]:
    """Text, its pieces and why it ended."""
    made = [damaged_calls.damaged(name, number) for number in range(NUM_CALLS)]
    return [(text, pieces, "length" if number % 3 == 0 else "stop") for number, (text, pieces) in enumerate(made)]


def test_calls_of_every_form_are_damaged() -> None:
    of_forms = {id(TOOL_PARSERS[name]) for name in damaged_calls.forms()}
    assert of_forms == {id(parser) for parser in TOOL_PARSERS.values()}


@pytest.mark.parametrize("name", damaged_calls.forms())
def test_undamaged_calls_are_read_as_they_were_meant(name: str) -> None:
    calls = [("Bash", {"command": "a\nb", "items": ["c]", 1]}), ("look_up", {}), ("Bash", {"count": -5})]
    reply = read_whole(parser_of(name), damaged_calls.write(name, calls), "stop")
    given = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.tool_calls]
    assert (given, reply.text) == (calls, "")


@pytest.mark.parametrize("name", damaged_calls.forms())
def test_a_damaged_call_is_the_same_however_it_comes(name: str) -> None:
    for text, pieces, reason in damaged(name):
        whole = read_whole(parser_of(name), text, reason)
        assert read_whole(parser_of(name), pieces, reason) == whole, text
        assert read_whole(parser_of(name), list(text), reason) == whole, text


@pytest.mark.parametrize("name", damaged_calls.forms())
def test_a_damaged_call_is_a_valid_reply_of_every_format(name: str) -> None:
    async def check() -> None:
        for number, (text, pieces, reason) in enumerate(damaged(name)[:NUM_IN_FORMATS]):
            whole = await through_every_format(name, [text], reason)
            assert await through_every_format(name, pieces, reason) == whole, text
            if number < NUM_BY_CHARACTER:
                assert await through_every_format(name, list(text), reason, typed=True) == whole, text

    asyncio.run(check())


def shown(reply: Reply) -> str:
    """All that a reader of the reply sees, keys and values of arguments included."""
    calls = [[call["function"]["name"], json.loads(call["function"]["arguments"])] for call in reply.tool_calls]
    return "\n".join([reply.reasoning or "", reply.text, json.dumps(calls, ensure_ascii=False)])


@pytest.mark.parametrize("name", damaged_calls.forms())
def test_no_word_of_a_damaged_call_is_lost(name: str) -> None:
    for text, _, _ in damaged(name):
        seen = shown(read_whole(parser_of(name), text, "stop"))
        for word in damaged_calls.WORDS:
            assert text.count(word) <= seen.count(word), (word, text, seen)
