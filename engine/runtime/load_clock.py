"""How long each part of a load takes."""

import logging
import time

logger = logging.getLogger("engine")


class LoadClock:
    """Seconds of the parts of a load, one after the other; each is told in the debug log as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def ended(self, part: str) -> None:
        """``part`` took from the end of the part before, or from the beginning, until now."""
        now = time.perf_counter()
        self.seconds[part] = now - self._since
        self._since = now
        logger.debug("load: %s %.2f s", part, self.seconds[part])
