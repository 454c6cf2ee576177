"""Which parsers a loaded model gets: named by flags, found in its template, or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import LLM, SamplingParams
from engine.chat.request import ChatRequest
from engine.errors import ConfigError
from engine.params.engine_args import EngineArgs
from engine.text.parse.output_parser import OutputParser
from tests.conftest import TinyModelDir

THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endfor %}<|im_start|>assistant\n<think>\n"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def thinking_model(tiny_model_dir: TinyModelDir, tmp_path: Path) -> Path:
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_model_dir(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": THINKING_TEMPLATE}))
    return folder


def load(folder: Path, **options: object) -> LLM:
    return LLM(str(folder), max_model_len=256, max_num_seqs=2, gpu_memory_utilization=0.2, **options)


def parser_of(llm: LLM, **asked: Any) -> OutputParser:
    """The parser of a chat's reply."""
    request = ChatRequest(messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams(), **asked)
    parser = llm.prepare(request).new_parser()
    assert parser is not None
    return parser


def test_parsers_are_chosen_from_the_template_and_said_in_one_line(thinking_model: Path) -> None:
    with load(thinking_model) as llm:
        assert (llm.reasoning_parser, llm.tool_call_parser) == ("qwen3", "hermes")
        line = "chosen from the chat template: --reasoning-parser qwen3 --tool-call-parser hermes"
        assert llm.notes.count(line) == 1
        parser = parser_of(llm, tools=TOOLS)
        delta = parser.feed('Hm.</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
        parser.finish("stop")
        assert (delta.reasoning, delta.content, delta.tool_calls[0].arguments) == ("Hm.", "", "{}")
        assert parser.finish_reason == "tool_calls"


def test_flags_outrank_the_template(thinking_model: Path) -> None:
    with load(thinking_model, reasoning_parser="deepseek_r1", tool_call_parser="none") as llm:
        assert (llm.reasoning_parser, llm.tool_call_parser) == ("deepseek_r1", None)
        assert not any("chosen from" in note for note in llm.notes)


def test_a_template_without_marks_gets_no_parser_and_no_line(tiny_model_dir: TinyModelDir) -> None:
    with load(tiny_model_dir()) as llm:
        assert (llm.reasoning_parser, llm.tool_call_parser) == (None, None)
        assert not any("chosen from" in note for note in llm.notes)
        assert parser_of(llm, tools=TOOLS).feed("<tool_call>").content == "<tool_call>"
        assert parser_of(llm).feed("<tool_call>").content == "<tool_call>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reasoning_parser": "qwen9"}, "--reasoning-parser qwen9: not known"),
        ({"tool_call_parser": "herms"}, "--tool-call-parser herms: not known"),
        (
            {"reasoning_parser": "qwen3", "reasoning_config": {"reasoning_end_str": "Enough."}},
            "reasoning_end_str 'Enough.' lacks '</think>', by which --reasoning-parser qwen3",
        ),
        ({"enable_auto_tool_choice": True}, "--enable-auto-tool-choice requires --tool-call-parser"),
    ],
)
def test_wrong_flags_are_refused_before_the_model_is_loaded(
    tiny_model_dir: TinyModelDir, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_model_dir(), **options)


def test_the_reasoning_config_takes_two_texts() -> None:
    given = '{"reasoning_start_str": "<think>", "reasoning_end_str": "I must answer now.</think>"}'
    args = EngineArgs.from_options("m", {"reasoning-config": given})
    assert args.reasoning_config["reasoning_end_str"] == "I must answer now.</think>"
    for wrong in ('{"end": "x"}', '{"reasoning_end_str": 5}', "[]", '{"reasoning_end_str": ""}'):
        with pytest.raises(ConfigError, match="--reasoning-config: "):
            EngineArgs.from_options("m", {"reasoning_config": wrong})


def test_parse_output_stays_a_function_after_its_first_use() -> None:
    for _ in range(2):
        assert engine.parse_output("<think>a</think>b", reasoning_parser="qwen3").text == "b"
