"""The parsers' choices: prompts that open thoughts, cut and broken output, what is held back, what is forced."""

import json
import warnings
from typing import Any

import pytest

from engine.chat.parse_output import parse_output
from engine.errors import ConfigError
from engine.text.parse.output_parser import OutputParser, ParsedDelta, make_output_parser
from engine.text.parse.reasoning_parsers import REASONING_PARSERS, detect_reasoning_parser
from engine.text.parse.tool_parsers import detect_tool_parser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
                    "item": {"$ref": "#/$defs/item"},
                },
                "$defs": {"item": {"type": "object", "properties": {"a": {"type": "string"}}}},
            },
        },
    }
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"text": "a"}}\n</tool_call>'


def parser(reasoning: str | None = "qwen3", tools: str | None = "hermes", **more: Any) -> OutputParser:
    return make_output_parser(reasoning_parser=reasoning, tool_call_parser=tools, tools=TOOLS, **more)


def feed(parser: OutputParser, *pieces: str, reason: str = "stop") -> list[ParsedDelta]:
    """The delta of each piece and of the end."""
    return [*map(parser.feed, pieces), parser.finish(reason)]


def texts(deltas: list[ParsedDelta]) -> tuple[str, str]:
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)


def arguments(text: str, tools: str = "qwen3_coder", **more: Any) -> list[Any]:
    reply = parse_output(text, tool_call_parser=tools, tools=TOOLS, **more)
    return [json.loads(call["function"]["arguments"]) for call in reply.tool_calls]


def test_without_parsers_all_text_passes_at_once_and_as_it_is() -> None:
    plain = make_output_parser(reasoning_parser=None, tool_call_parser="hermes", tools=None)
    pieces = [" \n", "<think>", CALL, " end \n\n"]
    assert [delta.content for delta in feed(plain, *pieces)] == [*pieces, ""]
    assert not plain.needs_special_tokens


@pytest.mark.parametrize(
    "prompt",
    ["<|im_start|>assistant\n<think>\n", "<think>", "<|im_start|>user\n<think></think><|im_end|>\n<think>\nSo far, "],
)
def test_a_prompt_that_opens_the_thought_begins_inside_it(prompt: str) -> None:
    deltas = feed(parser(prompt_suffix=prompt), "Hm.\n</think>\n\nYes.")
    assert texts(deltas) == ("Hm.", "Yes.")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>assistant\n",
    ],
)
def test_a_prompt_that_leaves_no_thought_open_begins_with_the_answer(prompt: str) -> None:
    assert texts(feed(parser(prompt_suffix=prompt), "Yes.")) == ("", "Yes.")


def test_a_thought_cut_off_by_max_tokens_is_all_thought() -> None:
    cut = parser(prompt_suffix="<think>\n")
    assert texts(feed(cut, "I wonder", " whether", reason="length")) == ("I wonder whether", "")
    assert cut.finish_reason == "length"


def test_deepseek_r1_begins_inside_the_thought_where_the_prompt_is_not_known() -> None:
    reply = parse_output("Hm.\n</think>\n\nYes.", reasoning_parser="deepseek_r1")
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")


def test_deepseek_r1_begins_inside_the_thought_unless_the_prompt_says_otherwise() -> None:
    """Its first template leaves the opening mark to the model, which often leaves it out."""
    for prompt, text in (
        ("<｜User｜>Hi<｜Assistant｜>", "Hm.\n</think>\n\nYes."),
        ("<｜User｜>Hi<｜Assistant｜>", "<think>\nHm.\n</think>\n\nYes."),
        ("<｜User｜>Hi<｜Assistant｜><think>\n", "Hm.\n</think>\n\nYes."),
    ):
        reply = parse_output(text, reasoning_parser="deepseek_r1", prompt_suffix=prompt)
        assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")
    for prompt in (
        "<｜User｜>Hi<｜Assistant｜></think>",
        "<｜tool▁output▁begin｜>4<｜tool▁output▁end｜>",
        "<｜User｜>Hi<｜Assistant｜>It is so:",
        "no turns at all",
    ):
        reply = parse_output("Yes.", reasoning_parser="deepseek_r1", prompt_suffix=prompt)
        assert (reply.reasoning, reply.text) == (None, "Yes.")


