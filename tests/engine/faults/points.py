"""Points at which something may fail, counted in one run of a scenario and failed one after the other in later runs.

A point is a call of a function that is replaced here: each function of MLX that makes or computes arrays, each call of
the operating system that writes. Only calls on threads that ``where`` accepts count, and only while :attr:`armed`.
"""

import builtins
import errno
import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

Make = Callable[[], BaseException]


class PanicException(BaseException):
    """What a Rust library raises where it panics: no Exception, under this name."""


def out_of_memory() -> BaseException:
    """MLX's own words where an allocation fails."""
    return RuntimeError("[malloc_or_wait] Unable to allocate 1048576 bytes.")


def python_out_of_memory() -> BaseException:
    """The interpreter's, and that of C++'s bad_alloc through nanobind."""
    return MemoryError("std::bad_alloc")


def bug() -> BaseException:
    """A model that cannot go on."""
    return ValueError("[matmul] Last dimension of first input with shape (1,2) must match …")


def panic() -> BaseException:
    """A library in Rust that gives up."""
    return PanicException("called `Option::unwrap()` on a `None` value")


def disk_full() -> BaseException:
    """No room on the device."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


MAKES: tuple[Make, ...] = (out_of_memory, python_out_of_memory, bug, panic)


class Points:
    """Counts the points that are passed; :meth:`fail` has one of them raise."""

    def __init__(self, where: Callable[[], bool] = lambda: True) -> None:
        self._where = where
        self._lock = threading.Lock()
        self.armed = False
        self.passed = 0
        self.names: Counter[str] = Counter()
        self.failed: str | None = None
        self._target = -1
        self._make: Make = bug

    def fail(self, number: int, make: Make) -> None:
        """Start to count anew, and have point ``number`` (from 0) raise what ``make`` makes."""
        self.passed, self.failed = 0, None
        self.names.clear()
        self._target, self._make, self.armed = number, make, True

    def count(self) -> None:
        """Start to count anew; nothing fails."""
        self.fail(-1, bug)

    def passing(self, name: str) -> None:
        """A point is passed."""
        if not self.armed or not self._where():
            return
        with self._lock:
            number, self.passed = self.passed, self.passed + 1
            self.names[name] += 1
            if number != self._target:
                return
            self.failed = name
        raise self._make()

    def replace(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Have calls of ``owner.name`` pass a point first."""
        real, label = getattr(owner, name), f"{getattr(owner, '__name__', owner)}.{name}"

        def function(*args: Any, **kwargs: Any) -> Any:
            self.passing(label)
            return real(*args, **kwargs)

        patch.setattr(owner, name, function)


_HARMLESS = {
    *(
        "get_active_memory",
        "get_peak_memory",
        "reset_peak_memory",
        "get_cache_memory",
        "is_available",
        "default_device",
    ),
    *("default_stream", "set_default_stream", "new_stream", "new_thread_unsafe_stream", "issubdtype", "compile"),
    *("set_default_device", "device_info", "clear_streams", "synchronize", "stream", "export_function"),
}
"""Functions that allocate nothing; what ends a thread is not among the points, since MLX itself cannot fail there."""


class _CountedArray(type):
    """``mx.array`` where making one passes a point."""

    points: Points
    real: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cls.points.passing("mlx.core.array")
        return cls.real(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real, name)


@contextmanager
def mlx_points(where: Callable[[], bool]) -> Iterator[Points]:
    """Every function of MLX that makes, moves or computes arrays, called on threads that ``where`` accepts."""
    points = Points(where)
    array = _CountedArray("array", (), {})
    array.points, array.real = points, mx.array
    with pytest.MonkeyPatch.context() as patch:
        modules: list[ModuleType] = [mx, mx.fast, mx.random, mx.linalg]
        for module in modules:
            for name, value in list(vars(module).items()):
                if type(value).__name__ == "nb_func" and name not in _HARMLESS:
                    points.replace(patch, module, name)
        patch.setattr(mx, "array", array)
        yield points


@contextmanager
def disk_points(where: Callable[[], bool] = lambda: True) -> Iterator[Points]:
    """Every call that makes, writes, renames or locks a file."""
    points = Points(where)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "replace", "rename", "fsync", "link"):
            points.replace(patch, os, name)
        _replace_opens(points, patch)
        yield points


def _replace_opens(points: Points, patch: pytest.MonkeyPatch) -> None:
    """Opening to write is a point, and so is each write and the close of what was opened so."""
    real_open, real_os_open, real_mkdir = builtins.open, os.open, os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.isdir(path):  # else it is told so, whatever room there is
            points.passing("os.mkdir")
        real_mkdir(path, *args, **kwargs)

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            points.passing("os.open")
        return real_os_open(path, flags, *args, **kwargs)

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *args, **kwargs)
        if not isinstance(file, int):  # which is open
            points.passing("open")
        opened = real_open(file, mode, *args, **kwargs)
        return _Written(opened, points)

    patch.setattr(os, "open", os_open)
    patch.setattr(os, "mkdir", mkdir)
    patch.setattr(builtins, "open", open_)
    patch.setattr(io, "open", open_)


class _Written:
    """A file whose writes and close pass points."""

    def __init__(self, file: Any, points: Points) -> None:
        self._file, self._points = file, points

    def write(self, data: Any) -> Any:
        self._points.passing("write")
        return self._file.write(data)

    def flush(self) -> None:
        self._points.passing("flush")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def on_engine_thread() -> bool:
    """Whether this is an engine's thread."""
    return threading.current_thread().name == "vm-engine"
