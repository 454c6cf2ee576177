"""How threads wait for each other so that an interrupt never leaves one of them waiting for good.

Python raises KeyboardInterrupt behind any call that the main thread makes. Where a lock is taken by a function in
Python, that is also between the taking and the block that gives it back: ``threading.Condition``, of which events,
futures and queues are made, and ``logging`` before Python 3.13. The main thread then keeps the lock, and whoever else
wants it waits for ever. A ``start`` that is interrupted leaves a thread of which nobody knows, and before 3.13 a
``join`` or ``is_alive`` takes one that runs for ended. What is here holds no lock where an interrupt may come.
"""

import _thread
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_SLICE = 0.1
"""Seconds between looks for an interrupt while a thread waits (a lock's wait ignores signals on some systems)."""


class Bell:
    """Threads wait for it to ring; whoever rings waits for nobody."""

    def __init__(self) -> None:
        self.waiting: deque[threading.Lock] = deque()

    def listen(self) -> threading.Lock:
        """What the next ring opens, for :meth:`wait`: a ring between the two is heard."""
        heard = threading.Lock()
        heard.acquire()
        self.waiting.append(heard)
        return heard

    def wait(self, heard: threading.Lock, seconds: float) -> bool:
        """Whether it rang, up to ``seconds`` from now."""
        try:
            return _acquire(heard, seconds)
        finally:
            with contextlib.suppress(ValueError):
                self.waiting.remove(heard)

    def ring(self) -> None:
        """Wake everybody who listens."""
        while self.waiting:
            with contextlib.suppress(IndexError):  # who rang at the same time has woken the last one
                self.waiting.popleft().release()


class Answer(Generic[T]):
    """One result, or error, that a thread gives and others wait for."""

    def __init__(self) -> None:
        self._done = False
        self._value: T
        self._error: BaseException | None = None
        self._bell = Bell()

    @property
    def done(self) -> bool:
        """Whether it was given."""
        return self._done

    def set_result(self, value: T) -> None:
        """Give it."""
        self._value = value
        self._give()

    def set_exception(self, error: BaseException) -> None:
        """Have :meth:`result` raise ``error``."""
        self._error = error
        self._give()

    def wait(self, seconds: float) -> bool:
        """Whether it was given, up to ``seconds`` from now."""
        deadline = time.monotonic() + seconds
        while not self._done and (left := deadline - time.monotonic()) > 0:
            heard = self._bell.listen()
            if not self._done:  # else it may have rung before this thread listened
                self._bell.wait(heard, min(left, _SLICE))
        return self._done

    def result(self) -> T:
        """The result, as soon as there is one; raises the error."""
        while not self._done:
            self.wait(_SLICE)
        try:
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            del self  # the error's traceback has this frame

    def _give(self) -> None:
        self._done = True
        self._bell.ring()


class BackgroundThread(threading.Thread):
    """A daemon thread of which everybody knows whether it runs, also who was interrupted while waiting for its end."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._began: Answer[None] = Answer()
        self._over: Answer[None] = Answer()
        self._process: int | None = None

    def start(self) -> None:
        """Start it, by a thread that no interrupt reaches: there is one afterwards, or an error says why not."""
        try:
            self._process = os.getpid()
            _thread.start_new_thread(self._start, ())  # in one step with the line before
        except RuntimeError:
            self._process = None
            raise
        self._began.result()

    def _start(self) -> None:
        try:
            super().start()
        except BaseException as error:  # noqa: BLE001 - raised by who starts it
            self._over.set_result(None)
            self._began.set_exception(error)
        else:
            self._began.set_result(None)

    def run(self) -> None:
        """What it was given."""
        try:
            super().run()
        finally:
            self._over.set_result(None)

    def is_alive(self) -> bool:
        """Whether it was started and has not ended; behind a fork it does not run."""
        return self._process == os.getpid() and not self._over.done

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, up to ``timeout`` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._over.wait(min(left, _SLICE))
        if self._over.done and self.ident is not None:
            super().join(timeout)


@cache
def interruptible(bar: type[Any]) -> type[Any]:
    """tqdm's class ``bar`` with a lock of its own, in C: tqdm's two may be left with a thread that was interrupted."""
    return type(bar.__name__, (bar,), {"_lock": threading.RLock()})


def free_logging() -> None:
    """Give back locks of ``logging`` that an interrupt left with the main thread, if that is the calling one.

    Other threads could log no more: neither an engine's nor the port's would go on.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    held = [lock for lock in _logging_locks() if lock._is_owned()]
    if held and not _is_logging():
        for lock in held:
            while lock._is_owned():
                lock.release()


def _acquire(lock: threading.Lock, seconds: float) -> bool:
    if lock.acquire(timeout=seconds):
        return True
    free_logging()  # which who is waited for may want
    return False


def _logging_locks() -> Iterator[Any]:
    """The locks of the module and of each handler, where they are of the kind that knows its owner."""
    handlers = (handler for reference in list(getattr(logging, "_handlerList", ())) if (handler := reference()))
    for lock in (getattr(logging, "_lock", None), *(handler.lock for handler in handlers)):
        if hasattr(lock, "_is_owned"):
            yield lock


def _is_logging() -> bool:
    """Whether a function of ``logging`` is under way in this thread, which then holds what it holds with right."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != logging.__file__:
        frame = frame.f_back
    return frame is not None