@pytest.mark.parametrize("name", ["qwen3", "glm45", "kimi_k2", "deepseek_r1", "step3", "hunyuan_a13b"])
def test_an_end_without_a_beginning_makes_what_stands_before_it_thought_where_the_prompt_is_not_known(
    name: str,
) -> None:
    text = "Hm, 2 < 3.\n</think>\n\nYes."
    for chunks in ([text], list(text)):
        reply = parse_output(text, reasoning_parser=name, chunks=chunks)
        assert (reply.reasoning, reply.text) == ("Hm, 2 < 3.", "Yes.")


def test_a_call_behind_a_thought_without_a_beginning_is_found() -> None:
    text = f"Hm.</think>\n{CALL}"
    for chunks in ([text], list(text)):
        reply = parse_output(text, reasoning_parser="qwen3", tool_call_parser="hermes", tools=TOOLS, chunks=chunks)
        assert (reply.reasoning, reply.text, len(reply.tool_calls)) == ("Hm.", "", 1)


def test_an_answer_without_marks_stays_an_answer_where_the_prompt_is_not_known() -> None:
    for text in ("Yes.", "Yes <think>", "Here is my response: yes"):
        assert parse_output(text, reasoning_parser="qwen3", chunks=list(text)).text == text
    words = "So. Here is my response: yes"
    assert parse_output(words, reasoning_parser="granite").text == words


def test_an_end_mark_that_nothing_opened_is_no_text() -> None:
    for prompt in ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"):
        assert texts(feed(parser(prompt_suffix=prompt), "Yes.</think> Really.")) == ("", "Yes. Really.")


@pytest.mark.parametrize("opened", ["<|channel>thought\n", "<tool_response|><|channel>thought\n"])
def test_gemma4_after_a_tool_result_begins_inside_the_channel(opened: str) -> None:
    reply = parse_output(
        "It says 4.\n<channel|>Four.", reasoning_parser="gemma4", prompt_suffix=f"<|turn>model\n{opened}"
    )
    assert (reply.reasoning, reply.text) == ("It says 4.", "Four.")


def test_gemma4_thinks_again_in_the_middle_of_an_answer() -> None:
    reply = parse_output(
        "<|channel>thought\nOne.\n<channel|>First. <|channel>thought\nTwo.<channel|>Second.<channel|>",
        reasoning_parser="gemma4",
    )
    assert (reply.reasoning, reply.text) == ("One.\nTwo.", "First. Second.")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemma4", "<|tool_call>call:f{}<tool_call|><|tool_response>"),
        ("function_gemma", "<start_function_call>call:f{}<end_function_call><start_function_response>"),
    ],
)
def test_the_mark_that_hands_over_to_the_tool_is_no_answer(name: str, text: str) -> None:
    reply = parse_output(text, tool_call_parser=name, tools=TOOLS)
    assert (reply.text, len(reply.tool_calls)) == ("", 1)


def test_an_empty_thought_is_none() -> None:
    reply = parse_output("<|channel>thought\n<channel|>Hi", reasoning_parser="gemma4")
    assert (reply.reasoning, reply.text) == (None, "Hi")


def test_a_mark_quoted_in_an_answer_stays_there() -> None:
    text = "Write <think> and </think> around it."
    assert parse_output(text, reasoning_parser="qwen3").text == text


def test_a_call_inside_an_open_thought_ends_it() -> None:
    reply = parse_output(
        f"I will call.\n{CALL}",
        reasoning_parser="qwen3",
        tool_call_parser="hermes",
        tools=TOOLS,
        prompt_suffix="<think>\n",
    )
    assert (reply.reasoning, reply.text, len(reply.tool_calls)) == ("I will call.", "", 1)


def test_text_that_only_mentions_a_call_inside_a_thought_is_thought() -> None:
    reply = parse_output(
        "a <tool_call> would help</think>Yes",
        reasoning_parser="qwen3",
        tool_call_parser="hermes",
        prompt_suffix="<think>",
    )
    assert (reply.reasoning, reply.text) == ("a <tool_call> would help", "Yes")


