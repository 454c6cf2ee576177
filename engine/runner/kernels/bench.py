"""How fast the attention kernels are on this GPU, beside what its memory allows; and whether they are right."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

import mlx.core as mx

from engine.params.kv_dtype import QUANTIZED_BITS, group_size, vector_bytes
from engine.runner.kernels.dialect import kernels_available, make_kernel
from engine.runner.kernels.page_format import PackedPages, PageArrays, PagePair
from engine.runner.kernels.paged_attention import arrival_counters
from engine.runner.kernels.self_check import GPU_KERNELS, AttentionShape, attention_problem, launch

DECODES = ((1, 512), (8, 512), (32, 512), (64, 512), (8, 8192), (32, 4096))
"""Rows and tokens of each."""
CHUNK = (2048, 8192)
"""Tokens of a chunk, and with those before it."""
NO_GPU = "no GPU: MLX computes on the CPU here"
_DECODE_LAUNCHES, _COLLECT_LAUNCHES = 48, 12
_TIMES = 7
_PAGE_BYTES = 600_000_000
"""Of the pages of all layers, so that caches on the chip do not hold them."""
_READ_BYTES = 512 << 20
_BUSY_SECONDS = 5e-3

# A thread reads four vectors; what it read is used, or no compiler would leave it in.
_READ = r"""
  const size_t first = (size_t)BLK_X * 1024 + TID;
  uint4 read[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) read[i] = ((GLOBAL const uint4*)values)[first + i * 256];
  float all = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    all += AS_FLOAT(read[i].x) + AS_FLOAT(read[i].y) + AS_FLOAT(read[i].z) + AS_FLOAT(read[i].w);
  if (all == 1.0f) out[TID] = all;
"""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel at one shape: what is wrong with it, else the time of a launch, and what reading its bytes takes."""

    kernel: str
    shape: str
    problem: str | None
    microseconds: float | None = None
    floor_microseconds: float | None = None
    num_bytes: int = 0

    @property
    def share(self) -> float | None:
        """Of the memory's bandwidth."""
        if self.microseconds is None or self.floor_microseconds is None:
            return None
        return self.floor_microseconds / self.microseconds

    @property
    def gigabytes_per_second(self) -> float | None:
        """Read and written."""
        return None if self.microseconds is None else self.num_bytes / self.microseconds / 1e3


def kernel_report(
    name: str,
    shape: AttentionShape,
    decodes: Sequence[tuple[int, int]] = DECODES,
    chunk: tuple[int, int] | None = CHUNK,
) -> list[KernelRow]:
    """Check the kernels for layers of ``shape``, and time one layer's decode attention and ``collect``.

    Rows called ``name``: one with the problem if there is any, else one for each of ``decodes`` and ``chunk``. Needs
    up to two gigabytes.
    """
    if problem := NO_GPU if not kernels_available() else attention_problem(shape):
        return [KernelRow("attention", name, problem)]
    rows = [_timed("attention", f"{name}, {rows} x {tokens}", _decode(shape, rows, tokens)) for rows, tokens in decodes]
    if chunk:
        rows.append(_timed("collect", f"{name}, {chunk[0]} of {chunk[1]}", _collect(shape, *chunk)))
    return rows


@dataclass(frozen=True, slots=True)
class _Work:
    """Launches that follow each other, and the bytes that each moves."""

    build: Callable[[], list[mx.array]]
    launches: int
    num_bytes: int


def _timed(kernel: str, shape: str, work: _Work) -> KernelRow:
    try:
        seconds = seconds_of(work.build) / work.launches
        floor = work.num_bytes / bytes_per_second()
    except RuntimeError as error:  # out of memory, or a fault of the device
        return KernelRow(kernel, shape, " ".join(str(error).split())[:160])
    return KernelRow(kernel, shape, None, seconds * 1e6, floor * 1e6, work.num_bytes)


def _decode(shape: AttentionShape, rows: int, tokens: int) -> _Work:
    """Decode attention of ``rows`` with ``tokens`` each, layer after layer."""
    size, dims = shape.block_size, (shape.key_dim, shape.value_dim)
    width = math.ceil(tokens / size)
    pages = _layers(shape, rows * width * size)
    tables = mx.random.permutation(rows * width).astype(mx.int32).reshape(rows, width)
    positions = mx.full((max(rows, 8),), tokens - 1, mx.int32) + 0
    queries, rope_queries = (mx.random.normal((rows, shape.heads, 1, dim)).astype(shape.dtype) for dim in dims)
    new = [mx.random.normal((rows, shape.kv_heads, 1, dim)).astype(shape.dtype) for dim in dims]
    sinks = mx.zeros((shape.heads,), shape.dtype) if shape.sinks else None
    arrivals = arrival_counters()
    mx.eval(pages, tables, positions, queries, rope_queries, new)

    def build() -> list[mx.array]:
        out = queries
        for keys_and_values in islice(cycle(pages), _DECODE_LAUNCHES):
            out = launch(
                GPU_KERNELS, shape, _as_queries(out, shape.key_dim), rope_queries, new[0], new[1], *keys_and_values,
                tables, positions, sinks, None, arrivals,
            )  # fmt: skip
        return [out]

    seen = min(tokens, shape.window or tokens)
    return _Work(build, _DECODE_LAUNCHES, rows * seen * _row_bytes(shape))


