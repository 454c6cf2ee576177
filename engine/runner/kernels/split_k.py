"""Products of 17 to 32 rows on CUDA that are narrow and deep, with what follows them in a layer.

MLX's product at these sizes costs the host 9 us more than a launch. A narrow one (a layer's output, its MLP's) has
too few tiles of weights to fill the chip, so that blocks share K; what adds up their parts adds the residual and
normalizes too. Wide ones stay MLX's: those take the GPU less time, which the host's saving does not make up for.
"""

import mlx.core as mx

from engine.runner.kernels.dialect import float_bits, make_kernel
from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.rows_matmul_text import UNROLLED
from engine.runner.kernels.split_k_text import CHUNK, PARTS, PARTS_HEADER, SILU_AND_MUL, THREADS, TILE, add_parts_text

MAX_ROWS = 32
_FULL = 528
"""Blocks that fill an H200; more of them divide the work no better."""
_FEWEST_CHUNKS = 4
"""Of a part of K: what a block does has to outweigh its start."""
_MOST_THREADS = 1024


def split_k(x: mx.array, weight: mx.array) -> mx.array:
    """``x`` [M, K] @ ``weight`` [N, K].T as float32 [parts, M, N], whose sum over the parts is the product.

    M is at most 32. Element types and sizes of K as in :func:`engine.runner.kernels.rows_matmul.takes_dense`.
    """
    (rows, k), width = x.shape, weight.shape[0]
    tiles, chunks = -(-width // TILE), -(-k // CHUNK)
    parts = max(1, min(_FULL // tiles, chunks // _FEWEST_CHUNKS))
    (out,) = make_kernel("split_k", ("x", "w"), ("out",), PARTS, PARTS_HEADER)(
        inputs=[x, weight],
        template=[("T", x.dtype), ("MT", 3 if rows <= 24 else 4)],
        grid=(THREADS * tiles * parts, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(parts, rows, width)],
        output_dtypes=[mx.float32],
    )
    return out


def add_parts(parts: mx.array, residual: mx.array, norm: Norm | None = None) -> tuple[mx.array, mx.array]:
    """``residual`` [M, N] plus all ``parts`` [parts, M, N], and that RMS-normalized, or once more without ``norm``."""
    num_rows, width = residual.shape
    times = -(-width // (4 * _MOST_THREADS))
    threads = 32 * -(-width // (4 * 32 * times))
    name, names, outputs = "add_parts", ["parts", "residual"], ["total"]
    inputs, template = [parts, residual], [("T", residual.dtype), ("Q", times)]
    if norm is not None:
        name, names, outputs = "add_parts_normed", [*names, "gain"], [*outputs, "normed"]
        inputs, template = [*inputs, norm.gain], [*template, ("EPS", float_bits(norm.eps))]
    body, header = add_parts_text(normed=norm is not None)
    results = make_kernel(name, tuple(names), tuple(outputs), body, header)(
        inputs=inputs,
        template=template,
        grid=(threads * num_rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * len(outputs),
        output_dtypes=[residual.dtype] * len(outputs),
    )
    return results[0], results[-1]


def silu_and_mul(joined: mx.array) -> mx.array:
    """silu(gate) * up [M, N] of a gate and an up projection side by side, ``joined`` [M, 2 N], N a multiple of 4."""
    rows, width = joined.shape[0], joined.shape[1] // 2
    (out,) = make_kernel("silu_and_mul", ("joined",), ("out",), SILU_AND_MUL, UNROLLED)(
        inputs=[joined],
        template=[("T", joined.dtype)],
        grid=(THREADS * -(-rows * width // (4 * THREADS)), 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[joined.dtype],
    )
    return out