def test_arguments_stream_as_they_come() -> None:
    deltas = feed(
        parser(), '<tool_call>{"name": "f", "arg', 'uments": {', '"text": "on', "e ", "two", '"', "}", "}</tool_call>"
    )
    pieces = ["".join(call.arguments for call in delta.tool_calls) for delta in deltas]
    assert pieces == ["", "{", '"text": "on', "e ", "two", "", '"}', "", ""]
    first = deltas[1].tool_calls[0]
    assert (first.index, first.name, bool(first.id)) == (0, "f", True)


def test_text_parameters_stream_and_typed_ones_come_whole() -> None:
    deltas = feed(
        parser(tools="qwen3_coder"),
        "<tool_call>\n<function=f>\n<parameter=text>\nab",
        "cd",
        "\n</parameter>\n<parameter=count>\n1",
        "2\n</parameter>",
        "\n</function>",
    )
    pieces = ["".join(call.arguments for call in delta.tool_calls) for delta in deltas]
    assert pieces == ['{"text": "ab', "cd", '"', "", ', "count": 12}', ""]


def test_only_what_may_become_a_mark_is_held_back() -> None:
    deltas = feed(parser(None), "a <", "b> <tool", "box> c", " <tool_call", ">no call")
    assert [delta.content for delta in deltas] == ["a", " <b>", " <toolbox> c", "", " <tool_call>no call", ""]


def test_parallel_tool_calls_false_keeps_the_first() -> None:
    one = parser(parallel_tool_calls=False)
    deltas = feed(one, f"Both.\n{CALL}\n{CALL}")
    assert [call.index for delta in deltas for call in delta.tool_calls] == [0]
    assert texts(deltas) == ("", "Both.")
    assert one.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["none", "auto", None, "required"])
def test_calls_are_looked_for_unless_the_choice_is_none(choice: str | None) -> None:
    reply = parse_output(CALL, tool_call_parser="hermes", tools=TOOLS, tool_choice=choice)
    assert (len(reply.tool_calls), reply.text) == ((0, CALL) if choice == "none" else (1, ""))


def test_a_forced_call_in_vllms_form_is_read() -> None:
    text = '[{"name": "f", "parameters": {"text": "a"}}, {"name": "f", "parameters": {}}]'
    forced = parse_output(text, tool_call_parser="hermes", tools=TOOLS, tool_choice="required")
    assert [call["function"]["arguments"] for call in forced.tool_calls] == ['{"text": "a"}', "{}"]
    named = parse_output(
        '<think>x</think>{"text": "a"}',
        reasoning_parser="qwen3",
        tool_call_parser=None,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    assert [call["function"] for call in named.tool_calls] == [{"name": "f", "arguments": '{"text": "a"}'}]
    assert named.reasoning == "x"


def test_a_forced_call_of_gpt_oss_stands_in_its_final_message() -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    for text, choice in (
        ('[{"name": "f", "parameters": {"text": "a"}}]', "required"),
        ('{"text": "a"}', {"type": "function", "function": {"name": "f"}}),
    ):
        reply = parse_output(
            f"{thought}{text}<|return|>",
            reasoning_parser="openai_gptoss",
            tool_call_parser="openai",
            tools=TOOLS,
            tool_choice=choice,
            prompt_suffix="<|start|>assistant",
        )
        assert [call["function"] for call in reply.tool_calls] == [{"name": "f", "arguments": '{"text": "a"}'}]
        assert (reply.reasoning, reply.text) == ("Hm.", "")


def test_a_forced_call_of_llama3_is_read_in_its_own_form() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        reply = parse_output(
            '{"name": "f", "parameters": {"text": "a"}}',
            tool_call_parser="llama3_json",
            tools=TOOLS,
            tool_choice=choice,
        )
        assert [call["function"] for call in reply.tool_calls] == [{"name": "f", "arguments": '{"text": "a"}'}]


def test_json_answers_are_no_calls() -> None:
    for text in ('{"name": "Bob", "parameters": {"age": 3}}', '{"name": "f"}', '{"a": 1}', "[1, 2]", "{oh}"):
        reply = parse_output(text, tool_call_parser="llama3_json", tools=TOOLS)
        assert (reply.text, reply.tool_calls) == (text, [])
    assert parse_output("[see below](x)", tool_call_parser="pythonic", tools=TOOLS).text == "[see below](x)"


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        "<tool_call> is the mark",
        '<tool_call>{"arguments": {}}',
    ],
)
def test_what_cannot_be_a_call_is_content(broken: str) -> None:
    reply = parse_output(f"So: {broken}", tool_call_parser="hermes", tools=TOOLS)
    assert (reply.text, reply.tool_calls, reply.finish_reason) == (f"So: {broken}", [], "stop")


