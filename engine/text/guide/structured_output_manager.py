"""Guides: a grammar that waits for the end of the thought, a thinking budget, an end to repetition.

A guide belongs to one completion and stays with it (also when the request loses its blocks). All
decisions depend on the completion's own tokens only, never on how steps overlapped: where a token
may already be in flight when a thought is found to be over its bounds, that token is always let pass.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from engine.core.token_guide import COMPLETE, REPETITION_STOP_REASON, MakeGuide, ThinkingCut
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import THOUGHT_REPETITION, Constraints, RepetitionDetection, StructuredOutput
from engine.text.guide.grammar import GrammarCompiler, Matcher, grammar_text
from engine.text.guide.repetition import RepetitionFinder
from engine.text.guide.structural_tag import structural_tag_grammar
from engine.text.guide.thinking_state import Place, ThoughtMarkers, ThoughtTracker, place_after_prompt, thought_markers
from engine.text.guide.tool_grammar import tool_grammar
from engine.text.parse.tool_parsers import TOOL_PARSERS
from engine.text.tokens.tokenizer import Tokenizer


class Guide:
    """See :class:`engine.core.token_guide.TokenGuide`."""

    def __init__(
        self,
        *,
        matcher: Matcher | None = None,
        tracker: ThoughtTracker | None = None,
        budget: int | None = None,
        own_budget: bool = False,
        repetition: RepetitionFinder | None = None,
        repetition_everywhere: bool = False,
        start_token_ids: tuple[int, ...] = (),
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._matcher = matcher
        self._tracker = tracker
        self._budget = budget
        self._own_budget = own_budget
        self._repetition = repetition
        self._repetition_everywhere = repetition_everywhere
        self._start = start_token_ids
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._forced: list[int] = []
        self._num_passing = 0
        self._ending: ThinkingCut | None = None
        self.thinking_cut: ThinkingCut | None = None
        self.error: str | None = None
        if self._place is Place.THOUGHT and self._over_budget:
            self._end_thought("budget", waited=True)

    @property
    def waits(self) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        if self._matcher is not None or self._forced:
            return True
        if self._tracker is None or self._budget is None or self._place is Place.ANSWER:
            return False
        return self._tracker.num_tokens + (self._place is Place.THOUGHT) >= self._budget

    @property
    def forced_token(self) -> int | None:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        return self._forced[0] if self._forced and not self._num_passing else None

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`. A thought is free but for its request's end."""
        if self._matcher is None or self.forced_token is not None or self.error is not None:
            return False
        if self._place is Place.THOUGHT:
            words[:] = -1
            _clear_bits(words, self._eos_token_ids)
            return True
        self._matcher.fill_bitmask(words)
        if self._place is Place.BEFORE and self._start:
            words[self._start[0] // 32] |= np.uint32(1 << self._start[0] % 32).astype(np.int32)
        return True

    def advance(self, token_id: int) -> str | None:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        waited = self.waits
        if self._forced and not self._num_passing:
            del self._forced[0]
            if self._ending is not None:
                self._inject()
                return None
        self._num_passing = max(0, self._num_passing - 1)
        before = self._place
        if self._tracker is not None:
            self._tracker.add(token_id)
        if self._place is Place.THOUGHT:
            self._think(token_id, begins=before is not Place.THOUGHT, waited=waited)
            return None
        if before is Place.THOUGHT:  # it ended by itself: what was to end it is not needed any more
            self._forced, self._num_passing, self._ending = [], 0, None
            return None
        return self._answer(token_id)

    def finish_thinking(self, in_flight: bool) -> None:
        """See :class:`engine.core.token_guide.TokenGuide`. A thought that has not begun gets no budget."""
        if self._tracker is None:
            return
        self._budget, self._own_budget = 0, True
        if self._place is Place.THOUGHT and self._ending is None:
            self._end_thought("request", waited=not in_flight)

    @property
    def thinking(self) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        return self._place is Place.THOUGHT

    def set_default_budget(self, budget: int | None, *, in_flight: bool) -> None:
        """See :class:`TokenGuide`. A budget smaller than what was thought already ends the thought."""
        if self._own_budget or self._tracker is None or budget == self._budget:
            return
        self._budget = budget
        if self._place is Place.THOUGHT and self._over_budget and self._ending is None:
            self._end_thought("budget", waited=not in_flight)

    @property
    def _place(self) -> Place:
        return Place.ANSWER if self._tracker is None else self._tracker.place

    @property
    def _over_budget(self) -> bool:
        return self._budget is not None and self._tracker is not None and self._tracker.num_tokens >= self._budget

    def _think(self, token_id: int, *, begins: bool, waited: bool) -> None:
        if begins and self._matcher is not None:
            self._matcher.reset()
        if self._ending is None:
            if self._over_budget:
                self._end_thought("budget", waited=waited)
            elif not begins and self._repetition is not None and self._repetition.add(token_id):
                self._end_thought("repetition", waited=waited)

    def _answer(self, token_id: int) -> str | None:
        if self._matcher is not None:
            if self._begins_start_marker(token_id):
                self._forced = list(self._start[1:])
                return None
            if not self._matcher.consume(token_id):
                self.error = self._matcher.error or "a token that the grammar forbids"
                return COMPLETE
            if self._matcher.complete:
                return COMPLETE
        if self._repetition_everywhere and self._repetition is not None and self._repetition.add(token_id):
            return REPETITION_STOP_REASON
        return None

    def _begins_start_marker(self, token_id: int) -> bool:
        """Whether this is the first of a start marker's tokens, not one of the grammar's."""
        assert self._matcher is not None
        marker = self._place is Place.BEFORE and bool(self._start) and token_id == self._start[0]
        return marker and not self._matcher.accepts(token_id)

    def _end_thought(self, why: ThinkingCut, *, waited: bool) -> None:
        assert self._tracker is not None, "a thought has markers"
        self._forced = list(self._tracker.markers.injected)
        self._num_passing = 0 if waited else 1
        self._ending = why

    def _inject(self) -> None:
        """One token of the end marker was written."""
        assert self._tracker is not None
        self.thinking_cut = self._ending
        if not self._forced:
            self._ending = None
            self._tracker.end()


class Guides:
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
        start = self.markers.start if self.markers else ""
        self._start = tuple(tokenizer.encode(start, add_special_tokens=False)) if start else ()

    def prepare(
        self, constraints: Constraints | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> MakeGuide | None:
        """What makes the guides of a request's completions; None where nothing is constrained.

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
        place = place_after_prompt(markers, prompt_token_ids, self._tokenizer) if markers else Place.ANSWER

        def make() -> Guide:
            return Guide(
                matcher=None if matcher is None else matcher.another(),
                tracker=None if markers is None else ThoughtTracker(markers, place, self._tokenizer),
                budget=None if thinking is None else thinking.limit,
                own_budget=thinking is not None,
                repetition=RepetitionFinder(detection) if detection.max_pattern_size else None,
                repetition_everywhere=asked is not None,
                start_token_ids=self._start,
                eos_token_ids=self._eos_token_ids,
            )

        return make

    def _matcher(self, structured: StructuredOutput | None, params: SamplingParams) -> Matcher | None:
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


def _clear_bits(words: NDArray[np.int32], token_ids: NDArray[np.int64]) -> None:
    for token_id in token_ids.tolist():
        words[token_id // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token_id % 32)).astype(np.int32)
