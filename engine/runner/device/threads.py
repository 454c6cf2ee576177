"""Threads that use MLX: they leave nothing behind when they end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.runner.device.memory import return_free_memory

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
