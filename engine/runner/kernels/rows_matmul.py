"""Products of few rows on CUDA: what a decode step multiplies, with every weight read once.

MLX's own products at these sizes look cuBLAS's choice up and capture a graph at each call (9 us of host), and for
packed weights read the weights once for each leading row. These take one launch, also for up to four weights that
share their input, such as a layer's queries, keys and values.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import Kernel, make_kernel
from engine.runner.kernels.rows_matmul_text import HEADER, TENSOR_CORES, product_text

MAX_ROWS = 32
MAX_SIBLINGS = 4
_TYPES = (mx.bfloat16, mx.float16)
_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)


class Packed(NamedTuple):
    """Affine weights as MLX quantizes them: words [N, K * bits / 32], scales and biases [N, K / group size]."""

    words: mx.array
    scales: mx.array
    biases: mx.array


class Geometry(NamedTuple):
    """How a product is cut: tiles of 8 rows of x, tiles of 16 weight rows per warp, warps that share K."""

    row_tiles: int
    weight_tiles: int
    warps: int


def takes_dense(k: int, dtype: mx.Dtype) -> bool:
    """Whether :func:`dense` multiplies weights [N, ``k``] of this element type."""
    return dtype in _TYPES and k % 64 == 0


def takes_quantized(k: int, dtype: mx.Dtype, bits: int, group_size: int) -> bool:
    """Whether :func:`quantized` multiplies weights [N, ``k``] with scales of this element type."""
    return dtype in _TYPES and bits in _BITS and group_size in _GROUP_SIZES and k % max(group_size, 128 // bits) == 0


def dense(x: mx.array, weights: Sequence[mx.array]) -> list[mx.array]:
    """``x`` [..., K] @ w [N, K].T for up to four ``weights`` in one launch; at most 32 rows of ``x``."""
    widths = [weight.shape[0] for weight in weights]
    geometry = dense_geometry(x.size // x.shape[-1], sum(widths))
    return _launch(_kernel(len(weights), packed=False), x, weights, widths, geometry, [])


def quantized(x: mx.array, weights: Sequence[Packed], *, bits: int, group_size: int) -> list[mx.array]:
    """``x`` [..., K] against up to four packed ``weights`` in one launch; at most 32 rows of ``x``."""
    widths = [weight.words.shape[0] for weight in weights]
    geometry = quantized_geometry(x.size // x.shape[-1], sum(widths), num_steps(x.shape[-1], bits))
    arrays = [array for part in zip(*weights, strict=True) for array in part]
    constants = [("BITS", bits), ("GROUP", group_size)]
    return _launch(_kernel(len(weights), packed=True), x, arrays, widths, geometry, constants)


def num_steps(k: int, bits: int) -> int:
    """Of K, that the warps of a product of packed weights share; the last may be shorter."""
    return -(-k * bits // 512)


def dense_geometry(rows: int, columns: int) -> Geometry:
    """Measured on an H200: more warps on K where the blocks alone would not fill the chip."""
    row_tiles, most = _row_tiles(rows)
    return Geometry(row_tiles, 1 if row_tiles <= 2 else 2, min(most, _warps(columns)))


def quantized_geometry(rows: int, columns: int, steps: int) -> Geometry:
    """Measured on an H200. ``steps``: of K, that the warps share."""
    row_tiles, most = _row_tiles(rows)
    return Geometry(row_tiles, 1 if row_tiles == 1 else 2, min(most, _warps(columns), steps))


def _row_tiles(rows: int) -> tuple[int, int]:
    """Tiles of ``rows`` rows, in the few numbers that kernels are compiled for, and the most warps with them."""
    return (1, 16) if rows <= 8 else (2, 16) if rows <= 16 else (4, 8)


def _warps(columns: int) -> int:
    return 4 if columns > 8192 else 8 if columns > 4096 else 16


def _kernel(num_weights: int, *, packed: bool) -> Kernel:
    """That of so many weights; it takes x, and then each part of every weight."""
    name = "rows_quantized" if packed else "rows_dense"
    inputs = ["x", *(f"{part}{place}" for part in ("wsb" if packed else "w") for place in range(num_weights))]
    return make_kernel(
        name if num_weights == 1 else f"{name}_{num_weights}", tuple(inputs), ("out",),
        product_text(num_weights, packed=packed), TENSOR_CORES + HEADER,
    )  # fmt: skip


def _launch(
    kernel: Kernel,
    x: mx.array,
    arrays: Sequence[mx.array],
    widths: list[int],
    geometry: Geometry,
    constants: list[tuple[str, int]],
) -> list[mx.array]:
    rows, lead = x.size // x.shape[-1], x.shape[:-1]
    threads, columns = 32 * geometry.warps, 16 * geometry.weight_tiles
    (out,) = kernel(
        inputs=[x.reshape(rows, -1), *arrays],
        template=[("T", x.dtype), ("MT", geometry.row_tiles), ("RT", geometry.weight_tiles), *constants],
        grid=(threads * sum(-(-width // columns) for width in widths), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows * sum(widths),)],
        output_dtypes=[x.dtype],
    )
    # The results lie one behind the other: these are views, and each is contiguous.
    ends = [rows * end for end in accumulate(widths)]
    return [
        (out if len(widths) == 1 else out[end - rows * width : end]).reshape(*lead, width)
        for width, end in zip(widths, ends, strict=True)
    ]
