"""Broken output: nothing raises, nothing depends on how text was cut, arguments are JSON, no word is lost."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.chat.parse_output import parse_output
from engine.outputs import Reply
from engine.text.parse.reasoning_parsers import REASONING_PARSERS
from engine.text.parse.tool_parsers import TOOL_PARSERS

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "number": {"type": "number"}, "list": {"type": "array"}},
            },
        },
    }
]
SAMPLES = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"text": "a b", "list": [1, {"x": "y"}]}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=text>\na b\n</parameter>\n<parameter=list>\n[1, 2]\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a b</arg_value>\n<arg_key>number</arg_key>\n"
    "<arg_value>5</arg_value>\n</tool_call>",
    "pythonic": "<|tool_call_start|>[f(text='a b', list=[1, {\"x\": 'y'}]), f()]<|tool_call_end|>",
    "cohere_command3": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"text": "a"}}]'
    "<|END_ACTION|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"text": "a"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"text": "a"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="text" string="true">'
    "a</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "deepseek_v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="number" string="false">'
    "5</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    "function_gemma": "<start_function_call>call:f{text:<escape>a b<escape>,number:5}<end_function_call>",
    "gemma4": '<|tool_call>call:f{list:[1,{x:<|"|>y<|"|>}],text:<|"|>a b<|"|>}<tool_call|>',
    "gigachat3": 'function call<|role_sep|>\n{"name": "f", "arguments": {"text": "a b"}}',
    "granite": '<|tool_call|>[{"name": "f", "arguments": {"text": "a"}}]',
    "granite-20b-fc": '<function_call> {"name": "f", "arguments": {"text": "a"}}<function_call> '
    '{"name": "f", "arguments": {}}',
    "internlm": '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"text": "a"}}<|action_end|>',
    "jamba": '<tool_calls>[{"name": "f", "arguments": {"text": "a"}}, {"name": "f", "arguments": {}}]</tool_calls>',
    "kimi_k2": '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"text": "a"}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|open|>argument key="text" type="string"'
    '<|sep|>a b<|close|>argument<|sep|><|open|>argument key="list" type="array"<|sep|>[1]<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "llama3_json": '{"name": "f", "parameters": {"text": "a b", "number": 5}}',
    "longcat": "<longcat_tool_call>f\n<longcat_arg_key>text</longcat_arg_key>\n<longcat_arg_value>a"
    "</longcat_arg_value>\n</longcat_tool_call>",
    "minicpm5": '<function name="f"><param name="text"><![CDATA[a <b>]]></param><param name="number">5</param>'
    "</function>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="text">a</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "mistral": '[TOOL_CALLS]f[ARGS]{"text": "a"}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}',
    "muse_spark": " to=self<|message|>Hm.<|eom|><|start|>assistant to=f<|message|><atem:function_calls>\n"
    '<atem:invoke name="f">\n<atem:parameter name="text">a b</atem:parameter>\n<atem:parameter name="list">[1]'
    "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>",
    "olmo3": "<function_calls>\nf(text='a b', list=[1, {\"x\": null}])\nf(number=5)\n</function_calls>",
    "openai": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"text": "a"}<|call|>',
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {"text": "a"}}]',
    "xlam": '[{"name": "f", "arguments": {"text": "a b"}}, {"name": "f", "arguments": {}}]',
    "seed_oss": "<seed:tool_call><function=f><parameter=text>a</parameter></function></seed:tool_call>",
}
"""A call to ``f`` in each form."""
ALIASES = {
    "qwen2_5": "hermes",
    "json_tools": "hermes",
    "granite4": "hermes",
    "ernie45": "hermes",
    "hunyuan_a13b": "jamba",
    "minimax": "jamba",
    "llama4_json": "llama3_json",
    "functiongemma": "function_gemma",
    "step3p5": "qwen3_coder",
    "qwen3_xml": "qwen3_coder",
    "nemotron_v3": "qwen3_coder",
    "glm47": "glm45",
    "laguna": "glm45",
    "llama4_pythonic": "pythonic",
    "lfm2": "pythonic",
}
THOUGHTS = {
    "hermes": "qwen3",
    "qwen3_coder": "qwen3",
    "glm45": "glm45",
    "gemma4": "gemma4",
    "openai": "openai_gptoss",
    "mistral": "mistral",
    "minimax_m2": "minimax_m2",
    "seed_oss": "seed_oss",
    "deepseek_v31": "deepseek_r1",
    "granite": "granite",
    "kimi_k3": "kimi_k3",
    "muse_spark": "muse_spark",
}
PIECES = re.compile(r"<[^<>\s]+>|\w+|\s+|[^\w\s]")


def parse(name: str, text: str, chunks: list[str] | None = None, *, reason: str = "length") -> Reply:
    return parse_output(
        text,
        reasoning_parser=THOUGHTS.get(name),
        tool_call_parser=name,
        tools=TOOLS,
        chunks=chunks,
        finish_reason=reason,
    )


def everything(reply: Reply) -> str:
    """All text of a reply: thought, answer, names, ids, arguments."""
    calls = "".join(
        " ".join([call["id"] or "", call["function"]["name"], call["function"]["arguments"]])
        for call in reply.tool_calls
    )
    return f"{reply.reasoning or ''} {reply.text} {calls}"


def check(name: str, text: str, cuts: list[int], *, by_character: bool = True, reason: str = "length") -> Reply:
    """Parse whole and in pieces; both are the same and all arguments are objects."""
    whole = parse(name, text, reason=reason)
    for call in whole.tool_calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    assert parse(name, text, pieces, reason=reason) == whole
    if by_character:
        assert parse(name, text, list(text), reason=reason) == whole
    return whole


def tokens_of(name: str) -> list[str]:
    """The marks and characters of a form, its thought's included, and some that fit nowhere."""
    thought = REASONING_PARSERS[THOUGHTS[name]] if name in THOUGHTS else None
    marks = [*TOOL_PARSERS[name].starts, *TOOL_PARSERS[name].strays, *(thought.marks if thought else ())]
    return sorted(
        {*marks, *PIECES.findall(SAMPLES[name]), '"', "\\", "{", "}", "]", "é", "\ud83d\ude00", "\n", " ", "nul", "-"}
    )


