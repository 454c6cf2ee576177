"""Matchers made of others: an answer in a format, or a call in the model's own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.text.guide.grammar import Matcher


class EitherMatcher:
    """A text that one of several matchers takes: those that a token does not fit are out.

    Not one grammar of alternatives: its lexer would take the longest beginning that any of them knows, and not go back.
    """

    def __init__(self, matchers: Sequence[Matcher]) -> None:
        self._all = list(matchers)
        self._left = list(matchers)

    def another(self) -> "EitherMatcher":
        """A second matcher in the same state."""
        made = EitherMatcher([one.another() for one in self._all])
        made._left = [made._all[self._all.index(one)] for one in self._left]
        return made

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next."""
        self._left[0].fill_bitmask(words)
        for one in self._left[1:]:
            more = np.zeros_like(words)
            one.fill_bitmask(more)
            words |= more

    def accepts(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return any(one.accepts(token_id) for one in self._left)

    def consume(self, token_id: int) -> bool:
        """Take a token; False if none of the matchers takes it."""
        left = [one for one in self._left if one.accepts(token_id) and one.consume(token_id)]
        if not left:
            return False
        self._left = left
        return True

    def reset(self) -> None:
        """Back to the beginning."""
        for one in self._all:
            one.reset()
        self._left = list(self._all)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return all(one.complete for one in self._left)

    @property
    def may_end(self) -> bool:
        """Whether the end can follow."""
        return any(one.may_end for one in self._left)

    @property
    def error(self) -> str | None:
        """What went wrong, as one line."""
        return next((one.error for one in self._left if one.error), None)


class OpeningMatcher:
    """A text that begins as ``opening`` says, and goes on as the model likes."""

    def __init__(self, opening: Matcher, *, opened: bool = False) -> None:
        self._opening = opening
        self._opened = opened

    def another(self) -> "OpeningMatcher":
        """A second matcher in the same state."""
        return OpeningMatcher(self._opening.another(), opened=self._opened)

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next."""
        if self._opened:
            words[:] = -1
        else:
            self._opening.fill_bitmask(words)

    def accepts(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return self._opened or self._opening.accepts(token_id)

    def consume(self, token_id: int) -> bool:
        """Take a token; False if it does not belong to the opening."""
        if not self._opened:
            if not self._opening.consume(token_id):
                return False
            self._opened = self._opening.may_end
        return True

    def reset(self) -> None:
        """Back to the beginning."""
        self._opening.reset()
        self._opened = False

    @property
    def complete(self) -> bool:
        """False: the model says itself when it is done."""
        return False

    @property
    def may_end(self) -> bool:
        """Whether the end can follow."""
        return self._opened

    @property
    def error(self) -> str | None:
        """What went wrong, as one line."""
        return None if self._opened else self._opening.error
