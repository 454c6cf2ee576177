"""Decode attention that reads pages where they lie, and ``collect``, which does the same for a prompt's chunk.

Both write new keys and values into their slots in place, which MLX does not see: a page array is an input to it. Three
things make that right.

* Within a launch nobody reads a slot that another block writes, unless both write the same. Parts of a split context
  are read by the block that was the last to arrive, behind a fence.
* Order follows from data alone. Whatever touches a page array takes an input that was computed from an output of the
  launch that touched it last; ``mx.depends`` adds no edge inside a CUDA graph, nor a barrier on Metal. Counters of
  arrivals are zeros between launches, and belong to one such array for that reason.
* A page array is never a view, which would be copied and the write lost, and never donated while in use.
"""

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from engine.runner.kernels import packed_attention_text as packed_text
from engine.runner.kernels import paged_attention_text as text
from engine.runner.kernels.attention_geometry import attention_geometry
from engine.runner.kernels.dialect import Kernel, float_bits, make_kernel
from engine.runner.kernels.last_block_text import Ending, ended
from engine.runner.kernels.mma_geometry import MmaGeometry, mma_geometry
from engine.runner.kernels.page_format import (
    VECTOR_BYTES,
    PageArrays,
    PageFormat,
    arrays_of,
    element_type,
    format_of,
    page_names,
    rows_of,
)
from engine.runner.kernels.paged_attention_mma_text import mma_text

ELEMENT_TYPES = (mx.bfloat16, mx.float16, mx.float32)
_MOST_SPLITS = 256
_COLLECT_THREADS = 256
_FEWEST_ENTRIES = 8
"""Of a table: arrays of up to 8 bytes lie in the host's memory on CUDA, and Metal's text differs for fewer elements."""
_UNUSED_OUTPUT = (8,)
"""Shape of an output that a launch does not write."""
_JOINED_PER_TOKEN = 3.5
"""How often reading a token's key and value for one query head takes as long as joining one of its parts, when a block
joins all. On an H200 a warp joins a part of 128 elements in 0.03 us, and a block reads 20 bytes a nanosecond."""


def paged_attention(
    queries: mx.array,
    new_keys: mx.array,
    new_values: mx.array,
    key_pages: PageArrays,
    value_pages: PageArrays,
    block_tables: mx.array,
    positions: mx.array,
    *,
    scale: float,
    block_size: int,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    arrivals: mx.array | None = None,
) -> mx.array:
    """Write every row's new key and value into their slot, and attend over all that the row sees.

    ``queries`` [rows, heads, 1, D]; ``new_keys`` [rows, kv_heads, 1, D] and ``new_values`` [rows, kv_heads, 1, DV];
    pages [1, kv_heads, slots, D] and [1, kv_heads, slots, DV], or packed, all of one element type; ``block_tables``
    int32 [rows, width]; ``positions`` int32 [rows or more] of the new tokens, negative for a padding row, which gives
    zeros and writes nothing; ``window`` tokens are seen, the new one among them; ``sinks`` [heads]. Gives
    [rows, heads, 1, DV]. ``splits`` of a row's context: as many as keep the GPU busy. ``arrivals`` from
    :func:`arrival_counters`: then this is one launch, which writes them in place; else several splits take two. On
    CUDA, tables and positions made from host memory are read over the bus: let them come from an operation.
    ValueError: what it does not know.
    """
    formats = _check_pages(queries, new_keys, new_values, key_pages, value_pages)
    _check_call(queries, new_keys, block_tables, positions, sinks)
    rows, heads, _, key_dim = queries.shape
    kv_heads, value_dim = new_keys.shape[1], new_values.shape[3]
    plan = attention_plan(queries.dtype, key_dim, value_dim, heads // kv_heads, block_size, *formats)
    pages = [*arrays_of(key_pages), *arrays_of(value_pages)]
    inputs = [queries, new_keys, new_values, *pages, block_tables, positions]
    return attend(
        _attention_text(sinks is not None, formats[0].bits > 0, plan.on_tensor_cores),
        plan,
        inputs if sinks is None else [*inputs, sinks],
        template=[
            ("T", queries.dtype), ("BLOCK_SIZE", block_size), ("WINDOW", window or 0),
            ("SCALE", positive_bits("scale", scale)),
            ("CAP", 0 if softcap is None else positive_bits("softcap", softcap)),
        ],
        result=(rows, heads, value_dim), shape=(rows, heads, 1, value_dim), blocks=kv_heads * plan.blocks,
        tokens=most_tokens(block_tables.shape[1], block_size, window),
        splits=splits, arrivals=arrivals, sinks=sinks,
    )  # fmt: skip


class AttentionPlan(NamedTuple):
    """How a launch divides its work, and with which text."""

    threads: int
    blocks: int
    tokens_per_pass: int
    on_tensor_cores: bool
    template: list[tuple[str, int | mx.Dtype]]


def attention_plan(
    dtype: mx.Dtype, key_dim: int, value_dim: int, group: int, block_size: int, keys: PageFormat, values: PageFormat,
    *, rotates: bool = False,
) -> AttentionPlan:  # fmt: skip
    """For ``group`` query heads per kv head. ValueError for what no block can do.

    ``rotates``: a lane holds both halves of the pairs that a rotation turns.
    """
    fits = tensor_cores() and not (rotates and key_dim % 64)
    mma = mma_geometry(dtype, key_dim, value_dim, group, block_size, keys=keys, values=values) if fits else None
    if mma is not None:
        return mma_plan(dtype, mma)
    packed = keys.bits > 0
    made = attention_geometry(key_dim, value_dim, group, dtype.size, rotates=rotates, packed=packed)
    made.check(block_size)
    more = [("BITS", keys.bits), ("KEY_GROUP", keys.group_size), ("VALUE_GROUP", values.group_size)] if packed else []
    return AttentionPlan(made.threads, 1, made.tokens_per_pass, False, [*made.template, *more])


def mma_plan(dtype: mx.Dtype, geometry: MmaGeometry) -> AttentionPlan:
    """With the text for tensor cores."""
    computed = mx.float16 if geometry.bits else dtype
    return AttentionPlan(
        geometry.threads, geometry.blocks, geometry.tokens_per_pass, True, [("C", computed), *geometry.template]
    )


class AttentionText(NamedTuple):
    """A kernel of decode attention, but for the end of its launch."""

    name: str
    inputs: tuple[str, ...]
    body: str
    header: str

    def kernel(self, ending: Ending, *, on_tensor_cores: bool) -> Kernel:
        """The kernel with an end."""
        body, header = ended(self.body, self.header, ending, "here" if on_tensor_cores else "GROUP")
        inputs = (*self.inputs, "arrivals") if ending is Ending.LAST_BLOCK else self.inputs
        return make_kernel(f"{self.name}{ending.value}", inputs, ending.outputs, body, header)


def attend(
    text: AttentionText,
    plan: AttentionPlan,
    inputs: list[mx.array],
    *,
    template: list[tuple[str, Any]],
    result: tuple[int, int, int],
    shape: tuple[int, ...],
    blocks: int,
    tokens: int,
    splits: int | None,
    arrivals: mx.array | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Launch; gives the ``result`` (rows, heads, DV) in ``shape``, in the first input's element type.

    ``blocks`` for a row's heads, of at most ``tokens`` tokens; splits and arrivals as in :func:`paged_attention`.
    """
    (rows, heads, value_dim), dtype = result, inputs[0].dtype
    if splits is None:
        splits = number_of_splits(rows, blocks, tokens, plan.tokens_per_pass)
        if arrivals is not None:
            splits = min(splits, most_joined(tokens, math.ceil(heads / blocks)))
    if arrivals is None:
        ending, shapes = Ending.SECOND_LAUNCH, attention_shapes(rows, heads, splits, value_dim)
    elif splits == 1:
        ending, shapes = Ending.ONE_SPLIT, [shape]
    else:
        ending, shapes = Ending.LAST_BLOCK, [shape, (rows * heads * splits * (value_dim + 2),)]
        _check_arrivals(arrivals, rows * blocks)
        inputs = [*inputs, arrivals]
    outputs = text.kernel(ending, on_tensor_cores=plan.on_tensor_cores)(
        inputs=inputs,
        template=[*template, *plan.template],
        grid=(plan.threads * splits, blocks, rows),
        threadgroup=(plan.threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=[dtype, mx.float32, mx.float32][: len(shapes)],
    )
    if ending is not Ending.SECOND_LAUNCH:
        return outputs[0]
    return (outputs[0] if splits == 1 else join_splits(outputs[1], outputs[2], sinks, dtype)).reshape(shape)


def most_joined(tokens: int, heads: int) -> int:
    """Splits of ``tokens`` beyond which joining them takes a block with ``heads`` query heads longer than they save."""
    return max(2, math.isqrt(int(_JOINED_PER_TOKEN * tokens / heads)))


def arrival_counters(counters: int = 0) -> mx.array | None:
    """Zeros for attention in one launch, on the device; None where splits are joined by a second one.

    At least ``counters``, and as many as any launch needs whose ``splits`` are not given. Launches that may run at the
    same time need arrays of their own: this one belongs where an array of pages does, and is ordered as that is.
    """
    if not joins_in_launch():
        return None
    made = mx.zeros((max(_FEWEST_ENTRIES, counters, blocks_at_once() // 2),), mx.int32)
    mx.eval(made)
    return made


@cache
def joins_in_launch() -> bool:
    """Whether the last block of a row to arrive can read what the others wrote: on Metal no fence orders that."""
    return bool(mx.cuda.is_available())


@cache
def tensor_cores() -> bool:
    """Whether there are any that the kernels can use."""
    return bool(mx.cuda.is_available())


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
    key_pages: PageArrays,
    value_pages: PageArrays,
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
    of positions [begin, start + T), where ``length`` = start + T - begin; those before ``start`` come from the pages,
    and over packed pages all are what these give back. Table entries of positions before ``begin`` are never looked at.
    """
    kv_heads, key_dim, value_dim = new_keys.shape[1], new_keys.shape[3], new_values.shape[3]
    formats = _check_pages(None, new_keys, new_values, key_pages, value_pages)
    _check_dtype("block_table", block_table, (mx.int32,))
    _check_dtype("span", span, (mx.int32,))
    if block_table.ndim != 1 or span.size < 4 or new_keys.shape[0] != 1 or not new_keys.shape[2] <= length:
        raise ValueError(
            f"collect takes one sequence, a flat block table, a span of 4 and no less length than rows; got "
            f"{new_keys.shape=}, {block_table.shape=}, {span.shape=}, {length=}"
        )
    if block_table.size < _FEWEST_ENTRIES:
        block_table = mx.pad(block_table, (0, _FEWEST_ENTRIES - block_table.size))
    items, template = _collected(new_keys.dtype, (key_dim, value_dim), formats)
    blocks = math.ceil(length * items / _COLLECT_THREADS)
    keys, values = _collect_kernel(formats[0].bits > 0)(
        inputs=[new_keys, new_values, *arrays_of(key_pages), *arrays_of(value_pages), block_table, span],
        template=[*template, ("BLOCK_SIZE", block_size), ("THREADS", _COLLECT_THREADS)],
        grid=(blocks * _COLLECT_THREADS, kv_heads, 1),
        threadgroup=(_COLLECT_THREADS, 1, 1),
        output_shapes=[(1, kv_heads, length, key_dim), (1, kv_heads, length, value_dim)],
        output_dtypes=[new_keys.dtype, new_values.dtype],
    )
    return keys, values


def _collected(
    dtype: mx.Dtype, dims: tuple[int, int], formats: tuple[PageFormat, PageFormat]
) -> tuple[int, list[tuple[str, int | mx.Dtype]]]:
    """Threads for a collected row, one for 16 bytes or a warp for each packed group, and what the text is to know."""
    keys, values = formats
    if not keys.bits:
        vectors = [dim * dtype.size // VECTOR_BYTES for dim in dims]
        return sum(vectors), [("KEY_VECTORS", vectors[0]), ("VALUE_VECTORS", vectors[1])]
    groups = dims[0] // keys.group_size, dims[1] // values.group_size
    return 32 * sum(groups), [
        ("T", dtype), ("BITS", keys.bits), ("KEY_GROUP", keys.group_size), ("VALUE_GROUP", values.group_size),
        ("KEY_GROUPS", groups[0]), ("VALUE_GROUPS", groups[1]),
    ]  # fmt: skip


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


def _attention_text(sinks: bool, packed: bool, on_tensor_cores: bool) -> AttentionText:
    inputs = (
        "queries", "new_keys", "new_values", *page_names("key", packed=packed), *page_names("value", packed=packed),
        "block_tables", "positions",
    )  # fmt: skip
    if on_tensor_cores:
        body, header = mma_text(packed=packed, sinks=sinks)
    else:
        body, header = text.ATTENTION, text.SHARED_FUNCTIONS + text.SINK_MACROS[sinks] + text.ATTENTION_FUNCTIONS
        if packed:
            body, header = packed_text.PACKED_ATTENTION, header + packed_text.PACKING + packed_text.UNPACKING
    name = f"paged_attention{'_mma' * on_tensor_cores}{'_packed' * packed}{'_sinks' * sinks}"
    return AttentionText(name, (*inputs, "sinks") if sinks else inputs, body, header)


def _reduce_kernel(sinks: bool) -> Kernel:
    return make_kernel(
        "paged_attention_reduce_sinks" if sinks else "paged_attention_reduce",
        ("part", "sums", "sinks") if sinks else ("part", "sums"),
        ("out",),
        text.REDUCE,
        text.SHARED_FUNCTIONS + text.SINK_MACROS[sinks],
    )


def _collect_kernel(packed: bool) -> Kernel:
    pages = *page_names("key", packed=packed), *page_names("value", packed=packed)
    inputs = ("new_keys", "new_values", *pages, "block_table", "span")
    if packed:
        header = packed_text.PACKING + packed_text.PACKED_COLLECT_FUNCTIONS
        return make_kernel("collect_packed_pages", inputs, ("keys", "values"), packed_text.PACKED_COLLECT, header)
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


def _check_arrivals(arrivals: mx.array, counters: int) -> None:
    if arrivals.dtype != mx.int32 or arrivals.ndim != 1 or arrivals.size < max(counters, _FEWEST_ENTRIES):
        raise ValueError(f"{counters} counters of arrivals are needed, not {arrivals.dtype} {arrivals.shape}")


def _check_pages(
    queries: mx.array | None, new_keys: mx.array, new_values: mx.array, key_pages: PageArrays, value_pages: PageArrays
) -> tuple[PageFormat, PageFormat]:
    """Element types and row sizes; rows are moved in vectors of 16 bytes. Gives how keys and values lie."""
    dtype = element_type(key_pages)
    _check_dtype("key_pages", dtype, ELEMENT_TYPES)
    given = {"new_keys": new_keys.dtype, "new_values": new_values.dtype, "value_pages": element_type(value_pages)}
    for name, kind in given.items() if queries is None else {"queries": queries.dtype, **given}.items():
        _check_dtype(name, kind, (dtype,))
    for name, new, pages in (("key", new_keys, key_pages), ("value", new_values, value_pages)):
        dim, shape = new.shape[-1], rows_of(pages).shape
        if new.ndim != 4 or new.shape[1] != shape[1] or (pages is rows_of(pages) and dim != shape[3]):
            raise ValueError(f"new {name}s of shape {new.shape} do not fit pages of shape {shape}")
        if dim < 8 or dim * dtype.size % VECTOR_BYTES:
            raise ValueError(f"{name}s of {dim} elements are not a multiple of {VECTOR_BYTES} bytes, or below 8")
    shapes = rows_of(key_pages).shape, rows_of(value_pages).shape
    keys, values = format_of(key_pages, new_keys.shape[3]), format_of(value_pages, new_values.shape[3])
    if shapes[0][:3] != shapes[1][:3] or keys.bits != values.bits:
        raise ValueError(f"pages of shapes {shapes[0]} and {shapes[1]} do not belong together")
    return keys, values


def _check_dtype(name: str, given: mx.array | mx.Dtype, known: tuple[mx.Dtype, ...]) -> None:
    dtype = given.dtype if isinstance(given, mx.array) else given
    if dtype not in known:
        raise ValueError(f"{name} is {dtype}; the kernel knows {', '.join(str(one) for one in known)}")


def _check_call(
    queries: mx.array, new_keys: mx.array, block_tables: mx.array, positions: mx.array, sinks: mx.array | None
) -> None:
    rows, heads, num_tokens, key_dim = queries.shape
    if num_tokens != 1 or heads % new_keys.shape[1] or key_dim != new_keys.shape[3]:
        raise ValueError(f"queries of shape {queries.shape} do not fit new keys of shape {new_keys.shape}")
    _check_dtype("block_tables", block_tables, (mx.int32,))
    _check_dtype("positions", positions, (mx.int32,))
    if block_tables.ndim != 2 or block_tables.shape[0] != rows or positions.size < rows:
        raise ValueError(f"{rows} rows, but {block_tables.shape=} and {positions.shape=}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks of shape {sinks.shape} for {heads} heads")
