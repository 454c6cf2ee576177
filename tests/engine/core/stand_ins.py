"""What stands in for parts of the engine around its core. mypy holds them to the protocols that they stand for."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.core.scheduler import StepMemory
from engine.core.token_guide import COMPLETE, ThinkingCut, TokenGuide


class FreeGuide(TokenGuide):
    """A guide that constrains nothing, never waits and never ends; others change a part of that."""

    def __init__(self, waits: bool = False, forced: int | None = None) -> None:
        self._waits = waits
        self._forced = forced

    @property
    def waits(self) -> bool:
        return self._waits

    @property
    def forced_token(self) -> int | None:
        return self._forced

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        return False

    def advance(self, token_id: int) -> str | None:
        return None

    @property
    def thinking(self) -> bool:
        return False

    def set_default_budget(self, budget: int | None, *, in_flight: bool) -> None:
        raise AssertionError("nobody here changes a thinking budget")

    def finish_thinking(self, in_flight: bool) -> None:
        raise AssertionError("nobody here ends a thought")

    @property
    def thinking_cut(self) -> ThinkingCut | None:
        return None

    @property
    def error(self) -> str | None:
        return None


class WaitingGuide(FreeGuide):
    """Waits for its tokens' values between its ``first`` and ``last`` token, and ends after ``stop`` tokens.

    ``ends``: why the completion is over at a token, if it is.
    """

    def __init__(
        self,
        first: int = 0,
        last: int = 10**9,
        stop: int = 10**9,
        ends: Callable[[int], str | None] = lambda token_id: None,
    ) -> None:
        super().__init__()
        self.first, self.last, self.stop, self.ends = first, last, stop, ends
        self.taken: list[int] = []

    @property
    def waits(self) -> bool:
        return self.first <= len(self.taken) < self.last

    def advance(self, token_id: int) -> str | None:
        self.taken.append(token_id)
        return COMPLETE if len(self.taken) >= self.stop else self.ends(token_id)


class LimitedMemory(StepMemory):
    """Memory for so many prompt tokens in the first step, the second …, for whoever asks; then for any number."""

    def __init__(self, *affordable: int) -> None:
        self._by_step = list(affordable)
        self._left = 0
        self.asked: list[tuple[int, int]] = []

    def begin(self) -> None:
        self._left = self._by_step.pop(0) if self._by_step else 10**6

    def affordable(self, num_tokens: int, start: int) -> int:
        self.asked.append((num_tokens, start))
        return min(num_tokens, self._left)