def _row_bytes(shape: AttentionShape) -> int:
    """What a token takes in the pages of one layer."""
    dtype = next((name for name, bits in QUANTIZED_BITS.items() if bits == shape.bits), "auto")
    return shape.kv_heads * sum(vector_bytes(dim, shape.dtype.size, dtype) for dim in (shape.key_dim, shape.value_dim))


def _as_queries(out: mx.array, key_dim: int) -> mx.array:
    """A layer's output as the next one's queries: so they follow each other, as in a model."""
    value_dim = out.shape[-1]
    if value_dim == key_dim:
        return out
    return out[..., :key_dim] if value_dim > key_dim else mx.pad(out, [(0, 0)] * 3 + [(0, key_dim - value_dim)])


def _collect(shape: AttentionShape, num_new: int, length: int) -> _Work:
    """Chunks of ``num_new`` tokens whose keys and values are collected with all before them."""
    size, dims = shape.block_size, (shape.key_dim, shape.value_dim)
    length = min(length, max(num_new, num_new + (shape.window or length) - 1))
    blocks = math.ceil(length / size)
    pages = _layers(shape, blocks * size)
    table = mx.random.permutation(blocks).astype(mx.int32)
    span = mx.array([0, length - num_new, 0, 0], mx.int32) + 0
    new = [mx.random.normal((1, shape.kv_heads, num_new, dim)).astype(shape.dtype) for dim in dims]
    mx.eval(pages, table, span, new)

    def build() -> list[mx.array]:
        collected = [
            GPU_KERNELS.collect(new[0], new[1], keys, values, table, span, block_size=size, length=length)
            for keys, values in islice(cycle(pages), _COLLECT_LAUNCHES)
        ]
        return [one for both in collected for one in both]

    plain = shape.kv_heads * sum(dims) * shape.dtype.size
    return _Work(build, _COLLECT_LAUNCHES, length * (_row_bytes(shape) + plain) + num_new * plain)


def _layers(shape: AttentionShape, slots: int) -> list[PagePair]:
    """Pages of several layers with ``slots`` slots, of random rows."""
    number = max(1, min(_DECODE_LAUNCHES, _PAGE_BYTES // (_row_bytes(shape) * slots)))

    def pages(dim: int) -> PageArrays:
        if not shape.bits:
            return mx.random.normal((1, shape.kv_heads, slots, dim), dtype=shape.dtype)
        groups = dim // (group_size(dim) or dim)
        words = mx.random.randint(0, 1 << 30, (1, shape.kv_heads, slots, dim * shape.bits // 32))
        scales, biases = (
            mx.random.uniform(low, high, (1, shape.kv_heads, slots, groups)).astype(shape.dtype)
            for low, high in ((0.01, 0.02), (-2.0, -1.0))
        )
        return PackedPages(words.astype(mx.uint32), scales, biases)

    return [(pages(shape.key_dim), pages(shape.value_dim)) for _ in range(number)]


@cache
def bytes_per_second() -> float:
    """What this GPU's memory gives to a kernel that reads and does nothing else."""
    values = mx.zeros((_READ_BYTES // 4,), mx.float32) + 0
    mx.eval(values)
    kernel = make_kernel("read_all", ("values",), ("out",), _READ)
    rounds = 8

    def build() -> list[mx.array]:
        return [
            kernel(
                inputs=[values],
                template=[],
                grid=(_READ_BYTES // 64, 1, 1),
                threadgroup=(256, 1, 1),
                output_shapes=[(256,)],
                output_dtypes=[mx.float32],
            )[0]
            for _ in range(rounds)
        ]

    return rounds * _READ_BYTES / seconds_of(build)


def seconds_of(build: Callable[[], list[mx.array]]) -> float:
    """What the GPU takes to compute what ``build`` gives, without the time that the host takes to ask for it.

    The GPU is kept busy while the host asks, and the time of that, measured in turns with it, is taken off.
    """
    busy_size = _busy_size()
    mx.eval(build())
    alone: list[float] = []
    together: list[float] = []
    for _ in range(_TIMES):
        for times, wanted in ((alone, []), (together, build())):
            busy = _busy(busy_size)
            mx.synchronize()
            started = time.perf_counter()
            mx.async_eval(busy)  # type: ignore[no-untyped-call]
            mx.eval(wanted, busy)
            times.append(time.perf_counter() - started)
    return max(min(together) - min(alone), 1e-9)


def _busy(size: int) -> mx.array:
    matrix: mx.array = mx.full((size, size), 1e-4, mx.float16)
    for _ in range(4):
        matrix = matrix @ matrix
    return matrix


@cache
def _busy_size() -> int:
    """The size of matrices whose products take this GPU long enough."""
    for size in (1024, 2048, 4096):
        mx.eval(_busy(size))
        started = time.perf_counter()
        mx.eval(_busy(size))
        if time.perf_counter() - started > _BUSY_SECONDS:
            return size
    return 8192
