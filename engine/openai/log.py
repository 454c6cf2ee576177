"""The server's latest log lines, in memory: a server thread never prints."""

import logging
from collections import deque

LOGGERS = ("uvicorn.error", "engine.openai")
CAPACITY = 1000


class RingBuffer(logging.Handler):
    """Keeps the last :data:`CAPACITY` lines of :data:`LOGGERS`, from INFO on, while attached."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        self._lines: deque[str] = deque(maxlen=CAPACITY)
        self._raised: list[logging.Logger] = []

    @property
    def lines(self) -> list[str]:
        """The lines, oldest first."""
        return list(self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self._lines.append(self.format(record))

    def attach(self) -> None:
        """Listen."""
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
                self._raised.append(logger)

    def detach(self) -> None:
        """Stop listening; the lines stay. Safe to repeat."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)
        for logger in self._raised:
            logger.setLevel(logging.NOTSET)
        self._raised.clear()