def test_the_rest_of_a_call_that_breaks_off_in_its_middle_is_content() -> None:
    reply = parse_output(
        '<tool_call>{"name": "f", "arguments": {"text": "a", oh no}}</tool_call> sorry', tool_call_parser="hermes"
    )
    assert reply.tool_calls[0]["function"]["arguments"] == '{"text": "a"}'
    assert reply.text == "oh no}} sorry"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"text": "say "hi" twice"}', {"text": 'say "hi" twice'}),
        ("{'text': 'it''s', 'count': None}", {"text": "it''s", "count": None}),
        ('{"text": "two\nlines\tand \\d", }', {"text": "two\nlines\tand \\d"}),
        ('{text: yes, "ok": True}', {"text": "yes", "ok": True}),
        ('{"n": [1., +5, .5, -0, 1e3, 007]}', {"n": [1, 5, 0.5, 0, 1000, "007"]}),
        ('{"e": "\\ud83d\\ude00 \\u00e9 \\/ \\""}', {"e": '😀 é / "'}),
        ('"{\\"text\\": \\"as a string\\"}"', {"text": "as a string"}),
        ("null", {}),
    ],
)
def test_json_as_models_write_it_is_mended(written: str, meant: dict[str, Any]) -> None:
    assert arguments(f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>', "hermes") == [meant]


@pytest.mark.parametrize("deep", ["[" * 5000, '{"a":' * 5000, "[" * 5000 + "]" * 5000])
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "gemma4", "pythonic", "llama3_json"])
def test_bottomless_nesting_is_closed_in_time(name: str, deep: str) -> None:
    begin = {
        "hermes": '<tool_call>{"name": "f", "arguments": {"items": ',
        "qwen3_coder": "<tool_call><function=f><parameter=items>",
        "gemma4": "<|tool_call>call:f{items:",
        "pythonic": "<|tool_call_start|>[f(items=",
        "llama3_json": '{"name": "f", "parameters": {"items": ',
    }[name]
    reply = parse_output(begin + deep, tool_call_parser=name, tools=TOOLS, finish_reason="length")
    shown = reply.tool_calls[0]["function"]["arguments"]
    assert isinstance(json.loads(shown), dict)
    assert (shown + reply.text).count("[") + (shown + reply.text).count("{") >= 5000


def test_half_of_a_surrogate_pair_is_replaced_since_clients_could_not_encode_it() -> None:
    reply = parse_output(
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', tool_call_parser="hermes"
    )
    assert reply.tool_calls[0]["function"]["arguments"].encode("utf-8") == b'{"a": "\xef\xbf\xbd"}'


@pytest.mark.parametrize(
    ("name", "written", "meant"),
    [
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("text", '"quoted" \\n', '"quoted" \\n'),
        ("count", "5", 5),
        ("count", "5.0", 5),
        ("count", "five", "five"),
        ("maybe", "null", None),
        ("maybe", "7", 7),
        ("items", "[{'a': 'it'}]", [{"a": "it"}]),
        ("items", '[{"a": "x\ny"}]', [{"a": "x\ny"}]),
        ("item", '{"a": "b",}', {"a": "b"}),
        ("undeclared", "5", 5),
        ("undeclared", '{"a": [true]}', {"a": [True]}),
        ("undeclared", "plain text", "plain text"),
    ],
)
def test_values_get_the_type_that_the_tool_declares(name: str, written: str, meant: object) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter={name}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    assert arguments(text) == [{name: meant}]
    assert arguments(f"<tool_call>f<arg_key>{name}</arg_key><arg_value>{written}</arg_value></tool_call>", "glm45") == [
        {name: meant}
    ]


