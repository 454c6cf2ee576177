"""What the engine logs of its work: vLLM's periodic line, from counters that only grow, and thoughts that were cut."""

import logging
import time
from collections.abc import Callable

from engine.core.request import Request
from engine.outputs import THINKING_CUTS
from engine.runtime.activity import EngineStats

logger = logging.getLogger("engine")
INTERVAL_SECONDS = 10.0


class StatsLog:
    """Logs the engine's rates at most every :data:`INTERVAL_SECONDS`, and once when work has ended."""

    def __init__(self, stats: Callable[[], EngineStats], clock: Callable[[], float] = time.monotonic) -> None:
        self._stats = stats
        self._clock = clock
        self._since = clock()
        self._last = EngineStats()

    def tick(self, *, idle: bool) -> None:
        """Log a line if one is due; ``idle`` says that the last request just ended."""
        elapsed = self._clock() - self._since
        if elapsed >= INTERVAL_SECONDS or (idle and elapsed > 0):
            now = self._stats()
            if now.generation_tokens > self._last.generation_tokens or now.prompt_tokens > self._last.prompt_tokens:
                logger.info(line(self._last, now, elapsed))
            self._since, self._last = self._clock(), now

    def resume(self) -> None:
        """Work begins after a pause, which must not count into the rates."""
        self._since = self._clock()


def line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """The line in vLLM's words, for the ``seconds`` between ``before`` and ``now``."""
    queries = now.prefix_queries - before.prefix_queries
    hits = now.prefix_hits - before.prefix_hits
    return (
        f"Engine 000: Avg prompt throughput: {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s, "
        f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, "
        f"GPU KV cache usage: {100 * now.kv_cache_usage:.1f}%, "
        f"Prefix cache hit rate: {100 * hits / queries if queries else 0:.1f}%"
    )


def log_cut_thought(request: Request) -> None:
    """Log that a completion's thought was ended from outside, if it was."""
    cut = None if request.guide is None else request.guide.thinking_cut
    if cut is not None:
        logger.info("Request %s: thinking %s.", request.request_id, THINKING_CUTS[cut])
