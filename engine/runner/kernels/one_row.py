"""Products of one row with packed weights on CUDA: what a decode step of a single stream multiplies.

The kernels for few rows (:mod:`engine.runner.kernels.fused_rows`) unpack each weight to the element type of ``x``, for
which their instructions take longer than reading does. See :mod:`engine.runner.kernels.one_row_text`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import make_kernel
from engine.runner.kernels.fused_rows_text import Ending
from engine.runner.kernels.one_row_text import one_row_text

_BITS, _GROUP_SIZE = 4, 64
_MOST_K = 20480
"""Of ``x``, that lies in shared memory."""
_BLOCKS = 132
"""Wanted at least, where there are rows for them: multiprocessors of an H200."""
_MOST_TILES = 6
_MANY_TILES = 1024
"""Warps that are enough to hide what reading takes without sharing K."""
_MOST_WARPS = 20
"""Of a block: they leave 102 registers a thread, of which the text takes up to 83."""


class OneRowGeometry(NamedTuple):
    """How a product is cut: tiles of 4 weight rows in a block, warps that share K, steps on their way at once."""

    tiles: int
    splits: int
    depth: int


def takes_one_row(k: int, dtype: mx.Dtype, bits: int, group_size: int) -> bool:
    """Whether :func:`one_row` multiplies weights [N, ``k``] with scales of this element type."""
    known = bits == _BITS and group_size == _GROUP_SIZE and dtype in (mx.bfloat16, mx.float16)
    return known and k % (2 * _GROUP_SIZE) == 0 and k <= _MOST_K


def one_row_geometry(columns: int, k: int) -> OneRowGeometry:
    """Measured on an H200, for ``columns`` weight rows of ``k``."""
    tiles, steps = -(-columns // 4), -(-k // 512)
    per_block = min(_MOST_TILES, -(-tiles // _BLOCKS))
    if tiles >= _MANY_TILES:
        return OneRowGeometry(per_block, 1, min(5, steps))
    splits = min(4, steps, _MOST_WARPS // per_block)
    return OneRowGeometry(per_block, splits, min(2, -(-steps // splits)))


def one_row(named: dict[str, mx.array], ending: Ending, width: int, constants: Sequence[tuple[str, int]]) -> mx.array:
    """The product of ``named["x"]`` [1, K] with packed weights, [1, ``width``].

    ``named`` and ``constants`` are what :func:`engine.runner.kernels.fused_rows.fused_rows` makes of its arguments.
    """
    x, weight = named["x"], named["w0"]
    normed = "gain" in named
    body, header = one_row_text(normed=normed, ending=ending)
    geometry = one_row_geometry(weight.shape[0], x.shape[1])
    threads = 32 * geometry.tiles * geometry.splits
    (out,) = make_kernel(f"one_row{'_normed' if normed else ''}_{ending}", tuple(named), ("out",), body, header)(
        inputs=list(named.values()),
        template=[
            ("T", x.dtype), ("K", x.shape[1]), ("TILES", geometry.tiles), ("SPLITS", geometry.splits),
            ("DEPTH", geometry.depth), *constants,
        ],
        grid=(threads * -(-weight.shape[0] // (4 * geometry.tiles)), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(1, width)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out
