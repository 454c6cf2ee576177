"""Decode attention over latent pages (MLA, as in DeepSeek): every token's vector is read once for all heads.

As :func:`engine.runner.kernels.paged_attention.paged_attention` it writes into pages in place; what is said there
about order holds here.
"""

import math

import mlx.core as mx

from engine.runner.kernels import paged_attention as usual
from engine.runner.kernels.attention_geometry import Geometry
from engine.runner.kernels.latent_attention_text import LATENT_ATTENTION, LATENT_HEADER
from engine.runner.kernels.mma_geometry import mma_geometry
from engine.runner.kernels.page_format import VECTOR_BYTES
from engine.runner.kernels.paged_attention_mma_text import mma_text

_INPUTS = (
    "queries", "rope_queries", "new_keys", "new_values", "key_pages", "value_pages", "block_tables", "positions",
)  # fmt: skip
_FEWEST_TOKENS = 64
"""Of a split: joining many short ones took three quarters of the time at one row of 4096 tokens on an H200."""
_MOST_HEADS = 4
"""Query heads of a warp without tensor cores."""


def latent_attention(
    queries: mx.array,
    rope_queries: mx.array,
    new_latents: mx.array,
    new_ropes: mx.array,
    latent_pages: mx.array,
    rope_pages: mx.array,
    block_tables: mx.array,
    positions: mx.array,
    *,
    scale: float,
    block_size: int,
    splits: int | None = None,
    arrivals: mx.array | None = None,
) -> mx.array:
    """Write every row's new vectors into their slot, and attend over all before them.

    ``queries`` [rows, heads, 1, R], in the space of the latent vectors, and their rotated part ``rope_queries``
    [rows, heads, 1, P], times ``scale`` already, which is what mlx-lm's models hand on; ``new_latents`` [rows, 1, 1, R]
    and ``new_ropes`` [rows, 1, 1, P]; pages [1, 1, slots, R] and [1, 1, slots, P], all of one element type. A score is
    the sum of both products, values are the latent vectors: gives [rows, heads, 1, R]. The rest as in
    :func:`paged_attention`. ValueError: what it does not know.
    """
    arrays = [queries, rope_queries, new_latents, new_ropes, latent_pages, rope_pages]
    _check(arrays, block_tables, positions)
    (rows, heads, _, dim), rope_dim = queries.shape, rope_pages.shape[3]
    plan = _plan(queries.dtype, dim, rope_dim, heads, block_size)
    return usual.attend(
        _text(plan.on_tensor_cores),
        plan._replace(tokens_per_pass=max(plan.tokens_per_pass, _FEWEST_TOKENS)),
        [*arrays, block_tables, positions],
        template=[
            ("T", queries.dtype),
            ("BLOCK_SIZE", block_size),
            ("WINDOW", 0),
            ("SCALE", usual.positive_bits("scale", scale)),
            ("CAP", 0),
        ],
        result=(rows, heads, dim),
        shape=(rows, heads, 1, dim),
        blocks=plan.blocks,
        tokens=block_tables.shape[1] * block_size,
        splits=splits,
        arrivals=arrivals,
    )


def _plan(dtype: mx.Dtype, dim: int, rope_dim: int, heads: int, block_size: int) -> usual.AttentionPlan:
    """How a launch divides its work. ValueError for what no block does.

    Without tensor cores all of a row's heads are one block's: up to 128 of them, in warps that read the same tokens.
    """
    vector = VECTOR_BYTES // dtype.size
    lanes = next((n for n in (32, 16, 8, 4, 2, 1) if dim % (n * vector) == 0 and rope_dim % n == 0), 0)
    if not lanes:
        raise ValueError(f"latent vectors of {dim} and {rope_dim} elements")
    per_warp = max(1, min(heads, _MOST_HEADS, 256 * lanes // (2 * dim)))
    made = Geometry(dim, dim, heads, dtype.size, lanes, per_warp, 1 if heads > per_warp else 2, 2)
    made.check(block_size)
    fits = usual.tensor_cores()
    mma = mma_geometry(dtype, dim, dim, heads, block_size, rope_dim=rope_dim) if fits else None
    if mma is not None:
        return usual.mma_plan(dtype, mma)
    return usual.AttentionPlan(made.threads, 1, made.tokens_per_pass, False, [*made.template, ("ROPE_DIM", rope_dim)])


def _text(on_tensor_cores: bool) -> usual.AttentionText:
    body, header = mma_text(packed=False, latent=True) if on_tensor_cores else (LATENT_ATTENTION, LATENT_HEADER)
    return usual.AttentionText(f"latent_attention{'_mma' * on_tensor_cores}", _INPUTS, body, header)


def _check(arrays: list[mx.array], block_tables: mx.array, positions: mx.array) -> None:
    queries, rope_queries, new_latents, new_ropes, latent_pages, rope_pages = arrays
    if {one.dtype for one in arrays} != {queries.dtype} or queries.dtype not in usual.ELEMENT_TYPES:
        raise ValueError(f"rows and pages in {', '.join(sorted({str(one.dtype) for one in arrays}))}")
    rows, heads, num_tokens, dim = queries.shape
    rope_dim = rope_pages.shape[3]
    wanted = [(rows, heads, 1, rope_dim), (rows, 1, 1, dim), (rows, 1, 1, rope_dim)]
    if num_tokens != 1 or [rope_queries.shape, new_latents.shape, new_ropes.shape] != wanted:
        raise ValueError(
            f"rows of shapes {queries.shape}, {rope_queries.shape}, {new_latents.shape}, {new_ropes.shape}"
        )
    slots = math.prod(latent_pages.shape[:3])
    if latent_pages.shape != (1, 1, slots, dim) or rope_pages.shape != (1, 1, slots, rope_dim):
        raise ValueError(f"latent pages of shapes {latent_pages.shape} and {rope_pages.shape}")
    if {block_tables.dtype, positions.dtype} != {mx.int32} or block_tables.ndim != 2:
        raise ValueError(f"block tables in {block_tables.dtype}, of shape {block_tables.shape}, {positions.dtype}")
    if block_tables.shape[0] != rows or positions.size < rows:
        raise ValueError(f"{rows} rows, but {block_tables.shape=} and {positions.shape=}")
