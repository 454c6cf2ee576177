"""Products of few rows on CUDA with the norm before them, and the bias, residual or gate behind them, in one launch.

What a decode step costs at few rows is the host's work for its launches. See :mod:`engine.runner.kernels.rows_matmul`
for the products themselves.
"""

from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import float_bits, make_kernel
from engine.runner.kernels.fused_rows_text import Activation, Ending, fused_text
from engine.runner.kernels.one_row import one_row, takes_one_row
from engine.runner.kernels.rows_matmul import dense_geometry, num_steps, quantized_geometry

_MOST_WARPS_OF_TILES = 8
"""Of a block whose warps hold several tiles of weights: 16 with a norm need all registers there are."""


class Norm(NamedTuple):
    """An RMS norm: gains [K] of its columns, and what is added to a mean square."""

    gain: mx.array
    eps: float


def takes_norm(dtype: mx.Dtype) -> bool:
    """Whether a norm may be part of a product of this element type.

    Values are multiplied by their gains before their row is scaled down: float16 might not hold that.
    """
    return dtype == mx.bfloat16


def fused_rows(
    x: mx.array,
    weight: mx.array,
    *,
    bits: int = 0,
    group_size: int = 0,
    norm: Norm | None = None,
    bias: mx.array | None = None,
    residual: mx.array | None = None,
    gated: Activation | None = None,
) -> mx.array:
    """``x`` [M, K] @ ``weight`` [N, K].T, where M is at most 16, or 32 if weights are packed.

    Packed weights are affine, all in one array [N, …] of uint32: words [N, K * bits / 32], then scales and biases
    [2, N, K / group size], whose element type is that of ``x``. The host's time for a launch grows with its arrays.
    With ``norm``, of the normalized rows. One of ``bias`` [N] and ``residual`` [M, N] may be added; ``gated``: the
    weights are a gate's and then an up projection's, and the result [M, N / 2] is up times this activation of the gate.
    Element types and sizes of K as in :func:`engine.runner.kernels.rows_matmul.takes_dense` and ``takes_quantized``.
    """
    assert sum(one is not None for one in (bias, residual, gated)) <= 1, "one ending"
    ending: Ending = gated or ("bias" if bias is not None else "residual" if residual is not None else "plain")
    rows, k = x.shape
    columns = weight.shape[0]
    named = {"x": x, "w0": weight}
    named |= {} if norm is None else {"gain": norm.gain}
    added = residual if bias is None else bias
    named |= {} if added is None else {"added": added}
    halves = 2 if gated else 1  # of the weights, that make one result
    eps = [] if norm is None else [("EPS", float_bits(norm.eps))]
    if rows == 1 and takes_one_row(k, x.dtype, bits, group_size):
        return one_row(named, ending, columns // halves, eps)
    geometry = quantized_geometry(rows, columns, num_steps(k, bits)) if bits else dense_geometry(rows, columns)
    warps = min(geometry.warps, _MOST_WARPS_OF_TILES) if geometry.weight_tiles > 1 else geometry.warps
    width, columns = columns // halves, 16 * geometry.weight_tiles // halves
    body, header = fused_text(packed=bool(bits), normed=norm is not None, ending=ending)
    kind = f"{'quantized' if bits else 'dense'}{'_normed' if norm is not None else ''}_{ending}"
    threads = 32 * warps
    (out,) = make_kernel(f"fused_rows_{kind}", tuple(named), ("out",), body, header)(
        inputs=list(named.values()),
        template=[
            ("T", x.dtype), ("MT", geometry.row_tiles), ("RT", geometry.weight_tiles),
            *([("BITS", bits), ("GROUP", group_size)] if bits else []),
            *eps,
        ],
        grid=(threads * -(-width // columns), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out