def test_there_is_a_sample_of_every_form() -> None:
    assert set(SAMPLES) | set(ALIASES) == set(TOOL_PARSERS)
    for alias, name in ALIASES.items():
        assert TOOL_PARSERS[alias] is TOOL_PARSERS[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_is_a_call(name: str) -> None:
    reply = parse(name, SAMPLES[name])
    assert reply.tool_calls[0]["function"]["name"] == "f"
    assert reply.text == ""


@pytest.mark.parametrize("name", SAMPLES)
def test_a_call_cut_off_anywhere_is_still_json(name: str) -> None:
    for size in range(len(SAMPLES[name])):
        check(name, SAMPLES[name][:size], [size // 2], by_character=False)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_marks_and_text_in_any_order_never_raise(name: str, data: Any) -> None:
    pieces = data.draw(st.lists(st.sampled_from(tokens_of(name)), max_size=30))
    check(name, "".join(pieces), data.draw(st.lists(st.integers(0, 400), max_size=4)))


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_damaged_call_loses_no_word(name: str, data: Any) -> None:
    """Words of the answer around a call and in its string value survive whatever is cut out or put in.

    Where a limit cut the reply off, half a call at its end may be missing, and nothing else differs.
    """
    text = "before " + SAMPLES[name].replace("a b", "a wordinside b") + " behind"
    pieces = PIECES.findall(text)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(pieces) - 1))
        if pieces[place] not in ("before", "behind", "wordinside") and data.draw(st.booleans()):
            del pieces[place]
        else:
            pieces.insert(place, data.draw(st.sampled_from(["}", '"', "<x>", "]", "<", "\n", "\\"])))
    damaged = "".join(pieces)
    ended, cut = (check(name, damaged, [7, 30], reason=reason) for reason in ("stop", "length"))
    shown = everything(ended)
    for word in ("before", "behind", "wordinside"):
        if word in damaged:
            assert word in shown, f"{damaged!r} gave {shown!r}"
    assert ended.text.startswith(cut.text.rstrip())
    assert ended.tool_calls[: len(cut.tool_calls)] == cut.tool_calls
    assert ended.reasoning == cut.reasoning


SWALLOWED = {
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="f">\n<atem:parameter name="text"a wordinside b'
    "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>",
    "openai": '<|channel|>commentary to=functions.f <|constrain|>json{"text": "wordinside"}',
}
"""A tag that is not closed; a header that no mark ends."""


@pytest.mark.parametrize("name", SWALLOWED)
def test_a_broken_tag_or_header_loses_no_word(name: str) -> None:
    reply = check(name, SWALLOWED[name], [7, 30], reason="stop")
    assert "wordinside" in reply.tool_calls[0]["function"]["arguments"]
    assert "wordinside" in everything(reply)
