"""Compiles what a request asks of its output, and makes the guides of its completions."""

from collections.abc import Iterable, Mapping

from engine.core.token_guide import MakeGuide
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import THOUGHT_REPETITION, Constraints, RepetitionDetection, StructuredOutput
from engine.text.guide.completion_guide import CompletionGuide, RepetitionDetector
from engine.text.guide.grammar import GrammarCompiler, GrammarMatcher, grammar_text
from engine.text.guide.structural_tag import structural_tag_grammar
from engine.text.guide.thinking_state import ThoughtMarkers, ThoughtTracker, thought_markers
from engine.text.guide.tool_grammar import tool_grammar
from engine.text.parse.output_parser import OutputParser, make_output_parser
from engine.text.parse.parser_choice import MakeParser
from engine.text.parse.reasoning_parsers import ReasoningParser
from engine.text.parse.tool_parsers import TOOL_PARSERS
from engine.text.tokens.tokenizer import Tokenizer

_PROMPT_TAIL = 2048
"""Tokens of a raw prompt searched for an open thought: a prompt may end in a thought to be continued."""


class StructuredOutputManager:
    """Makes guides for one loaded model. Any thread may call :meth:`prepare`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        reasoning_parser: str | None = None,
        tool_call_parser: str | None = None,
        reasoning_config: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._compiler = GrammarCompiler(tokenizer, vocab_size, self._eos_token_ids)
        parser = TOOL_PARSERS.get(tool_call_parser or "")
        self._demanded = parser.demanded if parser else None
        self.markers: ThoughtMarkers | None = thought_markers(reasoning_parser, reasoning_config or {}, tokenizer)
        start = self.markers.reasoning.start.strip() if self.markers else ""
        self._start = tuple(tokenizer.encode(start, add_special_tokens=False)) if start else ()

    def prepare(
        self,
        constraints: Constraints | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        make_parser: MakeParser | None = None,
    ) -> MakeGuide | None:
        """What makes the guides of a request's completions; None where nothing is constrained.

        ``make_parser`` makes what reads the reply, which knows where a thought ends; None for a raw prompt.
        Raises RequestError for a bad grammar and for what this model cannot do.
        """
        constraints = constraints or Constraints()
        thinking = constraints.thinking
        if thinking is not None and thinking.limit is not None and self.markers is None:
            raise RequestError(
                "thinking_token_budget needs a model that thinks: load it with --reasoning-parser NAME or "
                "--reasoning-config.",
                param="thinking_token_budget",
            )
        matcher = self._matcher(constraints.structured, params)
        asked = constraints.repetition
        detection = asked if asked is not None else (THOUGHT_REPETITION if self.markers else RepetitionDetection())
        if matcher is None and not self.markers and not detection.max_pattern_size:
            return None
        markers = self.markers
        if markers is not None and make_parser is None:
            make_parser = self._raw_parser(prompt_token_ids)

        def make() -> CompletionGuide:
            tracker = None
            if markers is not None and make_parser is not None:
                tracker = ThoughtTracker(markers, make_parser(reasoning=markers.reasoning), self._tokenizer)
            return CompletionGuide(
                matcher=None if matcher is None else matcher.another(),
                tracker=tracker,
                budget=None if thinking is None else thinking.limit,
                own_budget=thinking is not None,
                repetition=RepetitionDetector(detection) if detection.max_pattern_size else None,
                repetition_everywhere=asked is not None,
                start_token_ids=self._start,
                eos_token_ids=self._eos_token_ids,
            )

        return make

    def _raw_parser(self, prompt_token_ids: list[int]) -> MakeParser:
        """For output that nobody parses: thoughts are found in it, calls are not."""
        tail = self._tokenizer.decode(prompt_token_ids[-_PROMPT_TAIL:], skip_special_tokens=False)

        def make_parser(*, reasoning: ReasoningParser | None = None) -> OutputParser:
            return make_output_parser(
                reasoning_parser=reasoning,
                tool_call_parser=None,
                prompt_suffix=tail,
                special_tokens=self._tokenizer.special_tokens,
            )

        return make_parser

    def _matcher(self, structured: StructuredOutput | None, params: SamplingParams) -> GrammarMatcher | None:
        if structured is None:
            return None
        if params.allowed_token_ids is not None:
            raise RequestError("allowed_token_ids and structured output exclude each other.", param="allowed_token_ids")
        calls, tag = structured.tool_calls, structured.structural_tag
        param = "structured_outputs" if calls is None else "tools"
        try:
            if calls is not None:
                grammar = tool_grammar(self._demanded, calls, self._compiler.mark)
            elif tag is not None:
                grammar = structural_tag_grammar(tag, self._compiler.mark)
            else:
                grammar = grammar_text(structured)
            return self._compiler.compile(grammar, param)
        except (RecursionError, UnicodeEncodeError) as error:
            what = "too deeply nested" if isinstance(error, RecursionError) else "not valid Unicode"
            raise RequestError(f"bad grammar or schema: {what}", param=param) from None
