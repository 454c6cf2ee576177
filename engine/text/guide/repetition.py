"""Finds text that goes round in circles, token by token."""

import numpy as np

from engine.params.structured_outputs import RepetitionDetection

_ROOM = 4096
"""Tokens between two moves of the history."""


class RepetitionFinder:
    """Whether the latest tokens are one pattern ``min_count`` times over.

    For each pattern size it counts how many tokens in a row equal the one a pattern before: a
    pattern has come k times when that run is k - 1 patterns long. One small vector per token.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        self._smallest, self._largest = max(1, detection.min_pattern_size), detection.max_pattern_size
        # In the order of the history: the largest pattern first.
        self._needed = np.arange(self._largest, self._smallest - 1, -1) * (detection.min_count - 1)
        self._runs = np.zeros(len(self._needed), dtype=np.int64)
        self._history = np.full(self._largest + _ROOM, -1, dtype=np.int64)
        self._end = self._largest

    def add(self, token_id: int) -> bool:
        """Take a token; True if what it ends repeats."""
        if self._end == len(self._history):
            self._history[: self._largest] = self._history[-self._largest :]
            self._end = self._largest
        end = self._end
        self._runs += 1
        self._runs *= self._history[end - self._largest : end - self._smallest + 1] == token_id
        self._history[end] = token_id
        self._end = end + 1
        return bool((self._runs >= self._needed).any())
