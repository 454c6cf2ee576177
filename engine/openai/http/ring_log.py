"""The latest log lines, in memory: engine and server threads never print, and ``%vllm_metal logs`` shows them."""

import logging
from collections import deque
from collections.abc import Sequence

from engine.format.text import one_line

CAPACITY = 2000
LONGEST = 8000
"""Characters that are kept of a line, or of what is logged with a traceback."""


class RingLog(logging.Handler):
    """Keeps the last :data:`CAPACITY` lines of ``loggers``, from INFO on, while attached.

    Loggers hand their children's records up: name the parent alone, or each line comes twice.
    """

    def __init__(self, loggers: Sequence[str]) -> None:
        super().__init__()
        self.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        self._loggers = tuple(loggers)
        self._kept: deque[str] = deque(maxlen=CAPACITY)
        self._raised: list[tuple[logging.Logger, _Upward]] = []

    @property
    def lines(self) -> list[str]:
        """The lines, oldest first."""
        return list(self._kept)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line."""
        line = self.format(record)
        if len(line) > LONGEST:  # of a traceback the end says most
            line = f"{line[: LONGEST // 4]} … {line[len(line) - LONGEST * 3 // 4 :]}"
        self._kept.append(line)

    def attach(self) -> None:
        """Listen; a logger without a level of its own is set to INFO meanwhile, which handlers above it do not see."""
        for name in self._loggers:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
                upward = _Upward(logger)
                logger.addHandler(upward)
                self._raised.append((logger, upward))

    def detach(self) -> None:
        """Leave the loggers as they were; the lines stay. Safe to repeat."""
        for name in self._loggers:
            logging.getLogger(name).removeHandler(self)
        for logger, upward in self._raised:
            logger.removeHandler(upward)
            logger.propagate = upward.propagated
            logger.setLevel(logging.NOTSET)
        self._raised.clear()


class _OneLine(logging.Formatter):
    """A message may quote what a client sent: it begins no line of its own, and controls no terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, its traceback to follow."""
        return one_line(super().formatMessage(record), LONGEST)


class _Upward(logging.Handler):
    """Hands records of ``logger`` up as if its level had not been raised.

    Levels of the loggers above do not stop a record on its way to their handlers: one ``logging.basicConfig``
    in a notebook, which IPython calls, would print every line of the engine's below whatever cell runs.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger
        self.propagated, logger.propagate = logger.propagate, False

    def emit(self, record: logging.LogRecord) -> None:
        """Hand ``record`` up if it would have come there; a level that the user set meanwhile is kept to."""
        above = self._logger.parent
        assert above is not None, "not the root"
        changed = self._logger.level != logging.INFO
        if not self.propagated:
            return
        if (changed or record.levelno >= above.getEffectiveLevel()) and above.hasHandlers():
            above.callHandlers(record)
