"""Replies that a limit cuts off inside a call: nothing of it is an answer, and what was called stays called."""

import json
from typing import Any

import pytest

from engine.chat.parse_output import parse_output
from tests.engine.text.parse.test_output_parser import CALL, TOOLS

CUT = [
    ("hermes", "<tool_call>"),
    ("hermes", '<tool_call>\n{"name": "get'),
    ("hermes", '<tool_call>\n{"name": "f", "argu'),
    ("qwen3_coder", "<tool_call>\n<function=get_wea"),
    ("glm45", "<tool_call>get_wea"),
    ("gemma4", "<|tool_call>call:get_wea"),
    ("mistral", "[TOOL_CALLS]get_wea"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "argu'),
    ("pythonic", "<|tool_call_start|>[get_wea"),
    ("llama3_json", '<|python_tag|>{"name": "f", "para'),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_wea"),
]
"""A call's opening mark and as much of the call as does not tell yet what is called with what."""
CUT_IN_ARGUMENTS = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"text": "a", "ci'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"text": "a", "city"'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_c'),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n<parameter=ci"),
    ("glm45", "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n<arg_key>ci"),
    ("gemma4", '<|tool_call>call:f{text:<|"|>a<|"|>,ci'),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"text": "a", "ci'),
    ("pythonic", '[f(text="a", ci'),
    ("llama3_json", '{"name": "f", "parameters": {"text": "a", "ci'),
    ("deepseek_v3", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"text": "a"}\n``'),
    ("openai", '<|channel|>commentary to=functions.f<|message|>{"text": "a", "ci'),
]


@pytest.mark.parametrize(("name", "call"), CUT)
def test_half_a_call_at_the_end_is_no_answer(name: str, call: str) -> None:
    text = f"Let me check.\n{call}"
    for chunks in ([text], list(text)):
        reply = parse_output(text, tool_call_parser=name, tools=TOOLS, chunks=chunks, finish_reason="length")
        assert (reply.text, reply.tool_calls, reply.finish_reason) == ("Let me check.", [], "length")


@pytest.mark.parametrize(("name", "call"), CUT)
def test_where_the_model_itself_ends_in_half_a_call_its_text_is_kept(name: str, call: str) -> None:
    text = f"Let me check.\n{call}"
    for reason in ("stop", None):
        for chunks in ([text], list(text)):
            reply = parse_output(text, tool_call_parser=name, tools=TOOLS, chunks=chunks, finish_reason=reason)
            assert (reply.text, reply.tool_calls) == (text, [])


@pytest.mark.parametrize(("name", "call"), CUT_IN_ARGUMENTS)
def test_half_an_argument_at_the_end_is_no_answer_either(name: str, call: str) -> None:
    for chunks in ([call], list(call)):
        reply = parse_output(call, tool_call_parser=name, tools=TOOLS, chunks=chunks, finish_reason="length")
        assert [json.loads(made["function"]["arguments"]) for made in reply.tool_calls] == [{"text": "a"}]
        assert (reply.text, reply.finish_reason) == ("", "length")


@pytest.mark.parametrize(
    ("name", "text", "shown", "made"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"text": "a", "ci', '"ci', [{"text": "a"}]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"text": "a", "ci"', '"ci"', [{"text": "a"}]),
        ("gemma4", '<|tool_call>call:f{text:<|"|>a<|"|>,ci', "ci", [{"text": "a"}]),
        ("mistral", 'before [TOOL_CALLS]f[ARGS]{"text": "a"}[TOOL_CALLS]f[ARGS]{ behind', "before behind",
         [{"text": "a"}, {}]),
        ("olmo3", "<function_calls>\nf(text='a')\nf(text='b')\n behind", "behind", [{"text": "a"}, {"text": "b"}]),
        ("openai", '<|channel|>commentary to=functions.f<|message|>{"text": "a", "ci', '"ci', [{"text": "a"}]),
    ],
)  # fmt: skip
def test_where_the_model_itself_ends_in_half_an_argument_what_was_not_read_is_kept(
    name: str, text: str, shown: str, made: list[dict[str, str]]
) -> None:
    for reason in ("stop", None):
        for chunks in ([text], list(text)):
            reply = parse_output(text, tool_call_parser=name, tools=TOOLS, chunks=chunks, finish_reason=reason)
            assert [json.loads(call["function"]["arguments"]) for call in reply.tool_calls] == made
            assert reply.text.strip() == shown


def test_half_a_call_inside_a_thought_is_no_thought() -> None:
    reply = parse_output(
        '<think>I will call.\n<tool_call>{"name": "f',
        reasoning_parser="qwen3",
        tool_call_parser="hermes",
        finish_reason="length",
    )
    assert (reply.reasoning, reply.text) == ("I will call.", "")


@pytest.mark.parametrize(
    ("name", "text"), [("llama3_json", '{"name": "f", "para'), ("pythonic", "[f"), ("hermes", "a <tool_")]
)
def test_what_is_cut_off_before_it_shows_to_be_a_call_stays_an_answer(name: str, text: str) -> None:
    assert parse_output(text, tool_call_parser=name, tools=TOOLS, finish_reason="length").text == text


FORCED = [
    ("required", '[{"name": "f", "parameters": {"text": "a"}}, {"name": "f", "parameters": {"count": 5}}]'),
    ({"type": "function", "function": {"name": "f"}}, '{"text": "a", "items": [{"a": "b"}]}'),
]


def is_beginning(part: Any, whole: Any) -> bool:
    """Whether JSON value ``part`` is ``whole``, but for what a cut leaves out at its end."""
    if isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(is_beginning, part, whole))
    if isinstance(part, dict) and isinstance(whole, dict):
        return part.keys() <= whole.keys() and all(is_beginning(value, whole[key]) for key, value in part.items())
    return bool(part == whole)


@pytest.mark.parametrize(
    ("name", "choice", "whole"),
    [
        ("hermes", "required", CALL),
        ("llama3_json", FORCED[1][0], f'{{"name": "f", "parameters": {FORCED[1][1]}}}'),
        *((name, *each) for name in ("hermes", "llama3_json", "gemma4", "openai", None) for each in FORCED),
    ],
)
def test_a_forced_call_cut_off_anywhere_is_no_answer(name: str | None, choice: Any, whole: str) -> None:
    """And what it does give are calls of the whole one, in order, with those of their arguments that were there."""
    lead = "<|channel|>final<|message|>" if name == "openai" else ""
    bare_arguments_of_llama3 = name == "llama3_json" and whole == FORCED[1][1]  # a form that it does not write
    cut = [
        parse_output(
            lead + whole[:size], tool_call_parser=name, tools=TOOLS, tool_choice=choice, finish_reason="length"
        )
        for size in range(len(whole) + 1)
    ]
    made = [
        [[call["function"]["name"], json.loads(call["function"]["arguments"])] for call in reply.tool_calls]
        for reply in cut
    ]
    assert {reply.text for reply in cut[:-1]} == {""}
    assert bool(made[-1]) == (cut[-1].text == "") == (not bare_arguments_of_llama3)
    assert [calls for calls in made if not is_beginning(calls, made[-1])] == []
    assert [len(calls) for calls in made] == sorted(len(calls) for calls in made)
