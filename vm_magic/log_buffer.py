"""The latest log lines of engine and server, kept in memory: ``%vllm_metal logs``."""

import logging
from collections import deque

LOGGERS = ("engine", "vm_magic", "uvicorn")
"""Their children hand their records up, so each line comes once."""
CAPACITY = 2000


class LogBuffer(logging.Handler):
    """A handler that keeps the last :data:`CAPACITY` lines. ``attach`` and ``detach`` undo each other."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        self.lines: deque[str] = deque(maxlen=CAPACITY)
        self._levels: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        self.lines.append(self.format(record))

    def attach(self) -> None:
        """Listen to the loggers, from INFO on."""
        for name in LOGGERS:
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)

    def detach(self) -> None:
        """Leave the loggers as they were."""
        for name, level in self._levels.items():
            logger = logging.getLogger(name)
            logger.removeHandler(self)
            logger.setLevel(level)
        self._levels = {}
