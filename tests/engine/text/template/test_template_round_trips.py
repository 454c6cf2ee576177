"""What a model's own template writes, the parsers read back: whole, cut in two anywhere, character by character."""

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.chat.parse_output import parse_output
from engine.models.gguf_file import open_gguf
from engine.outputs import Reply
from engine.text.parse.reasoning_parsers import detect_reasoning_parser
from engine.text.parse.tool_parsers import detect_tool_parser
from engine.text.template.chat_template import ChatTemplate
from engine.text.tokens.gguf_tokenizer import build_tokenizer
from engine.text.tokens.tokenizer import Tokenizer
from tests.engine.text.template.template_packages import LLAMA_CPP, TRL, TemplatePackage, template_source

CODE = "def f(a):\n    return {'k': \"v\"}  # <b>&amp;</b> {x} [1] \\d\n\tprint('日本語 🎉\\n')"
MARKUP = '<div class="a">\n</parameter>\n<think>no</think> </tool_call> ]</div>'
WEATHER = {
    "city": "São \"Paulo\"\n'x'",
    "days": 3,
    "ratio": 0.5,
    "flag": True,
    "tags": ["a", 'b"c', "</x>"],
    "options": {"nested": {"list": [1, 2, {"deep": "{[<"}]}, "number": "1"},
}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object", "properties": {}},
        "code": {"type": "string"},
    },
    "required": [],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": PARAMETERS}}
    for name in ("get_weather", "run_code")
]
ENDS = (
    r"(?:\s|<\|im_end\|>|<turn\|>|<\|eot_id\|>|</s>|<\|return\|>|\[e~\[|<seed:eos>|<eos>"
    r"|<｜end▁of▁sentence｜>|<\|END_OF_TURN_TOKEN\|>|<\|START_OF_TURN_TOKEN\|>|<\|CHATBOT_TOKEN\|>"
    r"|<\|START_THINKING\|><\|END_THINKING\|>|<\|end_of_text\|>|</assistant>)*\Z"
)
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Template:
    """A template, the parsers that it is to be recognised by, and what it cannot render."""

    package: TemplatePackage
    name: str
    reasoning: str | None
    tools: str | None
    renders: str = "thought calls content+calls"

    def __str__(self) -> str:
        return self.name


