"""Attention of one token in numpy: what the kernels are held against."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


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
