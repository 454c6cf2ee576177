"""Constrains one completion: a grammar that waits for the end of the thought, a thinking budget, repetition detection.

A guide belongs to one completion and stays with it, also when the request is preempted. All decisions
depend on the completion's own tokens only, never on how steps overlapped: where a token may already be
in flight when a thought is found to exceed its budget, that token is always let through.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.core.token_guide import COMPLETE, REPETITION_STOP_REASON, ThinkingCut
from engine.params.structured_outputs import RepetitionDetection
from engine.text.guide.grammar import Matcher
from engine.text.guide.thinking_state import ThoughtTracker
from engine.text.parse.output_parser import ThinkingState

_HISTORY_ROOM = 4096
"""How many tokens are added to the history before its end is moved back to the beginning of the array."""


class RepetitionDetector:
    """Detects repeating token sequences: whether the latest tokens are one pattern ``min_count`` times in a row.

    For each pattern size it counts how many of the latest tokens equal the token one pattern earlier: a
    pattern has been repeated k times when that run is k - 1 patterns long. One small vector per token.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        self._smallest, self._largest = max(1, detection.min_pattern_size), detection.max_pattern_size
        # In the order of the history: the largest pattern first.
        self._needed = np.arange(self._largest, self._smallest - 1, -1) * (detection.min_count - 1)
        self._runs = np.zeros(len(self._needed), dtype=np.int64)
        self._history = np.full(self._largest + _HISTORY_ROOM, -1, dtype=np.int64)
        self._end = self._largest

    def add(self, token_id: int) -> bool:
        """Add a token; returns whether the sequence that ends with it repeats."""
        if self._end == len(self._history):
            self._history[: self._largest] = self._history[-self._largest :]
            self._end = self._largest
        end = self._end
        self._runs += 1
        self._runs *= self._history[end - self._largest : end - self._smallest + 1] == token_id
        self._history[end] = token_id
        self._end = end + 1
        return bool((self._runs >= self._needed).any())


