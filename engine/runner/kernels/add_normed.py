"""Sums into a model's rows on CUDA, with the norms around them, in one launch: what lies between a layer's products.

mlx-lm has a launch for each sum and each norm; the host's work for them is what a decode step of few rows waits for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.add_normed_text import Parts, add_normed_text
from engine.runner.kernels.dialect import float_bits, make_kernel

_MOST_THREADS = 1024
_MOST_WIDTH = 4 * 8 * _MOST_THREADS
"""Four vectors of 8 elements for each thread."""


class ExpertRows(NamedTuple):
    """Rows [T * k, D] of tokens' experts and their ``scores`` float32 [T, k].

    With a shared expert its rows ``shared`` [..., D], which count by the sigmoid of ``gate`` [..., 1].
    """

    rows: mx.array
    scores: mx.array
    shared: mx.array | None = None
    gate: mx.array | None = None


class Beside(NamedTuple):
    """Rows [T, D] that are normalized by ``gain`` and added to others, which are normalized by ``own_gain`` first."""

    rows: mx.array
    gain: mx.array
    own_gain: mx.array


def takes(width: int, dtype: mx.Dtype) -> bool:
    """Whether rows of ``width`` elements of this type are covered."""
    return dtype in (mx.bfloat16, mx.float16) and width % 8 == 0 and 0 < width <= _MOST_WIDTH


def add_normed(
    added: mx.array | ExpertRows,
    residual: mx.array,
    gains: Sequence[mx.array],
    eps: float,
    *,
    beside: Beside | None = None,
    before: mx.array | None = None,
    scale: mx.array | None = None,
) -> tuple[mx.array, list[mx.array]]:
    """``residual`` [..., D] plus ``added``, and that normalized once for each of up to three ``gains`` [D].

    ``added`` [..., D] is normalized by the gain ``before`` first, if that is given. ``scale`` [8 equal elements], more
    than one since tiny arrays lie in the host's memory on CUDA, multiplies the sum. All norms are RMS norms, and
    ``eps`` is added to their mean squares. Element types as :func:`takes`, all alike.
    """
    experts = isinstance(added, ExpertRows)
    parts = Parts(
        experts, isinstance(added, ExpertRows) and added.shared is not None, beside is not None, before is not None,
        scale is not None, len(gains),
    )  # fmt: skip
    inputs = [array for array in added if array is not None] if isinstance(added, ExpertRows) else [added]
    inputs += [] if beside is None else [beside.rows, beside.own_gain, beside.gain]
    inputs += [residual, *(array for array in (before, scale) if array is not None), *gains]
    width = residual.shape[-1]
    vectors = width // 8
    each = -(-vectors // _MOST_THREADS)
    threads = 32 * -(-vectors // (32 * each))
    body, header = add_normed_text(parts)
    total, *normed = make_kernel(parts.name, parts.inputs, parts.outputs, body, header)(
        inputs=inputs,
        template=[
            ("T", residual.dtype), ("K", width), ("Q", each), ("EPS", float_bits(eps)),
            *([("TOP", added.scores.shape[-1])] if isinstance(added, ExpertRows) else []),
        ],
        grid=(threads * (residual.size // width), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * (1 + len(gains)),
        output_dtypes=[residual.dtype] * (1 + len(gains)),
    )  # fmt: skip
    return total, normed
