"""Ctrl-C while an event loop of the main thread waits for requests.

``asyncio.run`` turns Ctrl-C into the cancelling of its task, and so does a notebook's kernel. IPython in a terminal,
and whoever calls ``loop.run_until_complete``, only leaves the loop: its tasks stay as they are, and so would their
requests.
"""

import asyncio
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol


class Abortable(Protocol):
    """A request under way."""

    def abort(self) -> None:
        """End it soon."""
        ...


_submitted: "ContextVar[weakref.WeakSet[Abortable] | None]" = ContextVar("submitted", default=None)


@contextmanager
def ended_with_interrupt() -> Iterator[None]:
    """Requests that are submitted inside of this end with a KeyboardInterrupt that leaves it.

    It may come between a request's beginning and the moment from which anybody knows of it.
    """
    mine: weakref.WeakSet[Abortable] = weakref.WeakSet()
    token = _submitted.set(mine)
    try:
        yield
    except KeyboardInterrupt:
        for request in list(mine):
            request.abort()
        raise
    finally:
        _submitted.reset(token)


def submitted(request: Abortable) -> None:
    """Say that ``request`` begins, for :func:`ended_with_interrupt`."""
    mine = _submitted.get()
    if mine is not None:
        mine.add(request)


_waiting: "dict[Abortable, asyncio.Task[Any]]" = {}
"""What tasks of the main thread wait for. Only that thread changes it, its signal handler included."""


@contextmanager
def ended_by_interrupt(request: Abortable) -> Iterator[None]:
    """While the current task waits for ``request`` here, Ctrl-C aborts the request and cancels the task.

    Nothing changes in other threads, nor where somebody handles SIGINT: they cancel tasks by themselves.
    """
    task = asyncio.current_task() if threading.current_thread() is threading.main_thread() else None
    if task is None:
        yield
        return
    _waiting[request] = task
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        _waiting.pop(request, None)
        if not _waiting:
            _restore()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """End what the running loop waits for; then KeyboardInterrupt, as without this handler."""
    for request, task in list(_waiting.items()):
        if task.get_loop().is_running():
            del _waiting[request]
            request.abort()
            task.cancel()
    if not _waiting:
        _restore()
    signal.default_int_handler(number, frame)


def _restore() -> None:
    if signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