TEMPLATES = [
    Template(TRL, "qwen3_6", "qwen3", "qwen3_coder"),
    Template(TRL, "qwen3_8", "qwen3", "qwen3_coder"),
    Template(TRL, "qwen3_5_think", "qwen3", "qwen3_coder"),
    Template(TRL, "qwen3_5_nothink", "qwen3", "qwen3_coder"),
    Template(TRL, "qwen3", "qwen3", "hermes"),
    Template(TRL, "qwen2_5", None, "hermes", "calls content+calls"),
    Template(TRL, "gemma4", "gemma4", "gemma4", "calls content+calls"),
    Template(TRL, "gemma4_v2", "gemma4", "gemma4", "calls content+calls"),
    Template(TRL, "gemma4_v3", "gemma4", "gemma4", "calls content+calls"),
    Template(TRL, "gemma4_v5", "gemma4", "gemma4"),
    Template(TRL, "glm4moe", "glm45", "glm45"),
    Template(TRL, "gptoss", "openai_gptoss", "openai", "thought one-call"),
    Template(TRL, "lfm2_v2", None, "pythonic", "calls content+calls"),
    Template(TRL, "llama3_1", None, "llama3_json", "one-call"),
    Template(TRL, "nemotron_3_nano", "qwen3", "qwen3_coder"),
    Template(LLAMA_CPP, "ByteDance-Seed-OSS", "seed_oss", "seed_oss"),
    Template(LLAMA_CPP, "MiniMax-M2", "minimax_m2", "minimax_m2"),
    Template(LLAMA_CPP, "GLM-4.7-Flash", "glm45", "glm45"),
    Template(LLAMA_CPP, "Kimi-K2-Instruct", None, "kimi_k2", ""),
    Template(LLAMA_CPP, "Kimi-K2-Thinking", "kimi_k2", "kimi_k2", ""),
    Template(LLAMA_CPP, "Mistral-Small-3.2-24B-Instruct-2506", None, "mistral", "calls"),
    Template(LLAMA_CPP, "mistralai-Mistral-Nemo-Instruct-2407", None, "mistral", "calls"),
    Template(LLAMA_CPP, "deepseek-ai-DeepSeek-V3.1", "deepseek_r1", "deepseek_v31", "calls"),
    Template(LLAMA_CPP, "deepseek-ai-DeepSeek-V3.2", "deepseek_r1", "deepseek_v32", "calls content+calls"),
    Template(LLAMA_CPP, "deepseek-ai-DeepSeek-V4", "deepseek_r1", "deepseek_v4", "calls content+calls"),
    Template(LLAMA_CPP, "Qwen3-Coder", None, "qwen3_coder", "calls content+calls"),
    Template(LLAMA_CPP, "openbmb-MiniCPM5-1B", "qwen3", "minicpm5"),
    Template(LLAMA_CPP, "ibm-granite-granite-4.0", None, "hermes", "calls content+calls"),
    Template(LLAMA_CPP, "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "cohere2", "cohere_command3", "calls"),
    Template(LLAMA_CPP, "openai-gpt-oss-120b", "openai_gptoss", "openai", "thought one-call"),
]

EVERY_CUT = ("qwen3_6", "qwen3", "gemma4_v5", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "MiniMax-M2")
"""One template of each form is cut in two at every point; all are fed character by character."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn as a template renders it, and the prompt before it."""

    prompt: str
    text: str
    content: str
    thought: str
    calls: list[Call]


def render(template: Template, *, content: str = "", thought: str = "", calls: list[Call] = ()) -> Turn:  # type: ignore[assignment]
    """The turn, cut out of the rendered conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        message |= {"reasoning": thought, "thinking": thought}
    if calls:
        message["tool_calls"] = [
            {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    chat = ChatTemplate(
        template_source(template.package, template.name), special_tokens={"bos_token": "", "eos_token": "</s>"}
    )
    user = [{"role": "user", "content": "hi"}]
    whole = chat.render([*user, message], tools=TOOLS, add_generation_prompt=False)
    opened = chat.render(user, tools=TOOLS, add_generation_prompt=True)
    size = len(os.path.commonprefix([whole, opened]))  # noqa: RUF071 - texts, not paths
    if size < len(opened):  # the prompt opens or closes a thought that this turn writes otherwise
        marks = [m for m in re.finditer(r"<[^<>\s]+>", whole) if m.start() < size < m.end()]
        size = marks[0].start() if marks else size
    return Turn(whole[:size], re.sub(ENDS, "", whole[size:]), content, thought, list(calls))


def parse(template: Template, turn: Turn, chunks: list[str] | None = None) -> Reply:
    return parse_output(
        turn.text,
        reasoning_parser=template.reasoning,
        tool_call_parser=template.tools,
        tools=TOOLS,
        prompt_suffix=turn.prompt,
        chunks=chunks,
    )


def calls_of(reply: Reply) -> list[Call]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.tool_calls]


def check(template: Template, turn: Turn) -> None:
    """Parsed whole it is what was rendered; parsed in pieces it is the same."""
    whole = parse(template, turn)
    assert calls_of(whole) == turn.calls
    assert (whole.text.strip(), whole.reasoning or "") == (turn.content, turn.thought)
    assert whole.finish_reason == ("tool_calls" if turn.calls else "stop")
    for cut in range(1, len(turn.text), 1 if template.name in EVERY_CUT else 17):
        assert parse(template, turn, [turn.text[:cut], turn.text[cut:]]) == whole, f"cut at {cut}: {turn.text[:cut]!r}"
    assert parse(template, turn, list(turn.text)) == whole


@cache
def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer(build_tokenizer(open_gguf(path).metadata))


def token_by_token(path: Path, text: str) -> list[str]:
    """``text`` in the pieces that a tokenizer's stream gives."""
    tokenizer = tokenizer_of(path)
    stream = tokenizer.decode_stream(skip_special_tokens=False)
    return [piece for token in tokenizer.encode(text, add_special_tokens=False) if (piece := stream.step(token))]


def those_that_render(what: str) -> Any:
    return pytest.mark.parametrize("template", [t for t in TEMPLATES if what in t.renders.split()], ids=str)


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_a_template_is_recognised(template: Template) -> None:
    source = template_source(template.package, template.name)
    assert detect_reasoning_parser(source, ()) == template.reasoning
    assert detect_tool_parser(source) == template.tools


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_plain_answers_come_back_as_they_are(template: Template) -> None:
    check(template, render(template, content="Yes: <b>a</b> {b} [c] ‘d’."))


@those_that_render("thought")
def test_thoughts_come_back_apart_from_answers(template: Template) -> None:
    check(template, render(template, content="The answer <is> 4.", thought="2 + 2:\n\nthat is {4}"))


@those_that_render("calls")
def test_several_calls_with_nested_quoted_and_unicode_arguments_come_back(template: Template) -> None:
    check(template, render(template, calls=[("get_weather", WEATHER), ("run_code", {"code": CODE, "city": "5"})]))


@those_that_render("calls")
def test_token_by_token_is_the_same_as_whole(template: Template, smollm2_gguf: Path) -> None:
    turn = render(template, calls=[("get_weather", WEATHER), ("run_code", {"code": CODE})])
    pieces = token_by_token(smollm2_gguf, turn.text)
    assert len(pieces) > 50
    assert parse(template, turn, pieces) == parse(template, turn)


@those_that_render("one-call")
def test_one_call_comes_back_where_a_template_takes_only_one(template: Template) -> None:
    check(template, render(template, calls=[("get_weather", WEATHER)]))
    check(template, render(template, calls=[("run_code", {"code": CODE})]))


@those_that_render("content+calls")
def test_text_before_calls_stays_text(template: Template) -> None:
    check(template, render(template, content="Let me look.", calls=[("run_code", {"code": CODE})]))


@those_that_render("calls")
def test_calls_without_arguments_come_back(template: Template) -> None:
    check(template, render(template, calls=[("get_weather", {}), ("run_code", {})]))


@those_that_render("calls")
def test_markup_inside_arguments_stays_text(template: Template) -> None:
    check(template, render(template, calls=[("run_code", {"code": MARKUP}), ("get_weather", {"days": 0})]))


@pytest.mark.parametrize("template", [t for t in TEMPLATES if "call" in t.renders], ids=str)
@pytest.mark.parametrize("written", ['{"code": "l', '"ls"', "[1]", "ls -l"])
def test_arguments_that_are_not_an_object_are_in_the_prompt_as_they_were_written(
    template: Template, written: str
) -> None:
    chat = ChatTemplate(
        template_source(template.package, template.name), special_tokens={"bos_token": "", "eos_token": "</s>"}
    )
    call = {"id": "call00000", "type": "function", "function": {"name": "run_code", "arguments": written}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "name": "run_code", "content": "Error"},
    ]
    turn = chat.render(messages, tools=TOOLS).partition("hi")[2]
    assert written in turn[turn.index("run_code") : turn.rindex("Error")]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v2", "gemma4_v5"])
