"""What kernels are held against: attention of one token in numpy, and how far off a result may be."""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.device.host import floats

Floats = NDArray[np.floating[Any]]


def rows_apart(found: mx.array, wanted: mx.array) -> NDArray[np.float32]:
    """How far each row of ``found`` [..., D] is from that of ``wanted``, relative to the latter's norm."""
    some, other = (floats(one).reshape(-1, one.shape[-1]) for one in (found, wanted))
    apart: NDArray[np.float32] = np.linalg.norm(some - other, axis=1) / np.maximum(np.linalg.norm(other, axis=1), 1e-30)
    return apart


def difference(got: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> str | None:
    """What is wrong with a result that may be off by ``tolerance`` of the norm of ``wanted``, None if nothing is."""
    if not np.isfinite(got).all():
        return "not finite"
    norm = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(got - wanted)) / (norm or 1.0)
    return None if error <= (tolerance if norm else 0.0) else f"relative error {error:.1e}"


def attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    scale: float,
    window: int | None = None,
    sinks: Floats | None = None,
    softcap: float | None = None,
) -> Floats:
    """What the last of n tokens attends to: [heads, DV] in float64.

    ``queries`` [heads, D], ``keys`` [kv_heads, n, D], ``values`` [kv_heads, n, DV], ``sinks`` [heads]. The token sees
    ``window`` tokens, itself among them.
    """
    kv_heads, length, _ = keys.shape
    first = max(0, length - window) if window else 0
    grouped = queries.reshape(kv_heads, -1, queries.shape[-1]).astype(np.float64)
    scores = grouped @ keys[:, first:].astype(np.float64).swapaxes(1, 2) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    tops = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.reshape(kv_heads, -1, 1).astype(np.float64)
        tops = np.maximum(tops, sink)
    weights = np.exp(scores - tops)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sink - tops)
    output: Floats = (weights / total) @ values[:, first:].astype(np.float64)
    return output.reshape(queries.shape[0], -1)
