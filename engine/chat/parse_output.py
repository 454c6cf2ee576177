"""``engine.parse_output``: raw model output to a Reply, without a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.chat.reply import read_whole
from engine.outputs import Reply
from engine.text.parse.output_parser import ToolChoice, make_output_parser


def parse_output(
    text: str,
    *,
    reasoning_parser: str | None = None,
    tool_call_parser: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice = None,
    prompt_suffix: str = "",
    parallel_tool_calls: bool = True,
    chunks: Iterable[str] | None = None,
    finish_reason: str = "stop",
) -> Reply:
    """What the parsers make of raw output ``text``, as a reply.

    ``chunks`` feeds it in these pieces (they must make up ``text``), as streaming would; the reply is
    the same. Where no ``tools`` are given but a tool parser is, calls to any function are looked for.
    Call ids are ``call_0``, ``call_1`` …. Raises ConfigError for unknown parser names and ValueError
    for chunks of another text.
    """
    pieces = [text] if chunks is None else list(chunks)
    if "".join(pieces) != text:
        raise ValueError("chunks must make up the text, but joined they give another")
    parser = make_output_parser(
        reasoning_parser=reasoning_parser,
        tool_call_parser=tool_call_parser,
        tools=tools if tools is not None or tool_call_parser is None else ANY_TOOL,
        tool_choice=tool_choice,
        prompt_suffix=prompt_suffix,
        parallel_tool_calls=parallel_tool_calls,
        make_call_id=lambda index, _: f"call_{index}",
    )
    return read_whole(parser, pieces, finish_reason)


ANY_TOOL: tuple[Mapping[str, Any], ...] = ({"type": "function", "function": {"name": ""}},)