def test_gemma4s_prompt_after_a_tool_result_is_read_as_it_ends(name: str) -> None:
    """Some versions end it inside the thought's channel, others leave the channel to the model."""
    chat = ChatTemplate(template_source(TRL, name), special_tokens={"bos_token": "<bos>"})
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "x"}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    prompt = chat.render(messages, tools=TOOLS, enable_thinking=True)
    opened = prompt.endswith("<|channel>thought\n")
    assert opened == (name == "gemma4_v5")
    text = ("" if opened else "<|channel>thought\n") + "It is sunny.\n<channel|>Sunny!"
    for chunks in ([text], list(text)):
        reply = parse_output(
            text, reasoning_parser="gemma4", tool_call_parser="gemma4", prompt_suffix=prompt, chunks=chunks
        )
        assert (reply.reasoning, reply.text) == ("It is sunny.", "Sunny!")


@pytest.mark.parametrize("name", ["qwen3_6", "qwen3", "qwen3_5_think", "glm4moe"])
@pytest.mark.parametrize("thinking", [True, False])
def test_what_the_prompt_says_of_thinking_decides_where_output_begins(name: str, thinking: bool) -> None:
    source = template_source(TRL, name)
    prompt = ChatTemplate(source).render([{"role": "user", "content": "<think>?"}], enable_thinking=thinking)
    opened = prompt.rstrip().endswith("<think>")
    text = ("Hm.\n</think>\n\n" if opened else "<think>\nHm.\n</think>\n\n" if thinking else "\n") + "Yes."
    reply = parse_output(text, reasoning_parser=detect_reasoning_parser(source, ()), prompt_suffix=prompt)
    assert (reply.reasoning, reply.text.strip()) == ("Hm." if thinking else None, "Yes.")