class CompletionGuide:
    """The :class:`engine.core.token_guide.TokenGuide` of one completion.

    ``own_budget``: the request itself set the budget, or asked for none. ``repetition_everywhere``: also an
    answer that repeats itself is ended. ``start_token_ids`` are the tokens of the mark that begins a thought.
    """

    def __init__(
        self,
        *,
        matcher: Matcher | None = None,
        tracker: ThoughtTracker | None = None,
        budget: int | None = None,
        own_budget: bool = False,
        repetition: RepetitionDetector | None = None,
        repetition_everywhere: bool = False,
        start_token_ids: tuple[int, ...] = (),
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._matcher = matcher
        self._called = False
        """Whether a call was made inside a thought: then there is no answer to be constrained."""
        self._tracker = tracker
        self._budget = budget
        self._own_budget = own_budget
        self._repetition = repetition
        self._repetition_everywhere = repetition_everywhere
        self._start = start_token_ids
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._forced: list[int] = []
        self._num_passing = 0
        self._reason: ThinkingCut = "budget"
        self._ending: ThinkingCut | None = None
        self.thinking_cut: ThinkingCut | None = None
        self.error: str | None = None
        self._end_if_over_budget(waited=True)

    @property
    def waits(self) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        if self._matcher is not None or self._forced:
            return True
        if self._tracker is None or self._budget is None or self._state in (ThinkingState.ANSWER, ThinkingState.CALL):
            return False
        return self._tracker.num_tokens + (self._state is ThinkingState.THOUGHT) >= self._budget

    @property
    def forced_token(self) -> int | None:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        return self._forced[0] if self._forced and not self._num_passing else None

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`. A thought is free but for its request's end."""
        if self._matcher is None or self.forced_token is not None or self.error is not None:
            return False
        if self._called or self._state is ThinkingState.CALL:
            return False
        if self._state is ThinkingState.THOUGHT:
            words[:] = -1
            _clear_bits(words, self._eos_token_ids)
            return True
        self._matcher.fill_bitmask(words)
        if self._state is ThinkingState.BEFORE and self._start:
            words[self._start[0] // 32] |= np.uint32(1 << self._start[0] % 32).astype(np.int32)
        return True

    def advance(self, token_id: int) -> str | None:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        waited = self.waits
        if self._forced and not self._num_passing:
            del self._forced[0]
            if self._ending is not None:
                self._inject(token_id)
                return None
        self._num_passing = max(0, self._num_passing - 1)
        before = self._state
        if self._tracker is not None:
            self._tracker.add(token_id)
            if self._ending is not None and not self._tracker.may_be_ended:
                # The model ended the thought, or calls a tool: no end is forced.
                self._forced, self._num_passing, self._ending = [], 0, None
        self._called |= before is ThinkingState.CALL and self._state is ThinkingState.ANSWER
        if self._state is ThinkingState.THOUGHT:
            self._think(token_id, begins=before is not ThinkingState.THOUGHT, waited=waited)
            return None
        return None if before in (ThinkingState.THOUGHT, ThinkingState.CALL) else self._answer(token_id)

    def finish_thinking(self, in_flight: bool) -> None:
        """See :class:`engine.core.token_guide.TokenGuide`. A thought that has not begun gets no budget."""
        if self._tracker is None:
            return
        self._budget, self._own_budget, self._reason = 0, True, "request"
        self._end_if_over_budget(waited=not in_flight)

    @property
    def thinking(self) -> bool:
        """See :class:`engine.core.token_guide.TokenGuide`."""
        return self._state is ThinkingState.THOUGHT

    def set_default_budget(self, budget: int | None, *, in_flight: bool) -> None:
        """See :class:`TokenGuide`. A budget smaller than what was thought already ends the thought."""
        if self._own_budget or self._tracker is None or budget == self._budget:
            return
        self._budget = budget
        self._end_if_over_budget(waited=not in_flight)

    @property
    def _state(self) -> ThinkingState:
        return ThinkingState.ANSWER if self._tracker is None else self._tracker.state

    @property
    def _may_be_ended(self) -> bool:
        return self._tracker is not None and self._tracker.may_be_ended and self._ending is None

    def _end_if_over_budget(self, *, waited: bool) -> bool:
        """End a thought that is longer than its budget; in a header that may be a call's, the next tokens decide."""
        over = self._tracker is not None and self._budget is not None and self._tracker.num_tokens >= self._budget
        if over and self._may_be_ended:
            self._end_thought(self._reason, waited=waited)
            return True
        return False

    def _think(self, token_id: int, *, begins: bool, waited: bool) -> None:
        if begins and self._matcher is not None:
            self._matcher.reset()
        if self._end_if_over_budget(waited=waited) or self._ending is not None:
            return
        repeats = not begins and self._repetition is not None and self._repetition.add(token_id)
        if repeats and self._may_be_ended:
            self._end_thought("repetition", waited=waited)

    def _answer(self, token_id: int) -> str | None:
        if self._matcher is not None and not self._called:
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
        marker = self._state is ThinkingState.BEFORE and bool(self._start) and token_id == self._start[0]
        return marker and not self._matcher.accepts(token_id)

    def _end_thought(self, why: ThinkingCut, *, waited: bool) -> None:
        assert self._tracker is not None, "a thought has markers"
        self._forced = list(self._tracker.markers.injected)
        self._num_passing = 0 if waited else 1
        self._ending = why

    def _inject(self, token_id: int) -> None:
        """One token of the end marker was written."""
        assert self._tracker is not None, "a thought is followed"
        self._tracker.add(token_id)
        self.thinking_cut = self._ending
        if not self._forced:
            self._ending = None


def _clear_bits(words: NDArray[np.int32], token_ids: NDArray[np.int64]) -> None:
    for token_id in token_ids.tolist():
        words[token_id // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token_id % 32)).astype(np.int32)
