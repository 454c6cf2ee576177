"""Tool calls in model output: vLLM's parser names (and mlx-lm's), and which of them a template uses."""

from collections.abc import Collection

from engine.text.parse.tool_parsers import json_calls, named_calls, xml_formats
from engine.text.parse.tool_parsers.base import ToolParser
from engine.text.parse.tool_parsers.json_calls import HARMONY_CALLS
from engine.text.parse.tool_parsers.pythonic import OLMO3, PYTHONIC

__all__ = ["HARMONY_CALLS", "TOOL_PARSERS", "ToolParser", "detect_tool_parser"]

TOOL_PARSERS: dict[str, ToolParser] = {
    "minimax_m2": xml_formats.MINIMAX_M2,
    "gemma4": named_calls.GEMMA4,
    **dict.fromkeys(("function_gemma", "functiongemma"), named_calls.FUNCTION_GEMMA),
    "longcat": xml_formats.LONGCAT,
    "muse_spark": xml_formats.MUSE_SPARK,
    **dict.fromkeys(("glm45", "glm47", "laguna"), xml_formats.GLM45),
    "kimi_k3": xml_formats.KIMI_K3,
    **dict.fromkeys(("pythonic", "llama4_pythonic", "lfm2"), PYTHONIC),
    "seed_oss": xml_formats.SEED_OSS,
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "nemotron_v3", "step3p5"), xml_formats.QWEN3_CODER),
    "kimi_k2": named_calls.KIMI_K2,
    "deepseek_v4": xml_formats.DEEPSEEK_V4,
    "deepseek_v32": xml_formats.DEEPSEEK_V32,
    "deepseek_v3": named_calls.DEEPSEEK_V3,
    "deepseek_v31": named_calls.DEEPSEEK_V31,
    "minicpm5": xml_formats.MINICPM5,
    "mistral": named_calls.MISTRAL,
    "openai": HARMONY_CALLS,
    "cohere_command3": json_calls.COHERE,
    "internlm": json_calls.INTERNLM,
    **dict.fromkeys(("jamba", "hunyuan_a13b", "minimax"), json_calls.JAMBA),
    "phi4_mini_json": json_calls.PHI4_MINI,
    **dict.fromkeys(("hermes", "qwen2_5", "json_tools", "granite4", "ernie45"), json_calls.HERMES),
    "granite": json_calls.GRANITE,
    **dict.fromkeys(("llama3_json", "llama4_json"), json_calls.LLAMA3_JSON),
    "gigachat3": json_calls.GIGACHAT3,
    "granite-20b-fc": json_calls.GRANITE_20B_FC,
    "olmo3": OLMO3,
    "xlam": json_calls.XLAM,
}
"""Templates are matched in this order, and the first parser that recognises itself is chosen, under the first of its
names. So a format whose marks are part of another's comes after that one."""


def detect_tool_parser(template: str | None, vocab: Collection[str] = ()) -> str | None:
    """The parser for a model's chat template, else for its added tokens; None where neither shows a known format."""
    by_template = (name for name, parser in TOOL_PARSERS.items() if parser.in_template(template or ""))
    by_vocab = (name for name, parser in TOOL_PARSERS.items() if parser.in_vocab(vocab))
    return next(by_template, None) or next(by_vocab, None)
