"""The latest log lines, in memory: engine and server threads never print, and ``%vllm_metal logs`` shows them."""

import logging
from collections import deque
from collections.abc import Sequence

CAPACITY = 2000


class RingLog(logging.Handler):
    """Keeps the last :data:`CAPACITY` lines of ``loggers``, from INFO on, while attached.

    Loggers hand their children's records up: name the parent alone, or each line comes twice.
    """

    def __init__(self, loggers: Sequence[str]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        self._loggers = tuple(loggers)
        self._kept: deque[str] = deque(maxlen=CAPACITY)
        self._raised: list[logging.Logger] = []

    @property
    def lines(self) -> list[str]:
        """The lines, oldest first."""
        return list(self._kept)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self._kept.append(self.format(record))

    def attach(self) -> None:
        """Listen; a logger without a level of its own is set to INFO meanwhile."""
        for name in self._loggers:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
                self._raised.append(logger)

    def detach(self) -> None:
        """Leave the loggers as they were; the lines stay. Safe to repeat."""
        for name in self._loggers:
            logging.getLogger(name).removeHandler(self)
        for logger in self._raised:
            logger.setLevel(logging.NOTSET)
        self._raised.clear()
