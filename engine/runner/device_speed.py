"""What this device can do at best, measured once in a process: bytes read from its memory, products computed."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.memory.roofline import DeviceSpeed
from engine.runner.device.cgroups import usable_cpus
from engine.runner.device.devices import describe_device
from engine.runner.kernels.bench import bytes_per_second as gpu_bytes_per_second

_READ_BYTES = 64 << 20
"""Of memory that a processor reads: more than the cache of its cores together holds, on most."""
_FEWEST, _MOST, _SECONDS = 2, 8, 0.1
"""Turns of a measurement, and the time after which there are no more: others may be using the machine."""
_CPU_SIZE, _GPU_SIZE = 1024, 4096
"""Of square matrices."""
_SHORT_CHAIN, _LONG_CHAIN = 4, 20
"""Products one after the other."""


@cache
def device_speed(dtype: str) -> DeviceSpeed:
    """Measure, on the thread that MLX computes on, for weights computed in ``dtype``. Half a second at most.

    Raises RuntimeError where the device has no memory left for it (64 MB on a CPU, 512 MB on a GPU).
    """
    if describe_device().kind != "cpu":
        how = "by a kernel that only reads, and a product of large matrices"
        return DeviceSpeed(gpu_bytes_per_second(), gpu_flops(_GPU_SIZE, dtype), dtype, how)
    matrix = _matrix(dtype)
    return DeviceSpeed(
        cpu_bytes_per_second(matrix, usable_cpus()),
        _cpu_flops(_CPU_SIZE, dtype),
        dtype,
        "by reading 64 MB of it, and a product of large matrices",
        row_bytes_per_second(matrix),
    )


def _matrix(dtype: str) -> mx.array:
    """A square one of about :data:`_READ_BYTES`."""
    kind: mx.Dtype = getattr(mx, dtype)
    size = math.isqrt(_READ_BYTES // kind.size)
    made: mx.array = mx.full((size, size), 1e-4, kind)
    mx.eval(made)
    return made


def cpu_bytes_per_second(matrix: mx.array, num_threads: int) -> float:
    """The best rate at which one thread, or ``num_threads`` of them, read ``matrix``."""
    values = np.array(matrix.view(mx.uint8), copy=False).reshape(-1)
    values = values[: values.size // 8 * 8].view(np.uint64)
    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for number in sorted({1, num_threads}):
            read = partial(_read, pool, np.array_split(values, number))
            best = max(best, values.nbytes / _best(read))
    return best


def _read(pool: ThreadPoolExecutor, parts: Sequence[NDArray[np.uint64]]) -> None:
    for done in [pool.submit(np.bitwise_xor.reduce, part) for part in parts]:
        done.result()


def row_bytes_per_second(matrix: mx.array) -> float:
    """The rate at which a product of one row with ``matrix`` reads it, by the BLAS that MLX uses here."""
    row: mx.array = mx.full((1, matrix.shape[0]), 1e-4, matrix.dtype)
    mx.eval(row)
    return matrix.nbytes / _best_of_host(lambda: [row @ matrix.T])


def _cpu_flops(size: int, dtype: str) -> float:
    """Operations a second of a product of two matrices of ``size``."""
    one: mx.array = mx.full((size, size), 1e-4, getattr(mx, dtype))
    other: mx.array = mx.full((size, size), 1e-4, getattr(mx, dtype))
    mx.eval(one, other)
    return 2 * size**3 / _best_of_host(lambda: [one @ other])


def gpu_flops(size: int, dtype: str) -> float:
    """Operations a second of products of matrices of ``size``, each of which needs the one before.

    What a long chain takes more than a short one has no launch or wait of the host in it. Values stay near one:
    products of zeros draw less power, and are faster than any that a model computes.
    """
    kind: mx.Dtype = getattr(mx, dtype)
    one, other = (mx.random.normal((size, size), scale=scale).astype(kind) for scale in (1, size**-0.5))
    mx.eval(one, other)

    def chain(length: int) -> list[mx.array]:
        result = one
        for _ in range(length):
            result = result @ other
        return [result]

    short, long = (_best_of_host(partial(chain, length)) for length in (_SHORT_CHAIN, _LONG_CHAIN))
    return 2 * size**3 * (_LONG_CHAIN - _SHORT_CHAIN) / max(long - short, 1e-9)


def _best_of_host(build: Callable[[], list[mx.array]]) -> float:
    return _best(lambda: mx.eval(build()))


def _best(function: Callable[[], None]) -> float:
    """The shortest of a few calls, in seconds."""
    times: list[float] = []
    while len(times) < _FEWEST or (len(times) < _MOST and sum(times) < _SECONDS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)
