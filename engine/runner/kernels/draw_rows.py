"""Drawing one token per row of logits in one launch: penalties, temperature, min_p, top_k, top_p and the draw.

What :mod:`engine.runner.sampling.sampler` does in some sixty operations, each of them a pass over the rows.
"""

from typing import Protocol

import mlx.core as mx

from engine.runner.kernels.dialect import make_kernel
from engine.runner.kernels.draw_rows_text import MOST_BLOCKS, THREADS, draw_text

ELEMENT_TYPES = (mx.bfloat16, mx.float16, mx.float32)
NUM_WISHES = 8
"""Of a row, see :mod:`engine.runner.kernels.draw_rows_text`; the last one is not used."""
FEWEST_ROWS = 4
"""Of uniforms, and of pending tokens made for the kernel. Arrays of up to 8 bytes lie in the host's memory on CUDA;
Metal's text differs for fewer than 8 numbers."""
LOG2_E = 1.4426950408889634
KEEP_ALL = 2.0
"""A top_p above any possible mass: the row has no nucleus."""
_FEWEST_COLUMNS = 32
_MOST_COLUMNS = 256 * MOST_BLOCKS


class DrawRows(Protocol):
    """What draws tokens on a device."""

    def __call__(
        self,
        logits: mx.array,
        wishes: mx.array,
        uniforms: mx.array,
        counts: mx.array | None = None,
        pending: mx.array | None = None,
    ) -> mx.array:
        """See :func:`draw_rows`."""


def takes(dtype: mx.Dtype, vocab_size: int) -> bool:
    """Whether :func:`draw_rows` knows such logits."""
    return dtype in ELEMENT_TYPES and _FEWEST_COLUMNS <= vocab_size <= _MOST_COLUMNS


def draw_rows(
    logits: mx.array,
    wishes: mx.array,
    uniforms: mx.array,
    counts: mx.array | None = None,
    pending: mx.array | None = None,
) -> mx.array:
    """Token ids int32 [R] for ``logits`` [R, V]; -1 for a row without a finite largest logit.

    ``wishes`` float32 [R, 8]: scale log2(e) / temperature (0: greedy), min_p, top_p (above 1: none), top_k (0: none),
    frequency and presence penalty, and the row of ``counts`` (-1: no penalties); they are read at once, so that on
    CUDA they should lie in the device's own memory. ``uniforms`` float32 [R or more, 2] choose a block of columns and
    a token in it.

    ``counts`` float32 [P, V], where a row has penalties: how often each token stands in its output. ``pending`` int32
    [R or more]: a token of each row that is counted first, -1 for none. It is added to ``counts`` in place, which MLX
    does not see: launches over the same counts must follow each other by their ``pending``.
    """
    rows, width = logits.shape
    assert takes(logits.dtype, width), f"no kernel for logits of shape {logits.shape} in {logits.dtype}"
    assert wishes.shape == (rows, NUM_WISHES), f"wishes of shape {wishes.shape} for {rows} rows"
    assert len(uniforms) >= max(rows, FEWEST_ROWS), f"{len(uniforms)} pairs of uniforms for {rows} rows"
    assert (counts is None) == (pending is None), "counts go with pending tokens"
    penalties = [one for one in (counts, pending) if one is not None]
    body, header = draw_text(penalties=bool(penalties))
    names = ("logits", "wishes", "uniforms", *(("counts", "pending") if penalties else ()))
    (tokens,) = make_kernel("draw_penalized_rows" if penalties else "draw_rows", names, ("tokens",), body, header)(
        inputs=[logits, wishes, uniforms, *penalties],
        template=[("T", logits.dtype)],
        grid=(THREADS * rows, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
    )
    return tokens
