"""Finds text that goes round in circles, token by token."""

import numpy as np

from engine.constraints import RepetitionDetection


class RepetitionFinder:
    """Whether the latest tokens are one pattern ``min_count`` times over.

    For each pattern size it counts how many tokens in a row equal the one a pattern before: a
    pattern has come k times when that run is k - 1 patterns long. One small vector per token.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        smallest, largest = max(1, detection.min_pattern_size), detection.max_pattern_size
        self._sizes = np.arange(smallest, largest + 1)
        self._needed = self._sizes * (detection.min_count - 1)
        self._runs = np.zeros(len(self._sizes), dtype=np.int64)
        self._latest = np.full(largest + 1, -1, dtype=np.int64)
        self._count = 0

    def add(self, token_id: int) -> bool:
        """Take a token; True if what it ends repeats."""
        place = self._count % len(self._latest)
        before = self._latest[(self._count - self._sizes) % len(self._latest)]
        self._runs = np.where(before == token_id, self._runs + 1, 0)
        self._latest[place] = token_id
        self._count += 1
        return bool((self._runs >= self._needed).any())
