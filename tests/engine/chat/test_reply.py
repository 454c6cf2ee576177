"""Deltas become a reply in one place, in the order in which they were written."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.reply import ParsedCompletionDelta, ReplyBuilder, read_whole
from engine.outputs import CompletionDelta, Logprob
from engine.text.parse.output_parser import OutputParser, make_output_parser
from engine.text.parse.scan.output_sink import ParsedDelta, ToolCallDelta

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": %d}}\n</tool_call>'
TEXT = f"<think>\nHm.\n</think>\n\nOne.{CALL % 1}Two.{CALL % 2}Three."


def parser() -> OutputParser:
    tools = [{"type": "function", "function": {"name": "f"}}]
    return make_output_parser(reasoning_parser="qwen3", tool_call_parser="hermes", tools=tools)


@given(st.lists(st.integers(0, len(TEXT)), max_size=8))
def test_a_reply_is_the_same_however_its_text_was_cut(places: list[int]) -> None:
    cuts = [0, *sorted(places), len(TEXT)]
    builder = ReplyBuilder(parser())
    deltas = [CompletionDelta(0, TEXT[a:b], [1]) for a, b in itertools.pairwise(cuts)]
    for delta in [*deltas, CompletionDelta(0, "", [], finish_reason="stop")]:
        builder.add(delta)
    kinds = ["reasoning", "content", "tool_call", "content", "tool_call", "content"]
    assert [kind for kind, _ in builder.parts] == kinds
    assert [what for kind, what in builder.parts if kind == "content"] == ["One.", "Two.", "Three."]
    assert (builder.content, builder.reasoning, builder.finish_reason) == ("One.Two.Three.", "Hm.", "tool_calls")
    assert [json.loads(call["function"]["arguments"]) for call in builder.tool_calls] == [{"a": 1}, {"a": 2}]
    assert len(builder.token_ids) == len(deltas)


def test_the_deltas_given_back_add_up_to_the_reply() -> None:
    builder = ReplyBuilder(parser())
    added = [builder.add(CompletionDelta(0, character, [0])) for character in TEXT]
    added.append(builder.add(CompletionDelta(0, "", [], finish_reason="stop")))
    assert "".join(delta.content for delta in added) == builder.content
    assert "".join(delta.reasoning for delta in added) == builder.reasoning
    pieces = "".join(piece.arguments for delta in added for piece in delta.tool_calls)
    assert pieces == "".join(call["function"]["arguments"] for call in builder.tool_calls)


def test_reasoning_that_nobody_wants_is_only_counted() -> None:
    builder = ReplyBuilder(parser(), keeps_reasoning=False)
    first = builder.add(CompletionDelta(0, "<think>\nHm.", [1, 2, 3]))
    builder.add(CompletionDelta(0, "</think>\n\nWell.", [4, 5], finish_reason="stop"))
    assert (first.events, builder.reasoning, builder.content) == ([], "", "Well.")
    assert (builder.num_reasoning_tokens, builder.num_tokens_before_answer) == (3, 3)


def test_without_a_parser_all_text_is_the_answer() -> None:
    builder = ReplyBuilder()
    logprobs = [{7: Logprob(-0.5, 1, "a")}]
    builder.add(CompletionDelta(0, "<think>a", [7], logprobs))
    builder.add(CompletionDelta(0, "", [], finish_reason="length", stop_reason="x", thinking_cut="budget"))
    assert (builder.content, builder.reasoning, builder.finish_reason) == ("<think>a", "", "length")
    assert (builder.logprobs, builder.stop_reason, builder.thinking_cut) == (logprobs, "x", "budget")
    assert builder.num_tokens_before_answer == 0


def test_what_a_server_parsed_is_taken_as_it_is_and_a_forced_call_ends_as_a_call() -> None:
    builder = ReplyBuilder()
    call = ParsedDelta.of(tool_calls=[ToolCallDelta(0, "c1", "f", "{}")])
    builder.add(ParsedCompletionDelta(0, "", [-1], parsed=call))
    builder.add(ParsedCompletionDelta(0, "", [], finish_reason="stop", parsed=ParsedDelta()))
    assert builder.finish_reason == "tool_calls"
    assert builder.tool_calls == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_the_calls_handed_out_are_a_copy() -> None:
    builder = ReplyBuilder(parser())
    builder.add(CompletionDelta(0, CALL % 1, [0], finish_reason="stop"))
    builder.tool_calls[0]["function"]["arguments"] = "changed"
    assert builder.tool_calls[0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize("pieces", ["<think>\nHm.\n</think>\n\nWell.", ["<think>\nHm.", "\n</think>", "\n\nWell."]])
def test_a_whole_text_is_read_at_once_or_in_pieces(pieces: "str | list[str]") -> None:
    reply = read_whole(parser(), pieces, "stop")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Well.", "Hm.", "stop")
