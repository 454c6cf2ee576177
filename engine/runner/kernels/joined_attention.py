"""Decode attention from a layer's joined product of queries, keys and values: norms and rotation in the same launch.

As :func:`engine.runner.kernels.paged_attention.paged_attention` it writes into pages in place; what is said there
about order holds here.
"""

from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import float_bits
from engine.runner.kernels.joined_attention_text import ValueHeads, joined_text
from engine.runner.kernels.page_format import (
    PageArrays,
    PageFormat,
    arrays_of,
    element_type,
    format_of,
    page_names,
    rows_of,
)
from engine.runner.kernels.paged_attention import (
    ELEMENT_TYPES,
    AttentionText,
    attend,
    attention_plan,
    most_tokens,
    positive_bits,
)
from engine.runner.kernels.paged_attention_mma_text import mma_text


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads: gains [D] of their elements, and what is added to a mean square."""

    query_gain: mx.array
    key_gain: mx.array
    eps: float


class HeadConstants(NamedTuple):
    """What a layer turns its heads by, and normalizes them by first if ``eps`` is given.

    ``values`` float32: frequencies [D / 2], radians per position by which elements i and i + D / 2 are turned, and
    behind them the gains [D] of query heads and [D] of key heads. One array, since each costs a launch host's time.
    ``value_heads`` are normalized only where the others are.
    """

    values: mx.array
    eps: float | None = None
    value_heads: ValueHeads = "given"

    @classmethod
    def of(
        cls, frequencies: mx.array, norms: HeadNorms | None = None, value_heads: ValueHeads = "given"
    ) -> "HeadConstants":
        """Together, evaluated: by an operation, since arrays made from host memory are read over the bus on CUDA."""
        gains = [] if norms is None else [norms.query_gain, norms.key_gain]
        values = mx.concatenate([part.astype(mx.float32) for part in (frequencies, *gains)]) * 1.0
        mx.eval(values)
        return cls(values, None if norms is None else norms.eps, value_heads)

    def heads_of_row(self, heads: int, kv_heads: int) -> int:
        """Heads that a row of the joined product holds."""
        return heads + kv_heads * (1 if self.value_heads == "normalized keys" else 2)


def joined_attention(
    joined: mx.array,
    key_pages: PageArrays,
    value_pages: PageArrays,
    block_tables: mx.array,
    positions: mx.array,
    constants: HeadConstants,
    *,
    heads: int,
    scale: float,
    block_size: int,
    window: int | None = None,
    splits: int | None = None,
    arrivals: mx.array | None = None,
) -> mx.array:
    """Normalize and rotate each row's heads, write its new key and value into their slot, and attend.

    ``joined`` [rows, (heads + 2 * kv_heads) * D]: a row's query heads, key heads and value heads, as they leave the
    product; without value heads where ``constants`` make them of the key heads. The rest as in
    :func:`paged_attention`. Gives [rows, heads * D]. ValueError: what it does not know.
    """
    rows, kv_heads = joined.shape[0], rows_of(key_pages).shape[1]
    dim = joined.shape[1] // constants.heads_of_row(heads, kv_heads)
    form = _check(joined, key_pages, value_pages, block_tables, positions, constants, heads)
    plan = attention_plan(joined.dtype, dim, dim, heads // kv_heads, block_size, form, form, rotates=True)
    pages = [*arrays_of(key_pages), *arrays_of(value_pages)]
    return attend(
        _text(constants, form.bits > 0, plan.on_tensor_cores),
        plan,
        [joined, *pages, block_tables, positions, constants.values],
        template=[
            ("T", joined.dtype),
            ("BLOCK_SIZE", block_size),
            ("WINDOW", window or 0),
            ("SCALE", positive_bits("scale", scale)),
            ("CAP", 0),
            *([] if constants.eps is None else [("EPS", float_bits(constants.eps))]),
        ],
        result=(rows, heads, dim),
        shape=(rows, heads * dim),
        blocks=kv_heads * plan.blocks,
        tokens=most_tokens(block_tables.shape[1], block_size, window),
        splits=splits,
        arrivals=arrivals,
    )


def rotates(dim: int, element_size: int) -> bool:
    """Whether a lane can hold both halves of the pairs of a head of ``dim`` elements."""
    return dim * element_size % 32 == 0


def _text(constants: HeadConstants, packed: bool, on_tensor_cores: bool) -> AttentionText:
    normed, value_heads = constants.eps is not None, constants.value_heads
    text = mma_text(packed=packed, joined=True, normed=normed, value_heads=value_heads) if on_tensor_cores else None
    body, header = text or joined_text(normed=normed, packed=packed, value_heads=value_heads)
    pages = *page_names("key", packed=packed), *page_names("value", packed=packed)
    inputs = ("joined", *pages, "block_tables", "positions", "constants")
    name = f"joined_attention{'_mma' * on_tensor_cores}{'_packed' * packed}{'_normed' * normed}"
    name += {"given": "", "normalized": "_values", "normalized keys": "_keys_as_values"}[value_heads]
    return AttentionText(name, inputs, body, header)


def _check(
    joined: mx.array,
    key_pages: PageArrays,
    value_pages: PageArrays,
    block_tables: mx.array,
    positions: mx.array,
    constants: HeadConstants,
    heads: int,
) -> PageFormat:
    kinds = {joined.dtype, element_type(key_pages), element_type(value_pages)}
    if len(kinds) > 1 or joined.dtype not in ELEMENT_TYPES:
        raise ValueError(f"rows and pages in {', '.join(sorted(map(str, kinds)))}")
    shape, rows = rows_of(key_pages).shape, joined.shape[0]
    kv_heads = shape[1]
    dim = joined.shape[1] // constants.heads_of_row(heads, kv_heads)
    if heads % kv_heads or joined.shape != (rows, constants.heads_of_row(heads, kv_heads) * dim):
        raise ValueError(f"rows of shape {joined.shape} do not hold {heads} heads over pages of {shape}")
    formats = {format_of(pages, dim) for pages in (key_pages, value_pages)}
    if len(formats) > 1 or shape != rows_of(value_pages).shape or not rotates(dim, joined.dtype.size):
        raise ValueError(f"no rotation in pages of shapes {shape} and {rows_of(value_pages).shape}")
    values, size = constants.values, dim // 2 + (0 if constants.eps is None else 2 * dim)
    if values.dtype != mx.float32 or values.shape != (size,):
        raise ValueError(f"constants in {values.dtype}, of shape {values.shape}, for heads of {dim}")
    if constants.eps is None and constants.value_heads != "given":
        raise ValueError("constants that normalize value heads alone")
    if {block_tables.dtype, positions.dtype} != {mx.int32} or block_tables.shape[:1] != (rows,):
        raise ValueError(f"{rows} rows, but {block_tables.shape=} in {block_tables.dtype}, {positions.dtype}")
    if block_tables.ndim != 2 or positions.size < rows:
        raise ValueError(f"{rows} rows, but {block_tables.shape=} and {positions.shape=}")
    return formats.pop()
