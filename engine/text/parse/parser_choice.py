"""Which parsers a model gets: those named by flags, else those recognised in its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import ConfigError
from engine.params.engine_args import EngineArgs
from engine.text.parse.output_parser import OutputParser, ToolChoice, make_output_parser, parser_named
from engine.text.parse.reasoning_parsers import REASONING_PARSERS, detect_reasoning_parser
from engine.text.parse.tool_parsers import TOOL_PARSERS, detect_tool_parser
from engine.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ParserChoice:
    """The names in use (None: no parser), a line about them for the user, and the model's special tokens."""

    reasoning_parser: str | None
    tool_call_parser: str | None
    note: str | None
    special_tokens: frozenset[str]

    @classmethod
    def of_model(cls, args: EngineArgs, template: str | None, tokenizer: Tokenizer) -> Self:
        """Choose for a model. Raises ConfigError for unknown names and for tools without a parser."""
        parser_named(REASONING_PARSERS, args.reasoning_parser, "reasoning_parser")
        parser_named(TOOL_PARSERS, args.tool_call_parser, "tool_call_parser")
        added = tokenizer.hf.get_added_tokens_decoder().values()
        vocab = {token.content for token in added}
        reasoning = args.reasoning_parser or detect_reasoning_parser(template, vocab)
        tools = args.tool_call_parser or detect_tool_parser(template, vocab)
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
        return cls(reasoning, tools, note, frozenset(token.content for token in added if token.special))

    def make(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: ToolChoice,
        prompt: str,
        parallel_tool_calls: bool,
    ) -> OutputParser:
        """The parser for one completion of a request (see :func:`make_output_parser`)."""
        return make_output_parser(
            reasoning_parser=self.reasoning_parser,
            tool_call_parser=self.tool_call_parser,
            tools=tools,
            tool_choice=tool_choice,
            prompt_suffix=prompt,
            parallel_tool_calls=parallel_tool_calls,
            special_tokens=self.special_tokens,
        )
