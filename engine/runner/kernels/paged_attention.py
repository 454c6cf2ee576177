"""Decode attention that reads pages where they lie, and ``collect``, which does the same for a prompt's chunk.

Both write new keys and values into their slots in place, which MLX does not see: a page array is an input to it. Three
things make that right.

* Within a launch nobody reads a slot that it writes.
* Order follows from data alone. Whatever touches a page array takes an input that was computed from an output of the
  launch that touched it last; ``mx.depends`` adds no edge inside a CUDA graph, nor a barrier on Metal.
* A page array is never a view, which would be copied and the write lost, and never donated while in use.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from engine.runner.kernels import paged_attention_text as text
from engine.runner.kernels.dialect import Kernel, float_bits, make_kernel

ELEMENT_TYPES = (mx.bfloat16, mx.float16, mx.float32)
_VECTOR_BYTES = 16
_MOST_THREADS = 1024
_MOST_SHARED_BYTES = 32 << 10
"""Of a threadgroup on Metal; CUDA has 48 KB."""
_MOST_WARP_BYTES = 28_000
"""Of them for joining warps."""
_MOST_SPLITS = 256
_COLLECT_THREADS = 256
_FEWEST_ENTRIES = 8
"""Of a table: arrays of up to 8 bytes lie in the host's memory on CUDA, and Metal's text differs for fewer elements."""
_UNUSED_OUTPUT = (8,)
"""Shape of an output that a launch does not write."""


def paged_attention(
    queries: mx.array,
    new_keys: mx.array,
    new_values: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    positions: mx.array,
    *,
    scale: float,
    block_size: int,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> mx.array:
    """Write every row's new key and value into their slot, and attend over all that the row sees.

    ``queries`` [rows, heads, 1, D]; ``new_keys`` [rows, kv_heads, 1, D] and ``new_values`` [rows, kv_heads, 1, DV];
    pages [1, kv_heads, slots, D] and [1, kv_heads, slots, DV], all of one element type; ``block_tables`` int32
    [rows, width]; ``positions`` int32 [rows or more] of the new tokens, negative for a padding row, which gives zeros
    and writes nothing; ``window`` tokens are seen, the new one among them; ``sinks`` [heads]. Gives
    [rows, heads, 1, DV]. ``splits`` of a row's context: as many as keep the GPU busy. On CUDA, tables and positions
    made from host memory are read over the bus: let them come from an operation. ValueError: what it does not know.
    """
    _check_pages(queries, new_keys, new_values, key_pages, value_pages)
    _check_call(queries, key_pages, block_tables, positions, sinks)
    rows, heads, _, key_dim = queries.shape
    kv_heads, value_dim = key_pages.shape[1], value_pages.shape[3]
    geometry = attention_geometry(key_dim, value_dim, heads // kv_heads, queries.dtype.size)
    geometry.check(block_size)
    tokens = most_tokens(block_tables.shape[1], block_size, window)
    splits = splits or number_of_splits(rows, kv_heads, tokens, geometry.tokens_per_pass)
    inputs = [queries, new_keys, new_values, key_pages, value_pages, block_tables, positions]
    out, part, sums = _attention_kernel(sinks is not None)(
        inputs=inputs if sinks is None else [*inputs, sinks],
        template=[
            ("T", queries.dtype),
            ("BLOCK_SIZE", block_size),
            ("WINDOW", window or 0),
            ("SCALE", positive_bits("scale", scale)),
            ("CAP", 0 if softcap is None else positive_bits("softcap", softcap)),
            *geometry.template,
        ],
        grid=(geometry.threads * splits, kv_heads, rows),
        threadgroup=(geometry.threads, 1, 1),
        output_shapes=attention_shapes(rows, heads, splits, value_dim),
        output_dtypes=[queries.dtype, mx.float32, mx.float32],
    )
    return (out if splits == 1 else join_splits(part, sums, sinks, queries.dtype))[:, :, None]


def most_tokens(width: int, block_size: int, window: int | None) -> int:
    """Most tokens that a row reads: the block that a window begins in is entered at its start."""
    return min(width * block_size, window + block_size) if window else width * block_size


def join_splits(part: mx.array, sums: mx.array, sinks: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """The output [rows, heads, DV] from ``part`` [rows, heads, splits, DV] and ``sums`` [rows, heads, splits, 2]."""
    rows, heads, _, value_dim = part.shape
    threads = math.ceil(value_dim / 32) * 32
    (out,) = _reduce_kernel(sinks is not None)(
        inputs=[part, sums] if sinks is None else [part, sums, sinks],
        template=[("T", dtype), ("VALUE_DIM", value_dim)],
        grid=(heads * threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, heads, value_dim)],
        output_dtypes=[dtype],
    )
    return out


def collect(
    new_keys: mx.array,
    new_values: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_table: mx.array,
    span: mx.array,
    *,
    block_size: int,
    length: int,
) -> tuple[mx.array, mx.array]:
    """Write a chunk's keys and values into their slots, and give those of the chunk and what it attends to in a row.

    ``new_keys`` [1, kv_heads, T, D] and ``new_values`` [1, kv_heads, T, DV]; pages as in :func:`paged_attention`;
    ``block_table`` int32 [blocks] of the whole sequence; ``span`` int32 [4 or more] holds ``begin`` and ``start``: the
    chunk's positions are [start, start + T). Gives keys [1, kv_heads, length, D] and values [1, kv_heads, length, DV]
    of positions [begin, start + T), where ``length`` = start + T - begin; those before ``start`` come from the pages.
    Table entries of positions before ``begin`` are never looked at.
    """
    kv_heads, key_dim, value_dim = key_pages.shape[1], key_pages.shape[3], value_pages.shape[3]
    _check_pages(None, new_keys, new_values, key_pages, value_pages)
    _check_dtype("block_table", block_table, (mx.int32,))
    _check_dtype("span", span, (mx.int32,))
    if block_table.ndim != 1 or span.size < 4 or new_keys.shape[0] != 1 or not new_keys.shape[2] <= length:
        raise ValueError(
            f"collect takes one sequence, a flat block table, a span of 4 and no less length than rows; got "
            f"{new_keys.shape=}, {block_table.shape=}, {span.shape=}, {length=}"
        )
    if block_table.size < _FEWEST_ENTRIES:
        block_table = mx.pad(block_table, (0, _FEWEST_ENTRIES - block_table.size))
    vectors = [dim * key_pages.dtype.size // _VECTOR_BYTES for dim in (key_dim, value_dim)]
    blocks = math.ceil(length * sum(vectors) / _COLLECT_THREADS)
    keys, values = _collect_kernel()(
        inputs=[new_keys, new_values, key_pages, value_pages, block_table, span],
        template=[
            ("BLOCK_SIZE", block_size),
            ("KEY_VECTORS", vectors[0]),
            ("VALUE_VECTORS", vectors[1]),
            ("THREADS", _COLLECT_THREADS),
        ],
        grid=(blocks * _COLLECT_THREADS, kv_heads, 1),
        threadgroup=(_COLLECT_THREADS, 1, 1),
        output_shapes=[(1, kv_heads, length, key_dim), (1, kv_heads, length, value_dim)],
        output_dtypes=[key_pages.dtype, value_pages.dtype],
    )
    return keys, values


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a block of the attention kernel divides its work; the text says what each number means."""

    key_dim: int
    value_dim: int
    group: int
    element_size: int
    lanes: int
    heads: int
    warps: int
    tokens: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * math.ceil(self.group / self.heads)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that a block reads at a time."""
        return self.warps * (32 // self.lanes) * self.tokens

    @property
    def shared_bytes(self) -> int:
        """Memory that the threads of a block share."""
        newest = (self.key_dim + self.value_dim) * self.element_size
        return newest + (_warp_bytes(self.warps, self.group, self.value_dim) if self.warps > 1 else 8)

    @property
    def template(self) -> list[tuple[str, int]]:
        """The numbers as the text's template arguments."""
        return [
            ("KEY_DIM", self.key_dim),
            ("VALUE_DIM", self.value_dim),
            ("GROUP", self.group),
            ("LANES", self.lanes),
            ("HEADS", self.heads),
            ("WARPS", self.warps),
            ("TOKENS", self.tokens),
        ]

    def check(self, block_size: int) -> None:
        """ValueError for what no block can do."""
        if block_size % self.tokens:
            raise ValueError(f"a block size of {block_size} is not a multiple of {self.tokens}")
        if self.shared_bytes > _MOST_SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory are needed, {_MOST_SHARED_BYTES} are there")
        if max(self.threads, self.value_dim) > _MOST_THREADS:
            raise ValueError(f"{self.group} query heads of {self.value_dim} are more than {_MOST_THREADS} threads")


