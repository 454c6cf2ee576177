"""Tool calls in model output: vLLM's parser names (and mlx-lm's), and which of them a template uses."""

from collections.abc import Collection

from engine.text.parse.tool_parsers import json_calls, named_calls, xml_calls
from engine.text.parse.tool_parsers.base import ToolParser
from engine.text.parse.tool_parsers.json_calls import JsonCalls
from engine.text.parse.tool_parsers.pythonic import OLMO3, PYTHONIC

__all__ = ["HARMONY_CALLS", "TOOL_PARSERS", "ToolParser", "detect_tool_parser"]

HARMONY_CALLS = JsonCalls(("<|channel|>commentary to=",))
"""Only a name: :mod:`engine.text.parse.harmony` reads gpt-oss's calls together with its channels."""

TOOL_PARSERS: dict[str, ToolParser] = {
    **dict.fromkeys(("hermes", "qwen2_5", "json_tools", "granite4", "ernie45"), json_calls.HERMES),
    **dict.fromkeys(("jamba", "hunyuan_a13b", "minimax"), json_calls.JAMBA),
    **dict.fromkeys(("llama3_json", "llama4_json"), json_calls.LLAMA3_JSON),
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "nemotron_v3", "step3p5"), xml_calls.QWEN3_CODER),
    **dict.fromkeys(("glm45", "glm47", "laguna"), xml_calls.GLM45),
    **dict.fromkeys(("pythonic", "llama4_pythonic", "lfm2"), PYTHONIC),
    "cohere_command3": json_calls.COHERE,
    "deepseek_v3": named_calls.DEEPSEEK_V3,
    "deepseek_v31": named_calls.DEEPSEEK_V31,
    "deepseek_v32": xml_calls.DEEPSEEK_V32,
    "deepseek_v4": xml_calls.DEEPSEEK_V4,
    **dict.fromkeys(("function_gemma", "functiongemma"), named_calls.FUNCTION_GEMMA),
    "gemma4": named_calls.GEMMA4,
    "gigachat3": json_calls.GIGACHAT3,
    "granite": json_calls.GRANITE,
    "granite-20b-fc": json_calls.GRANITE_20B_FC,
    "internlm": json_calls.INTERNLM,
    "kimi_k2": named_calls.KIMI_K2,
    "kimi_k3": xml_calls.KIMI_K3,
    "longcat": xml_calls.LONGCAT,
    "minicpm5": xml_calls.MINICPM5,
    "minimax_m2": xml_calls.MINIMAX_M2,
    "mistral": named_calls.MISTRAL,
    "muse_spark": xml_calls.MUSE_SPARK,
    "olmo3": OLMO3,
    "openai": HARMONY_CALLS,
    "phi4_mini_json": json_calls.PHI4_MINI,
    "seed_oss": xml_calls.SEED_OSS,
    "xlam": json_calls.XLAM,
}

_BY_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("glm45", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek_v4", ("｜DSML｜", "'tool_calls>")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("openai", ("<|channel|>commentary",)),
    ("openai", ("to=functions", "<|channel|>")),
    ("cohere_command3", ("<|START_ACTION|>",)),
    ("internlm", ("<|action_start|>",)),
    ("jamba", ("<tool_calls>",)),
    ("phi4_mini_json", ("functools",)),
    ("hermes", ("<tool_call>", "tool_call")),
    ("granite", ("<|tool_call|>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|eot_id|>", '"parameters": ')),
)
"""Marks that a template of the parser holds; the first line that fits counts."""


def detect_tool_parser(template: str | None, vocab: Collection[str] = ()) -> str | None:
    """The parser for a model's chat template, else for its added tokens; None where neither shows a known form."""
    template = template or ""
    for name, marks in _BY_MARKS:
        if all(mark in template for mark in marks):
            return name
    if {"<|open|>", "<|close|>", "<|sep|>"} <= set(vocab):
        return "kimi_k3"
    return "pythonic" if {"<|tool_call_start|>", "<|tool_call_end|>"} <= set(vocab) else None
