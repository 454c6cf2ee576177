"""Tool calls in model output: vLLM's parser names (and mlx-lm's), and which of them a template uses."""

from collections.abc import Collection

from engine.text.tool_parsers.base import ToolParser
from engine.text.tool_parsers.json_calls import (
    COHERE,
    GRANITE,
    HERMES,
    INTERNLM,
    JAMBA,
    LLAMA3_JSON,
    PHI4_MINI,
    JsonCalls,
)

__all__ = ["HARMONY_CALLS", "TOOL_PARSERS", "ToolParser", "detect_tool_parser"]

HARMONY_CALLS = JsonCalls(("<|channel|>commentary to=",))
"""Only a name: :mod:`engine.text.harmony` reads gpt-oss's calls together with its channels."""

TOOL_PARSERS: dict[str, ToolParser] = {
    **dict.fromkeys(("hermes", "qwen2_5", "json_tools"), HERMES),
    "llama3_json": LLAMA3_JSON,
    "granite": GRANITE,
    "phi4_mini_json": PHI4_MINI,
    "jamba": JAMBA,
    "internlm": INTERNLM,
    "openai": HARMONY_CALLS,
    "cohere_command3": COHERE,
}


_BY_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (("hermes", ("<tool_call>", "tool_calls")),)


def detect_tool_parser(template: str | None, vocab: Collection[str] = ()) -> str | None:
    """The parser for a model's chat template, else for its tokens; None where neither shows a form that is known."""
    template = template or ""
    for name, marks in _BY_MARKS:
        if all(mark in template for mark in marks):
            return name
    return "hermes" if {"<tool_call>", "</tool_call>"} <= set(vocab) and "tools" in template else None