@cache
def attention_geometry(
    key_dim: int, value_dim: int, group: int, element_size: int, *, rotates: bool = False
) -> Geometry:
    """The geometry for ``group`` query heads per kv head; measured on an H200 for 128/4, 128/8 and 256/8.

    ``rotates``: a lane holds both halves of the pairs that a rotation turns, so an even number of vectors.
    """
    vector = _VECTOR_BYTES // element_size

    def fits(lanes: int) -> bool:
        even = not rotates or key_dim // (lanes * vector) % 2 == 0
        return lanes <= 32 and key_dim % (lanes * vector) == 0 and value_dim % (lanes * vector) == 0 and even

    lanes = 1
    while key_dim // lanes > 16 and fits(2 * lanes):
        lanes *= 2
    if group >= 8 and element_size == 2 and fits(2 * lanes):
        lanes *= 2  # half the registers per head: more blocks at once
    registers = (key_dim + value_dim) // lanes  # of one query head: itself and its output
    heads = max(1, min(group, 4, 128 // registers))
    heads = math.ceil(group / math.ceil(group / heads))  # as even as the number of warps allows
    warps = max(1, 4 // math.ceil(group / heads))
    while warps > 1 and _warp_bytes(warps, group, value_dim) > _MOST_WARP_BYTES:
        warps //= 2
    tokens = 4 if element_size == 2 and key_dim // (lanes * vector) <= 2 else 2
    return Geometry(key_dim, value_dim, group, element_size, lanes, heads, warps, tokens)


def _warp_bytes(warps: int, group: int, value_dim: int) -> int:
    return warps * group * (value_dim + 2) * 4


def number_of_splits(rows: int, kv_heads: int, tokens: int, tokens_per_pass: int) -> int:
    """As many splits of at most ``tokens`` as keep all blocks on the GPU at once, none shorter than a pass.

    One wave is best: with four times as many splits a step took 15 to 60% longer on an H200.
    """
    most = min(_MOST_SPLITS, math.ceil(tokens / tokens_per_pass))
    return max(1, min(most, blocks_at_once() // (rows * kv_heads)))


@cache
def blocks_at_once() -> int:
    """Blocks of the attention kernel that this GPU works on at the same time; a guess where it does not say."""
    if mx.cuda.is_available():
        return 2 * _cuda_multiprocessors()
    # "applegpu_g15s": the letter stands for the size of the chip. Four threadgroups a core.
    size = str(mx.device_info().get("architecture", ""))[-1:]
    return 4 * {"p": 6, "g": 16, "s": 40, "d": 80}.get(size, 16)


def _cuda_multiprocessors(default: int = 132) -> int:
    """From the driver, since MLX does not tell; ``default`` is an H100's."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return default
    count, device = ctypes.c_int(), ctypes.c_int()
    multiprocessor_count = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(count), multiprocessor_count, device)
    )
    return default if failed or count.value < 1 else count.value


def _attention_kernel(sinks: bool) -> Kernel:
    inputs = ("queries", "new_keys", "new_values", "key_pages", "value_pages", "block_tables", "positions")
    return make_kernel(
        "paged_attention_sinks" if sinks else "paged_attention",
        (*inputs, "sinks") if sinks else inputs,
        ("out", "part", "sums"),
        text.ATTENTION,
        text.SHARED_FUNCTIONS + text.SINK_MACROS[sinks] + text.ATTENTION_FUNCTIONS,
    )


def _reduce_kernel(sinks: bool) -> Kernel:
    return make_kernel(
        "paged_attention_reduce_sinks" if sinks else "paged_attention_reduce",
        ("part", "sums", "sinks") if sinks else ("part", "sums"),
        ("out",),
        text.REDUCE,
        text.SHARED_FUNCTIONS + text.SINK_MACROS[sinks],
    )


def _collect_kernel() -> Kernel:
    inputs = ("new_keys", "new_values", "key_pages", "value_pages", "block_table", "span")
    return make_kernel("collect_pages", inputs, ("keys", "values"), text.COLLECT, text.COLLECT_FUNCTIONS)


def attention_shapes(rows: int, heads: int, splits: int, value_dim: int) -> list[tuple[int, ...]]:
    """Of the output, of the splits' parts and of their sums: one split has no parts, several no output."""
    if splits == 1:
        return [(rows, heads, value_dim), _UNUSED_OUTPUT, _UNUSED_OUTPUT]
    return [_UNUSED_OUTPUT, (rows, heads, splits, value_dim), (rows, heads, splits, 2)]


def positive_bits(name: str, value: float) -> int:
    """The bits of ``value`` as a template argument. ValueError if it is not positive."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive, not {value}")
    return float_bits(value)


def _check_dtype(name: str, array: mx.array, known: tuple[mx.Dtype, ...]) -> None:
    if array.dtype not in known:
        raise ValueError(f"{name} is {array.dtype}; the kernel knows {', '.join(str(one) for one in known)}")


def _check_pages(
    queries: mx.array | None, new_keys: mx.array, new_values: mx.array, key_pages: mx.array, value_pages: mx.array
) -> None:
    """Element types and row sizes; rows are moved in vectors of 16 bytes."""
    _check_dtype("key_pages", key_pages, ELEMENT_TYPES)
    given = {"new_keys": new_keys, "new_values": new_values, "value_pages": value_pages}
    for name, array in given.items() if queries is None else {"queries": queries, **given}.items():
        _check_dtype(name, array, (key_pages.dtype,))
    for name, new, pages in (("key", new_keys, key_pages), ("value", new_values, value_pages)):
        dim = pages.shape[3]
        if dim < 8 or dim * pages.dtype.size % _VECTOR_BYTES:
            raise ValueError(f"{name}s of {dim} elements are not a multiple of {_VECTOR_BYTES} bytes, or below 8")
        if new.ndim != 4 or new.shape[1] != pages.shape[1] or new.shape[3] != dim:
            raise ValueError(f"new {name}s of shape {new.shape} do not fit pages of shape {pages.shape}")
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ValueError(f"pages of shapes {key_pages.shape} and {value_pages.shape} do not belong together")


def _check_call(
    queries: mx.array, key_pages: mx.array, block_tables: mx.array, positions: mx.array, sinks: mx.array | None
) -> None:
    rows, heads, num_tokens, key_dim = queries.shape
    if num_tokens != 1 or heads % key_pages.shape[1] or key_dim != key_pages.shape[3]:
        raise ValueError(f"queries of shape {queries.shape} do not fit pages of shape {key_pages.shape}")
    _check_dtype("block_tables", block_tables, (mx.int32,))
    _check_dtype("positions", positions, (mx.int32,))
    if block_tables.ndim != 2 or block_tables.shape[0] != rows or positions.size < rows:
        raise ValueError(f"{rows} rows, but {block_tables.shape=} and {positions.shape=}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks of shape {sinks.shape} for {heads} heads")