def test_kimi_k3_states_the_types_or_gives_all_arguments_as_json() -> None:
    def section(inside: str) -> str:
        return (
            f'<|open|>tools<|sep|>\n<|open|>call tool="f" index="1"<|sep|>\n{inside}\n'
            "<|close|>call<|sep|>\n<|close|>tools<|sep|>"
        )

    def argument(key: str, kind: str, value: str) -> str:
        return f'<|open|>argument key="{key}" type="{kind}"<|sep|>{value}<|close|>argument<|sep|>'

    typed = (
        argument("text", "string", "5") + argument("count", "number", "5") + argument("x", "object", '{"a": [true]}')
    )
    assert arguments(section(typed), "kimi_k3") == [{"text": "5", "count": 5, "x": {"a": [True]}}]
    whole = '<|open|>json type="object"<|sep|>{"text": "say <|x|>", "items": []}<|close|>json<|sep|>'
    assert arguments(section(whole), "kimi_k3") == [{"text": "say <|x|>", "items": []}]
    reply = parse_output(
        f"<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>So.<|close|>response<|sep|>{section(whole)}"
        "<|close|>message<|sep|>",
        reasoning_parser="kimi_k3",
        tool_call_parser="kimi_k3",
    )
    assert (reply.reasoning, reply.text, len(reply.tool_calls)) == ("Hm.", "So.", 1)
    assert detect_tool_parser(None, ("<|open|>", "<|close|>", "<|sep|>")) == "kimi_k3"


def test_muse_spark_thinks_calls_and_answers_in_messages_to_someone() -> None:
    text = (
        " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>I look.<|eom|>"
        "<|start|>assistant to=f<|message|>"
        '<atem:function_calls>\n<atem:invoke name="f">\n<atem:parameter name="text">a</atem:parameter>\n'
        '<atem:parameter name="items">[{"a": "b"}]</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    )
    for chunks in ([text], list(text)):
        reply = parse_output(
            text, reasoning_parser="muse_spark", tool_call_parser="muse_spark", tools=TOOLS, chunks=chunks
        )
        assert (reply.reasoning, reply.text) == ("Hm.", "I look.")
        assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"text": "a", "items": [{"a": "b"}]}
    answer = parse_output(
        " to=user<|message|>Set to=5.<|eot|>", reasoning_parser="muse_spark", tool_call_parser="muse_spark"
    )
    assert (answer.reasoning, answer.text) == (None, "Set to=5.")
    template = "{{ '<atem:function_calls>' }}"
    assert (detect_reasoning_parser(template, ()), detect_tool_parser(template)) == ("muse_spark", "muse_spark")


def test_olmo3_writes_each_call_on_a_line_of_its_own() -> None:
    text = '<function_calls>\nf(text="a")\nf(text=\'it\'s\', maybe=null, items=[{"a": "b"}])\n</function_calls>'
    assert arguments(text, "olmo3") == [{"text": "a"}, {"text": "it's", "maybe": None, "items": [{"a": "b"}]}]


def test_gigachat3_marks_a_call_by_its_role() -> None:
    call = '{"name": "f", "arguments": {"text": "a"}}'
    for lead in ("<|message_sep|>\n\nfunction call<|role_sep|>\n", "<|function_call|>"):
        reply = parse_output(f"Let me see.{lead}{call}", tool_call_parser="gigachat3", tools=TOOLS)
        assert (reply.text, len(reply.tool_calls)) == ("Let me see.", 1)


def test_a_missing_section_or_closing_tag_is_no_obstacle() -> None:
    assert arguments("<function=f>\n<parameter=text>\na\n</parameter>\n</function>") == [{"text": "a"}]
    assert arguments("<tool_call>\n<function=f>\n<parameter=text>\na\n</function>\n</tool_call>") == [{"text": "a"}]
    assert (
        parse_output("use <function=g> here", tool_call_parser="qwen3_coder", tools=TOOLS).text
        == "use <function=g> here"
    )


