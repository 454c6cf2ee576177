"""Gated delta nets in float32 by NumPy: what kernels are compared with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.gated_delta import DeltaShape

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """``conv`` [channels, taps], ``a_log`` and ``dt_bias`` [value_heads]; the norm's ``gain`` [value_dim], ``eps``."""

    conv: Floats
    a_log: Floats
    dt_bias: Floats
    gain: Floats
    eps: float


def mixed_inputs(
    x: Floats, b: Floats, a: Floats, conv_state: Floats, weights: DeltaWeights, shape: DeltaShape
) -> tuple[Floats, Floats, Floats]:
    """What the recurrence takes, of one sequence.

    ``x`` [S, channels], ``b`` and ``a`` [S, value_heads], ``conv_state`` [taps - 1, channels]. Gives mixed
    [S, channels], gates [S, value_heads, 2] and the convolution's new state.
    """
    tokens, normed_channels = len(x), 2 * shape.key_heads * shape.key_dim
    given = np.concatenate([conv_state, x])
    out = np.zeros_like(x)
    for tap in range(shape.taps):
        out += given[tap : tap + tokens] * weights.conv[:, tap]
    mixed = silu(out)
    normed = mixed[:, :normed_channels].reshape(tokens, 2, -1, shape.key_dim)
    normed = normed / np.sqrt((normed**2).sum(-1, keepdims=True) + np.float32(1e-6))
    normed[:, 0] *= np.float32(shape.key_dim**-0.5)
    mixed[:, :normed_channels] = normed.reshape(tokens, -1)
    decay = np.exp(-np.exp(weights.a_log) * np.logaddexp(a + weights.dt_bias, np.float32(0)))
    return mixed, np.stack([decay, 1 / (1 + np.exp(-b))], axis=-1), given[tokens:]


def recurrence(mixed: Floats, gates: Floats, state: Floats, shape: DeltaShape) -> tuple[Floats, Floats]:
    """Outputs [S, value_heads, value_dim] and the new state [value_heads, value_dim, key_dim]."""
    ends = np.cumsum([shape.key_heads * shape.key_dim] * 2).tolist()
    queries, keys, values = np.split(mixed, ends, axis=1)
    share = shape.value_heads // shape.key_heads
    queries, keys = (
        some.reshape(len(mixed), shape.key_heads, shape.key_dim).repeat(share, axis=1) for some in (queries, keys)
    )
    values = values.reshape(len(mixed), shape.value_heads, shape.value_dim)
    outputs, state = np.zeros_like(values), state.copy()
    for t, (decay, beta) in enumerate(gates.transpose(0, 2, 1)):
        state *= decay[:, None, None]
        delta = (values[t] - np.einsum("hvk,hk->hv", state, keys[t])) * beta[:, None]
        state += delta[:, :, None] * keys[t][:, None]
        outputs[t] = np.einsum("hvk,hk->hv", state, queries[t])
    return outputs, state


def gated_norm(outputs: Floats, z: Floats, weights: DeltaWeights) -> Floats:
    """``outputs`` [S, value_heads, value_dim], normalized, and gated by ``z`` of their shape."""
    scaled = outputs / np.sqrt((outputs**2).mean(-1, keepdims=True) + np.float32(weights.eps))
    gated: Floats = scaled * weights.gain * silu(z)
    return gated


def silu(x: Floats) -> Floats:
    """x * sigmoid(x)."""
    gated: Floats = x / (1 + np.exp(-x))
    return gated
