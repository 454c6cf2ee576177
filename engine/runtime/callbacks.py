"""Code of others, called where it can neither hold up nor end what others wait for."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from engine.errors import OwnThreadError, error_line
from engine.handover import BackgroundThread

logger = logging.getLogger("engine")
_here = threading.local()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """This thread steps an engine meanwhile: whoever would wait for an engine here is refused."""
    _here.serves = True
    try:
        yield
    finally:
        _here.serves = False


def check_may_wait(what: str) -> None:
    """Raise OwnThreadError on an engine's thread, which would wait for itself."""
    if getattr(_here, "serves", False):
        raise OwnThreadError(
            f"{what} would wait for the engine's thread on that thread; call it from another (a log handler, say, can "
            "put its records into a queue)"
        )


def call_safely(callback: Callable[[], object], what: str) -> None:
    """Call ``callback``; what it raises is logged and goes no further."""
    try:
        callback()
    except BaseException as error:
        logger.error("%s failed: %s", what, error_line(error), exc_info=error)


class CallbackThread:
    """Calls what it is given, one after the other, on a thread of its own that begins with the first."""

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: BackgroundThread | None = None

    def call(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called soon; returns at once."""
        self._due.put(callback)
        if self._thread is None or not self._thread.is_alive():  # behind a fork there is none
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = BackgroundThread(self._run, "vm-callbacks")
                    self._thread.start()

    def _run(self) -> None:
        while True:
            call_safely(self._due.get(), "a callback of a request that is over")


callbacks = CallbackThread()
"""For callbacks of users: a slow one holds up other callbacks, and nothing else."""