def test_cut_off_arguments_are_closed_and_the_reason_stays_length() -> None:
    reply = parse_output(
        '<tool_call>{"name": "f", "arguments": {"text": "a", "list": [tr',
        tool_call_parser="hermes",
        finish_reason="length",
    )
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"text": "a", "list": [True]}
    assert (reply.text, reply.finish_reason) == ("", "length")


def test_a_native_call_is_read_where_a_call_is_required() -> None:
    text = '[TOOL_CALLS]f[ARGS]{"text": "a"}'
    reply = parse_output(text, tool_call_parser="mistral", tools=TOOLS, tool_choice="required")
    assert (reply.text, len(reply.tool_calls)) == ("", 1)


def test_special_tokens_are_asked_for_and_left_out_where_marks_are_special() -> None:
    special = ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", "<turn|>", '<|"|>')
    gemma = parser("gemma4", "gemma4", special_tokens=special)
    assert gemma.needs_special_tokens
    assert texts(feed(gemma, "<|channel>thought\nHm<turn|>.<channel|>Yes<turn|>.")) == ("Hm.", "Yes.")
    assert not parser("qwen3", "hermes", special_tokens=("<|im_end|>",)).needs_special_tokens


def test_kimi_ids_are_the_models_own() -> None:
    text = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
        '{"text": "a"}<|tool_call_end|><|tool_call_begin|>functions.f:4<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>"
    )
    reply = parse_output(text, tool_call_parser="kimi_k2", tools=TOOLS)
    assert [call["id"] for call in reply.tool_calls] == ["functions.f:3", "functions.f:4"]


def test_ids_are_new_for_every_call_and_as_the_templates_want_them() -> None:
    ids = []
    for name, text in (("hermes", CALL * 2), ("mistral", "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f[ARGS]{}")):
        deltas = feed(parser(None, name), text)
        ids.append([str(call.id) for delta in deltas for call in delta.tool_calls])
    assert [len(set(each)) for each in ids] == [2, 2]
    assert all(each.startswith("chatcmpl-tool-") for each in ids[0])
    assert all(len(each) == 9 and each.isalnum() for each in ids[1])


def test_harmony_without_tools_shows_a_message_to_a_function_as_text() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    reply = parse_output(text, reasoning_parser="openai_gptoss", prompt_suffix="<|start|>assistant")
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")
    plain = parse_output("Just text.", reasoning_parser="openai_gptoss", prompt_suffix="<|start|>assistant")
    assert plain.text == "Just text."
    inside = parse_output(
        " so.<|end|>",
        reasoning_parser="openai_gptoss",
        prompt_suffix="<|start|>assistant<|channel|>analysis<|message|>I think",
    )
    assert inside.reasoning == "so."


def test_a_message_to_no_function_is_no_call() -> None:
    text = '<|channel|>commentary to=functions.<|constrain|>json<|message|>{"text": "a"}<|call|>'
    assert parse_output(text, tool_call_parser="openai", tools=TOOLS).tool_calls == []


def test_unknown_parsers_are_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--reasoning-parser qwen9: not known; use one of .*qwen3.*, or none"):
        parse_output("", reasoning_parser="qwen9")
    with pytest.raises(ConfigError, match=r"--tool-call-parser x: not known; .*hermes"):
        parse_output("", tool_call_parser="x")


def test_chunks_must_make_up_the_text() -> None:
    with pytest.raises(ValueError, match="chunks must make up the text"):
        parse_output("abc", chunks=["a", "c"])


def test_markers_of_every_parser_are_two_texts() -> None:
    for parser in REASONING_PARSERS.values():
        assert parser.start
        assert parser.end
        assert parser.start != parser.end


def test_a_template_without_thoughts_or_tools_gets_no_parser() -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert detect_reasoning_parser(template, ()) is None
    assert detect_tool_parser(template) is None
    assert detect_reasoning_parser(None, ()) is None


def test_python_values_with_escapes_that_python_does_not_know_are_read_without_a_word() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}}]
    written = r"""<tool_call><function=f><parameter=a>['\d+', 'a\\b', '\n']</parameter></function></tool_call>"""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reply = parse_output(written, tool_call_parser="qwen3_coder", tools=tools)
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"a": [r"\d+", r"a\b", "\n"]}
    assert told == []
