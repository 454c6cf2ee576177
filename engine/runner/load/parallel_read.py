"""Weights of safetensors files read by several threads at once, for GPUs with memory of their own.

MLX's CUDA reads a stored array on the thread that evaluates it: into fresh memory, from there to the device. One
thread leaves disk, host memory and bus idle in turn. Arrays on streams of their own may be evaluated by threads of
their own.
"""

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from engine.runner.device.threads import mlx_thread

logger = logging.getLogger("engine")

_NUM_THREADS = 4
News: TypeAlias = "queue.SimpleQueue[int | BaseException | None]"
"""Of a thread: bytes of a piece, what it raised, or that it has ended."""
_PIECE_BYTES = 64 << 20
"""A thread tells of its progress, and notices that it should stop, after so much."""


class ParallelRead:
    """Files that :meth:`load` opened, and the arrays in them that :meth:`read` can evaluate."""

    def __init__(self, streams: Sequence[mx.Stream]) -> None:
        self._streams = streams
        self._bytes = [0] * len(streams)
        self._stored: dict[int, tuple[mx.array, int]] = {}
        """By the identity of an array, which it holds: the array, and the number of its stream."""

    def load(self, path: str | Path) -> dict[str, mx.array]:
        """As ``mx.load(path)``, each array on one of the streams."""
        copies: list[Any] = [mx.load(str(path), stream=stream) for stream in self._streams]
        chosen = {}
        for name in copies[0]:
            number = self._bytes.index(min(self._bytes))
            array = copies[number][name]
            self._bytes[number] += array.nbytes
            self._stored[id(array)] = array, number
            chosen[name] = array
        return chosen

    def read(self, parameters: Sequence[mx.array], report: Callable[[int], None]) -> list[mx.array]:
        """Evaluate those of ``parameters`` that are as stored, and give the others; ``report(bytes)`` after each piece.

        What a thread or ``report`` raises comes out when all threads have ended.
        """
        parts: list[list[mx.array]] = [[] for _ in self._streams]
        others: list[mx.array] = []
        for array in parameters:
            stored, number = self._stored.get(id(array), (None, 0))
            (others if stored is not array else parts[number]).append(array)
        self._stored.clear()
        with closing(_evaluated(parts)) as pieces:
            for num_bytes in pieces:
                report(num_bytes)
        return others


@contextmanager
def loading_by(reader: ParallelRead) -> Iterator[None]:
    """Inside, mlx-lm's ``load_model`` opens weights by ``reader``; in the rest of MLX ``mx.load`` stays as it is."""
    from mlx_lm import utils

    module: Any = utils
    original = module.mx
    module.mx = _WithLoad(original, reader.load)
    try:
        yield
    finally:
        module.mx = original


class _WithLoad:
    """A module with another ``load``."""

    def __init__(self, module: Any, load: Callable[[str], dict[str, mx.array]]) -> None:
        self._module = module
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def parallel_read(device_type: mx.DeviceType, cpus: int) -> ParallelRead | None:
    """A reader of new files; None where there are few CPUs, or streams cannot be used by other threads."""
    if cpus < _NUM_THREADS:
        return None
    kept = _streams.get(device_type, ())
    if kept and _usable(kept):  # MLX ends all streams where its main thread asks for that
        return ParallelRead(kept)
    try:
        made = tuple(mx.new_thread_unsafe_stream(mx.Device(device_type)) for _ in range(_NUM_THREADS))
    except (RuntimeError, ValueError) as error:
        logger.debug("weights are read by one thread: %s", " ".join(str(error).split())[:200])
        return None
    if not _usable(made):
        return None
    _streams[device_type] = made
    return ParallelRead(made)


_streams: dict[mx.DeviceType, tuple[mx.Stream, ...]] = {}
"""By the kind of device: for one thread each at a time. A process keeps them, since MLX does not end one alone."""


def _usable(streams: Sequence[mx.Stream]) -> bool:
    """Whether threads of their own can compute on ``streams``."""
    tried = [[mx.add(mx.full((64,), number, stream=one), 1, stream=one)] for number, one in enumerate(streams)]
    try:
        list(_evaluated(tried))
        return all(array.tolist() == [number + 1] * 64 for number, (array,) in enumerate(tried))
    except Exception as error:  # noqa: BLE001  (MLX may refuse in any way; one thread reads everything then)
        logger.debug("weights are read by one thread: %s", " ".join(str(error).split())[:200])
        return False


def _evaluated(parts: Sequence[Sequence[mx.array]]) -> Generator[int]:
    """Evaluate each part on a thread of its own; gives the bytes of every piece that is complete."""
    news: News = queue.SimpleQueue()
    stop = threading.Event()
    threads = [threading.Thread(target=_work, args=(part, news, stop), daemon=True) for part in parts if part]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            said = news.get()
            if isinstance(said, BaseException):
                raise said
            if said is None:
                running -= 1
            else:
                yield said
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _work(
    part: Sequence[mx.array], news: "queue.SimpleQueue[int | BaseException | None]", stop: threading.Event
) -> None:
    try:
        with mlx_thread():
            for piece in _pieces(part):
                if stop.is_set():
                    break
                mx.eval(piece)
                news.put(sum(array.nbytes for array in piece))
    except BaseException as error:  # noqa: BLE001  (the thread that waits raises it)
        news.put(error)
    else:
        news.put(None)


def _pieces(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    piece: list[mx.array] = []
    for array in arrays:
        piece.append(array)
        if sum(one.nbytes for one in piece) >= _PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece
