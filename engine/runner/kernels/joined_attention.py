"""Decode attention from a layer's joined product of queries, keys and values: norms and rotation in the same launch.

As :func:`engine.runner.kernels.paged_attention.paged_attention` it writes into pages in place; what is said there
about order holds here.
"""

from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import Kernel, float_bits, make_kernel
from engine.runner.kernels.joined_attention_text import joined_text
from engine.runner.kernels.paged_attention import (
    ELEMENT_TYPES,
    attention_geometry,
    attention_shapes,
    join_splits,
    most_tokens,
    number_of_splits,
    positive_bits,
)

_INPUTS = ("joined", "key_pages", "value_pages", "block_tables", "positions", "frequencies")


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads: gains [D] of their elements, and what is added to a mean square."""

    query_gain: mx.array
    key_gain: mx.array
    eps: float


def joined_attention(
    joined: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    positions: mx.array,
    frequencies: mx.array,
    *,
    heads: int,
    scale: float,
    block_size: int,
    window: int | None = None,
    norms: HeadNorms | None = None,
    splits: int | None = None,
) -> mx.array:
    """Normalize and rotate each row's heads, write its new key and value into their slot, and attend.

    ``joined`` [rows, (heads + 2 * kv_heads) * D]: a row's query heads, key heads and value heads, as they leave the
    product; ``frequencies`` float32 [D / 2]: radians per position by which elements i and i + D / 2 are turned. The
    rest as in :func:`paged_attention`. Gives [rows, heads * D]. ValueError: what it does not know.
    """
    _check(joined, key_pages, value_pages, block_tables, positions, frequencies, heads)
    rows, (kv_heads, dim) = joined.shape[0], key_pages.shape[1::2]
    geometry = attention_geometry(dim, dim, heads // kv_heads, joined.dtype.size, rotates=True)
    geometry.check(block_size)
    tokens = most_tokens(block_tables.shape[1], block_size, window)
    splits = splits or number_of_splits(rows, kv_heads, tokens, geometry.tokens_per_pass)
    inputs = [joined, key_pages, value_pages, block_tables, positions, frequencies]
    out, part, sums = _kernel(norms is not None)(
        inputs=inputs if norms is None else [*inputs, norms.query_gain, norms.key_gain],
        template=[
            ("T", joined.dtype),
            ("BLOCK_SIZE", block_size),
            ("WINDOW", window or 0),
            ("SCALE", positive_bits("scale", scale)),
            ("CAP", 0),
            *([] if norms is None else [("EPS", float_bits(norms.eps))]),
            *geometry.template,
        ],
        grid=(geometry.threads * splits, kv_heads, rows),
        threadgroup=(geometry.threads, 1, 1),
        output_shapes=attention_shapes(rows, heads, splits, dim),
        output_dtypes=[joined.dtype, mx.float32, mx.float32],
    )
    return (out if splits == 1 else join_splits(part, sums, None, joined.dtype)).reshape(rows, heads * dim)


def rotates(dim: int, element_size: int) -> bool:
    """Whether a lane can hold both halves of the pairs of a head of ``dim`` elements."""
    return dim * element_size % 32 == 0


def _kernel(normed: bool) -> Kernel:
    body, header = joined_text(normed=normed)
    inputs = (*_INPUTS, "query_gain", "key_gain") if normed else _INPUTS
    name = "joined_attention_normed" if normed else "joined_attention"
    return make_kernel(name, inputs, ("out", "part", "sums"), body, header)


def _check(
    joined: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_tables: mx.array,
    positions: mx.array,
    frequencies: mx.array,
    heads: int,
) -> None:
    kinds = {joined.dtype, key_pages.dtype, value_pages.dtype}
    if len(kinds) > 1 or joined.dtype not in ELEMENT_TYPES:
        raise ValueError(f"rows and pages in {', '.join(sorted(map(str, kinds)))}")
    rows, (kv_heads, dim) = joined.shape[0], key_pages.shape[1::2]
    if key_pages.shape != value_pages.shape or not rotates(dim, joined.dtype.size):
        raise ValueError(f"no rotation in pages of shapes {key_pages.shape} and {value_pages.shape}")
    if heads % kv_heads or joined.shape != (rows, (heads + 2 * kv_heads) * dim):
        raise ValueError(f"rows of shape {joined.shape} do not hold {heads} heads over pages of {key_pages.shape}")
    if frequencies.dtype != mx.float32 or frequencies.shape != (dim // 2,):
        raise ValueError(f"frequencies in {frequencies.dtype}, of shape {frequencies.shape}, for heads of {dim}")
    if {block_tables.dtype, positions.dtype} != {mx.int32} or block_tables.shape[:1] != (rows,):
        raise ValueError(f"{rows} rows, but {block_tables.shape=} in {block_tables.dtype}, {positions.dtype}")
    if block_tables.ndim != 2 or positions.size < rows:
        raise ValueError(f"{rows} rows, but {block_tables.shape=} and {positions.shape=}")
