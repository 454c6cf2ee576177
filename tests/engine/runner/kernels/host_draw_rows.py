"""The kernel that samples as numpy would have it, in float64; it counts pending tokens in the counts' own memory."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.draw_check import Wish, block_size, kept_weights, penalized


class HostDrawRows:
    """In place of :func:`engine.runner.kernels.draw_rows.draw_rows`. ``calls`` counts the launches."""

    def __init__(self) -> None:
        self.calls = 0
        self.dtypes: set[mx.Dtype] = set()

    def __call__(
        self,
        logits: mx.array,
        wishes: mx.array,
        uniforms: mx.array,
        counts: mx.array | None = None,
        pending: mx.array | None = None,
    ) -> mx.array:
        """Token ids [R]."""
        self.calls += 1
        self.dtypes.add(logits.dtype)
        numbers, pairs, rows = np.array(wishes), np.array(uniforms), np.array(logits.astype(mx.float32))
        newest = None if pending is None else np.array(pending)
        held: NDArray[np.float32] | None = None
        if counts is not None:
            mx.eval(counts)
            held = np.array(counts, copy=False)
        tokens = []
        for row, own in enumerate(rows):
            wish = Wish.of(numbers[row].tolist())
            if held is not None and newest is not None and wish.entry >= 0:
                if newest[row] >= 0:
                    held[wish.entry, newest[row]] += 1
                own = penalized(own, wish, held[wish.entry])
            tokens.append(drawn_token(own, wish, pairs[row]))
        return mx.array(tokens, mx.int32)


def drawn_token(logits: NDArray[np.float32], wish: Wish, uniforms: NDArray[np.float32]) -> int:
    """The token that the uniforms point to: its block among the blocks, and it in its block; -1 for none."""
    if not np.isfinite(logits.max()):
        return -1
    if not wish.temperature:
        return int(logits.argmax())
    weights = kept_weights(logits, wish)
    size = block_size(len(weights))
    blocks = np.pad(weights, (0, -len(weights) % size)).reshape(-1, size)
    block = _inverted(blocks.sum(axis=1), float(uniforms[0]))
    return block * size + _inverted(blocks[block], float(uniforms[1]))


def _inverted(weights: NDArray[np.float64], uniform: float) -> int:
    return int(np.argmax((np.cumsum(weights) > uniform * weights.sum()) & (weights > 0)))


def host_best_rows(logits: mx.array) -> mx.array:
    """As :func:`engine.runner.kernels.best_rows.best_rows`."""
    rows = np.array(logits.astype(mx.float32))
    tokens = np.where(np.isnan(rows), np.inf, rows).argmax(axis=1)
    finite = np.isfinite(np.take_along_axis(rows, tokens[:, None], 1)[:, 0])
    return mx.array(np.where(finite, tokens, -1).astype(np.int32))
