"""Compiles what a request asks of its output, and makes the guides of its completions."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from engine.core.token_guide import MakeGuide
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import (
    THOUGHT_REPETITION,
    Constraints,
    RepetitionDetection,
    StructuredOutput,
    ToolCalls,
)
from engine.text.guide.completion_guide import CompletionGuide, RepetitionDetector
from engine.text.guide.grammar import GrammarCompiler, GrammarMatcher, Matcher, grammar_text, tokenizer_problem
from engine.text.guide.joined_matchers import EitherMatcher, OpeningMatcher
from engine.text.guide.lark_text import lark_string
from engine.text.guide.structural_tag import structural_tag_grammar
from engine.text.guide.thinking_state import ThoughtMarkers, ThoughtTracker, thought_markers
from engine.text.guide.tool_grammar import arguments_grammar, opening_grammar, tool_grammar
from engine.text.parse.output_parser import OutputParser, make_output_parser
from engine.text.parse.parser_choice import MakeParser
from engine.text.parse.reasoning_parsers import ReasoningParser
from engine.text.parse.tool_parsers import HARMONY_CALLS, TOOL_PARSERS
from engine.text.parse.tool_parsers.base import DemandedForm
from engine.text.tokens.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

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
        self._parser = TOOL_PARSERS.get(tool_call_parser or "")
        self._form = self._parser.demanded if self._parser else None
        self.note = tokenizer_problem(tokenizer)
        """A line for the user where this model's tokenizer cannot be constrained."""
        if self.note:
            logger.warning("%s", self.note)
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
        matcher = self._matcher(constraints, params)
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

    def _matcher(self, constraints: Constraints, params: SamplingParams) -> Matcher | None:
        structured = constraints.structured
        if structured is None:
            return None
        if params.allowed_token_ids is not None:
            raise RequestError("allowed_token_ids and structured output exclude each other.", param="allowed_token_ids")
        param = "structured_outputs" if structured.tool_calls is None else "tools"
        try:
            if structured.tool_calls is not None:
                return self._calls(structured.tool_calls)
            answer = self._compiler.compile(structured_grammar(structured, None, self._compiler.mark, set()), param)
            call = None if constraints.calls is None else self._possible_call(constraints.calls)
            return answer if call is None else EitherMatcher([answer, call])
        except (RecursionError, UnicodeEncodeError) as error:
            what = "too deeply nested" if isinstance(error, RecursionError) else "not valid Unicode"
            raise RequestError(f"bad grammar or schema: {what}", param=param) from None

    def _calls(self, calls: ToolCalls) -> GrammarMatcher:
        """Demanded calls. Raises RequestError that names the tool."""
        try:
            return self._compiler.compile(tool_grammar(self._form, calls, self._compiler.mark, set()), "tools")
        except RequestError:
            for function in calls.callable_functions:
                if why := self._refusal(function):
                    raise RequestError(
                        f"tools: the parameters of {function['name']!r} cannot be demanded: {why}", param="tools"
                    ) from None
            raise

    def _refusal(self, function: Mapping[str, object]) -> str | None:
        """Why no grammar can be made of a function's parameters, if so."""
        try:
            self._compiler.compile(arguments_grammar(function, set()), "tools")
        except RequestError as error:
            return str(error)
        return None

    def _possible_call(self, calls: ToolCalls) -> Matcher | None:
        """A call that the model may make in place of an answer: in a form with a grammar, else as it begins.

        None where it is told from an answer by what holds it (harmony's messages), or where nothing reads calls.
        """
        if self._parser is None or self._parser is HARMONY_CALLS or not calls.functions:
            return None
        if self._form is None:
            bare = self._parser.bare_opening
            names = [str(function["name"]) for function in calls.callable_functions] if bare else []
            openings = [*self._parser.starts, *(bare.replace("NAME", name) for name in names)]
            return OpeningMatcher(self._compiler.compile(opening_grammar(openings, self._compiler.marks), "tools"))
        try:
            return self._calls(calls)
        except RequestError:  # then these tools get any arguments, as they do where no format is asked for
            tools = [
                {**function, "parameters": {"type": "object"}} if self._refusal(function) else function
                for function in calls.callable_functions
            ]
            return self._calls(replace(calls, tools=tuple(tools)))


def structured_grammar(
    structured: StructuredOutput, form: DemandedForm | None, mark: Callable[[str], str], relaxed: set[str]
) -> str:
    """llguidance's grammar of any kind. ``relaxed`` gets what it cannot enforce. Raises RequestError."""
    if structured.tool_calls is not None:
        return tool_grammar(form, structured.tool_calls, mark, relaxed)
    if structured.structural_tag is not None:
        return structural_tag_grammar(structured.structural_tag, mark, relaxed)
    return grammar_text(structured, relaxed)


def grammar_notes(constraints: Constraints | None) -> list[str]:
    """What a request's grammar could not enforce, a line for each."""
    relaxed: set[str] = set()
    if constraints is not None and constraints.structured is not None:
        structured_grammar(constraints.structured, None, lark_string, relaxed)
    return [f"{keyword}: not enforced, the grammar cannot say it" for keyword in sorted(relaxed)]
