"""What the engine asks of a constraint while tokens are being chosen; made by :mod:`engine.text.guide`."""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

COMPLETE = "complete"
"""What :meth:`TokenGuide.advance` gives when nothing more can follow."""
REPETITION_STOP_REASON = "repetition_detected"
"""What it gives when the reply repeats itself: vLLM's ``stop_reason``."""
ThinkingCut = Literal["budget", "repetition", "request"]
"""Why a thought was ended from outside."""


class TokenGuide(Protocol):
    """Constrains one completion, token by token. Used between and inside steps by the engine's thread only."""

    @property
    def waits(self) -> bool:
        """Whether the next token cannot be chosen before the last one's value is known."""

    @property
    def forced_token(self) -> int | None:
        """The token that comes next whatever the model says."""

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        """Set the bits of tokens that may come next in ``words`` [ceil(V / 32)]; False if any may. Repeatable."""

    def advance(self, token_id: int) -> str | None:
        """Take a token that was chosen. Gives why the completion is over: ``COMPLETE``, a stop reason, or None."""

    @property
    def thinking(self) -> bool:
        """Whether the completion is inside a thought."""

    def set_default_budget(self, budget: int | None, *, in_flight: bool) -> None:
        """The thinking budget of requests that did not ask for one; those that did keep theirs."""

    def finish_thinking(self, in_flight: bool) -> None:
        """End a thought as soon as possible; ``in_flight``: a token is sampled whose value is not known yet."""

    @property
    def thinking_cut(self) -> ThinkingCut | None:
        """Why the thought was ended from outside, if it was."""

    @property
    def error(self) -> str | None:
        """What broke the constraint, in one line."""


MakeGuide = Callable[[], TokenGuide]
"""A fresh guide at the output's beginning: each of ``n`` completions has its own."""
