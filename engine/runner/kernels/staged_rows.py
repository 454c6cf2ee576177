"""Products of 17 to 32 rows on CUDA, with what stands behind them in a layer, in launches that cost the host little.

MLX's product at these sizes takes the GPU as long, and the host 9 us more: four of them in each layer of a model are
as much as its step on the GPU. Weights that are packed go by :mod:`engine.runner.kernels.fused_rows` up to 32 rows.
"""

import mlx.core as mx

from engine.runner.kernels.dialect import float_bits, make_kernel
from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.staged_rows_text import Ending, add_parts_text, staged_text

MAX_ROWS = 32
_CHUNK = 128
"""Of K, that a warp multiplies between two meetings of its block."""
_FULL = 528
"""Blocks of 4 warps that fill an H200; more of them divide the work no better."""
_FEWEST_CHUNKS = 4
"""Of a part of K: what a block does has to outweigh its start."""
_THREADS = 1024


def staged_rows(x: mx.array, weight: mx.array, *, bias: mx.array | None = None, gated: bool = False) -> mx.array:
    """``x`` [M, K] @ ``weight`` [N, K].T, where M is 17 to 32, or fewer.

    ``bias`` [N] may be added. ``gated``: the weights are a gate's and then an up projection's, and the result
    [M, N / 2] is silu(gate) * up. Element types and sizes of K as in
    :func:`engine.runner.kernels.rows_matmul.takes_dense`.
    """
    assert bias is None or not gated, "one ending"
    ending: Ending = "gated" if gated else "plain" if bias is None else "bias"
    width = weight.shape[0]
    # Few tiles of weights: smaller ones, whose warps share K.
    warps = (4, 1) if width >= 64 * _FULL // 2 else (2, 2)
    return _launch(x, weight, ending, warps, 1, bias)


def staged_parts(x: mx.array, weight: mx.array) -> mx.array:
    """``x`` [M, K] @ ``weight`` [N, K].T as float32 [parts, M, N], whose sum over the parts is the product."""
    tiles, chunks = -(-weight.shape[0] // 64), -(-x.shape[1] // _CHUNK)
    parts = max(1, min(_FULL // tiles, chunks // _FEWEST_CHUNKS))
    return _launch(x, weight, "parts", (4, 1), parts, None)


def add_parts(parts: mx.array, residual: mx.array, norm: Norm | None = None) -> tuple[mx.array, mx.array]:
    """``residual`` [M, N] plus all ``parts`` [parts, M, N], and that RMS-normalized, or once more without ``norm``."""
    num_rows, width = residual.shape
    times = -(-width // (4 * _THREADS))
    threads = 32 * -(-width // (4 * 32 * times))
    names = ("parts", "residual", *(("gain",) if norm is not None else ()))
    outputs = ("total", *(("normed",) if norm is not None else ()))
    body, header = add_parts_text(normed=norm is not None)
    results = make_kernel("add_parts_normed" if norm is not None else "add_parts", names, outputs, body, header)(
        inputs=[parts, residual, *([] if norm is None else [norm.gain])],
        template=[
            ("T", residual.dtype),
            ("Q", times),
            *([] if norm is None else [("EPS", float_bits(norm.eps))]),
        ],
        grid=(threads * num_rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * len(outputs),
        output_dtypes=[residual.dtype] * len(outputs),
    )
    return results[0], results[-1]


def _launch(
    x: mx.array, weight: mx.array, ending: Ending, warps: tuple[int, int], parts: int, bias: mx.array | None
) -> mx.array:
    """One launch; ``warps``: of weight rows, and of K."""
    (rows, _), width = x.shape, weight.shape[0]
    columns = 16 * warps[0]
    if ending == "gated":
        width, columns = width // 2, columns // 2
    threads = 32 * warps[0] * warps[1]
    names = ("x", "w", *(("bias",) if bias is not None else ()))
    body, header = staged_text(ending)
    (out,) = make_kernel(f"staged_rows_{ending}", names, ("out",), body, header)(
        inputs=[x, weight, *([] if bias is None else [bias])],
        template=[("T", x.dtype), ("MT", 3 if rows <= 24 else 4), ("WN", warps[0]), ("WK", warps[1])],
        grid=(threads * -(-width // columns) * parts, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(parts, rows, width) if ending == "parts" else (rows, width)],
        output_dtypes=[mx.float32 if ending == "parts" else x.dtype],
    )
    return out
