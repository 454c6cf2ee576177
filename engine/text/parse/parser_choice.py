"""Which parsers a model gets: those named by flags, else those recognised in its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from engine.errors import ConfigError
from engine.params.engine_args import EngineArgs
from engine.text.parse.output_parser import OutputParser, ToolChoice, make_output_parser, parser_named
from engine.text.parse.reasoning_parsers import REASONING_PARSERS, ReasoningParser, detect_reasoning_parser
from engine.text.parse.tool_parsers import TOOL_PARSERS, detect_tool_parser
from engine.text.template.chat_template import ChatTemplate
from engine.text.tokens.tokenizer import Tokenizer


class MakeParser(Protocol):
    """Makes a fresh parser for one completion of a request."""

    def __call__(self, *, reasoning: ReasoningParser | None = None) -> OutputParser:
        """``reasoning``: in place of the model's own reasoning parser."""


@dataclass(frozen=True)
class ParserChoice:
    """The names in use (None: no parser), a line about them for the user, and the model's special tokens."""

    reasoning_parser: str | None
    tool_call_parser: str | None
    note: str | None
    special_tokens: frozenset[str]

    @classmethod
    def of_model(cls, args: EngineArgs, template: ChatTemplate, tokenizer: Tokenizer) -> Self:
        """Choose for a model. Raises ConfigError for unknown names and for tools without a parser."""
        parser_named(REASONING_PARSERS, args.reasoning_parser, "reasoning_parser")
        parser_named(TOOL_PARSERS, args.tool_call_parser, "tool_call_parser")
        added = tokenizer.hf.get_added_tokens_decoder().values()
        vocab = {token.content for token in added}
        reasoning = args.reasoning_parser or detect_reasoning_parser(template.source, vocab)
        _check_reasoning_config(args, reasoning)
        tools = args.tool_call_parser or detect_tool_parser(template.chosen(None, with_tools=True).source, vocab)
        found = {
            "--reasoning-parser": None if args.reasoning_parser else reasoning,
            "--tool-call-parser": None if args.tool_call_parser else tools,
        }
        reasoning, tools = (None if name == "none" else name for name in (reasoning, tools))
        if args.enable_auto_tool_choice and tools is None:
            raise ConfigError(
                "--enable-auto-tool-choice requires --tool-call-parser: the chat template shows no known call format",
                flag="enable_auto_tool_choice",
                value=True,
            )
        chosen = " ".join(f"{flag} {name}" for flag, name in found.items() if name)
        note = f"chosen from the chat template: {chosen}" if chosen else None
        return cls(reasoning, tools, note, tokenizer.special_tokens)

    def make(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: ToolChoice,
        prompt: str,
        parallel_tool_calls: bool,
        calls_in_thoughts: bool = True,
        reasoning: ReasoningParser | None = None,
    ) -> OutputParser:
        """The parser for one completion of a request (see :func:`make_output_parser` and :class:`MakeParser`)."""
        return make_output_parser(
            reasoning_parser=reasoning or self.reasoning_parser,
            tool_call_parser=self.tool_call_parser,
            tools=tools,
            tool_choice=tool_choice,
            prompt_suffix=prompt,
            parallel_tool_calls=parallel_tool_calls,
            calls_in_thoughts=calls_in_thoughts,
            special_tokens=self.special_tokens,
        )


def _check_reasoning_config(args: EngineArgs, reasoning_parser: str | None) -> None:
    """A thought that is ended by a text that its parser does not take for an end would go on."""
    parser = REASONING_PARSERS.get(reasoning_parser or "")
    for key, mark in (("reasoning_start_str", parser.start), ("reasoning_end_str", parser.end)) if parser else ():
        given = args.reasoning_config.get(key)
        if given is not None and mark not in given:
            raise ConfigError(
                f"--reasoning-config: {key} {given!r} lacks {mark!r}, by which --reasoning-parser {reasoning_parser} "
                "reads thoughts; put it in, or name another parser",
                flag="reasoning_config",
                value=dict(args.reasoning_config),
            )
