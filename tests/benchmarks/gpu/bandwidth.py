"""How fast this device reads memory and multiplies, measured: what the floors are made of."""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import mlx.core as mx

from tests.benchmarks.gpu.steps import Machine

_REPEATS = 9
_READ = """
    // Each thread adds up 16-byte words, a grid apart; one value per thread is written.
    const uint4* words = reinterpret_cast<const uint4*>(x);
    size_t count = static_cast<size_t>(x_shape[0]) / 4, step = static_cast<size_t>(gridDim.x) * blockDim.x;
    size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x, place = i;
    unsigned sum = 0;
    for (; i + 3 * step < count; i += 4 * step) {
      uint4 a = words[i], b = words[i + step], c = words[i + 2 * step], d = words[i + 3 * step];
      sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += step) sum += words[i].x;
    out[place] = sum;
"""


def measure_machine(num_bytes: int = 8 << 30, side: int = 8192) -> Machine:
    """Read ``num_bytes`` in several ways and take the fastest; multiply two bfloat16 matrices of ``side``."""
    # Two arrays, each larger than any cache: reading them takes long beside a launch, and may overlap unharmed.
    halves = [mx.full((num_bytes // 8,), number, mx.uint32) for number in (1, 2)]
    mx.eval(halves)
    ways: dict[str, Callable[[mx.array], mx.array]] = {
        "a sum of uint32": mx.sum,
        "a maximum of uint32": mx.max,
        "a sum of float32": lambda half: mx.sum(half.view(mx.float32)),
    }
    rates = {name: num_bytes / _fastest([partial(way, half) for half in halves]) for name, way in ways.items()}
    if mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        try:
            rates["a kernel of 16-byte reads"] = num_bytes / _fastest([partial(_read, half) for half in halves])
        except RuntimeError as error:  # its text does not compile here: the others do
            print(f"the reading kernel failed: {str(error).splitlines()[0]}", flush=True)
    how = max(rates, key=lambda name: rates[name])
    del halves
    matrix = mx.random.normal((side, side), mx.bfloat16)
    mx.eval(matrix)
    flops = 2 * side**3 / _fastest([lambda: matrix @ matrix])
    mx.clear_cache()
    return Machine(rates[how], flops, f"{how}, {num_bytes / 1e9:.1f} GB; a product of {side} x {side} bfloat16")


def _fastest(actions: Sequence[Callable[[], mx.array]]) -> float:
    """Seconds that all ``actions`` take together: the middle of the three fastest runs."""
    mx.eval([action() for action in actions])
    times = []
    for _ in range(_REPEATS):
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval([action() for action in actions])
        mx.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[1]


@cache
def _read_kernel() -> Any:
    return mx.fast.cuda_kernel(name="read_words", input_names=["x"], output_names=["out"], source=_READ)


def _read(words: mx.array) -> mx.array:
    threads, blocks = 512, 132 * 8
    made: list[mx.array] = _read_kernel()(
        inputs=[words],
        output_shapes=[(threads * blocks,)],
        output_dtypes=[mx.uint32],
        grid=(threads * blocks, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return made[0]
