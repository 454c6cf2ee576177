"""Threads that use MLX: they leave nothing behind when they end."""

import gc
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from engine.handover import Answer, BackgroundThread
from engine.memory.heap import return_free_memory
from engine.runner.device.faults import device_failure, give_up_device

T = TypeVar("T")
_spare_streams: list[Any] = []
"""CPU streams of threads that are over."""


@contextmanager
def mlx_thread() -> Iterator[None]:
    """What a thread that uses MLX does inside this; at its end, all that was freed goes back to the system.

    MLX never ends the native thread, and with it the heap, behind a CPU stream: threads take over each other's.
    """
    import mlx.core as mx

    try:
        stream = _spare_streams.pop()
    except IndexError:
        stream = mx.new_thread_unsafe_stream(mx.cpu)
    mx.set_default_stream(stream)
    try:
        yield
    finally:
        gc.collect()
        mx.synchronize(stream)
        leave_thread()
        _spare_streams.append(stream)
        return_free_memory()


def leave_thread() -> None:
    """Finish and destroy the calling thread's streams; a thread that ends without this aborts the process at exit."""
    import mlx.core as mx

    mx.synchronize()
    mx.clear_cache()
    mx.clear_streams()


class MLXWorker:
    """A thread for a few computations with MLX where no engine has one. A context; :meth:`call` inside of it."""

    def __init__(self, name: str = "vm-worker") -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = BackgroundThread(self._run, name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Wait for what was begun, which cannot be broken off; not where the device failed."""
        self._tasks.put(None)
        if not self._failed:
            self._thread.join()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` there and give its result; an interrupt comes through. DeviceFailedError is the last."""
        answer: Answer[T] = Answer()

        def task() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001  (the caller raises it)
                failure = device_failure(error)
                if failure is not None:
                    self._failed = True
                    give_up_device(failure)
                answer.set_exception(failure or error)

        self._tasks.put(task)
        return answer.result()

    def _run(self) -> None:
        with mlx_thread():
            while (task := self._tasks.get()) is not None:
                task()
                if self._failed:
                    threading.Event().wait()  # its streams could not be freed
