"""Routing to experts on CUDA: a token's experts chosen and listed in one launch, and their rows summed in another.

MLX sorts all of a token's logits for a choice of some, in several launches; then come a softmax, a gathering, and sums.
"""

from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import make_kernel
from engine.runner.kernels.routed_experts import Routes, entries_of, route, tile_rows
from engine.runner.kernels.routed_experts_text import SCANNED_PAIRS
from engine.runner.kernels.routing_text import choose_text, sum_text

MAX_CHOSEN = 32
_MOST_LISTED = 128
"""Tokens that one block takes; for more, several choose and another lists."""
_WARPS = 4
_SUM_THREADS = 128


class Choice(NamedTuple):
    """The experts of tokens, and the weights [T, k] of their rows, float32."""

    routes: Routes
    scores: mx.array


def takes(num_experts: int, chosen: int, dtype: mx.Dtype, *, gated: bool = False) -> bool:
    """Whether :func:`choose` chooses so many of so many, and one more for all if ``gated``."""
    fits = chosen + gated <= MAX_CHOSEN and chosen <= num_experts and num_experts + gated <= 1024
    return fits and dtype in (mx.bfloat16, mx.float16)


def listing(tokens: int, num_experts: int, chosen: int, *, gated: bool = False) -> tuple[int, bool]:
    """Rows of a tile for so many tokens, and whether :func:`choose` lists the tiles: its text differs by both."""
    pairs = tokens * (chosen + gated)
    rows = tile_rows(pairs, num_experts + gated)
    return rows, (pairs > SCANNED_PAIRS or rows > 8) and tokens <= _MOST_LISTED


def choose(
    logits: mx.array, chosen: int, *, normalized: bool, scale: mx.array | None = None, gate: mx.array | None = None
) -> Choice:
    """The ``chosen`` experts with the largest ``logits`` [T, E] of each token.

    Their weights are a softmax over them if ``normalized``, else over all experts, times ``scale`` [E]. With ``gate``
    [T, 1] or [T], a shared expert's logit, every token has expert E as well, behind the others, and its weight is the
    gate's sigmoid.
    """
    tokens, num_experts = logits.shape
    gated = gate is not None
    each, experts = chosen + gated, num_experts + gated
    pairs = tokens * each
    rows, listed = listing(tokens, num_experts, chosen, gated=gated)
    body, header = choose_text(normalized=normalized, scaled=scale is not None, listed=listed, gated=gated)
    entries = entries_of(pairs, experts, rows)
    threads = 1024 if listed else 32 * min(_WARPS, tokens)
    blocks = 1 if listed else -(-tokens // (threads // 32))
    more = {"scale": scale, "gate": gate}
    given = {"logits": logits} | {name: array for name, array in more.items() if array is not None}
    words = ["" if normalized else "all", "scaled" if scale is not None else "", "gated" * gated, "listed" * listed]
    tiled = ("tiles", "order") if listed else ()
    name, outputs = "_".join(["choose_experts", *filter(None, words)]), ("indices", "scores", *tiled)
    indices, scores, *lists = make_kernel(name, tuple(given), outputs, body, header)(
        inputs=list(given.values()),
        template=[("T", logits.dtype), ("E", num_experts), ("TOP", chosen), *([("C", rows)] if listed else [])],
        grid=(threads * blocks, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(pairs,), (tokens, each), *([(entries, 2), (entries, rows)] if listed else [])],
        output_dtypes=[mx.int32, mx.float32, *([mx.int32] * len(tiled))],
    )
    if listed:
        return Choice(Routes(indices, rows, *lists), scores)
    return Choice(route(indices, experts, rows=rows), scores)


def weighted_sum(
    rows: mx.array, scores: mx.array, shared: mx.array | None = None, gate: mx.array | None = None
) -> mx.array:
    """``rows`` [T * k, D] of each token by its ``scores`` [T, k], summed: [T, D].

    With ``shared`` [T, D], rows of a shared expert, by the sigmoid of ``gate`` [T, 1] or [T].
    """
    tokens, chosen = scores.shape
    width = rows.shape[1]
    extra = [] if shared is None or gate is None else [shared, gate.reshape(tokens)]
    body, header = sum_text(shared=bool(extra))
    names = ("rows", "scores", *(("shared", "gate") if extra else ()))
    (out,) = make_kernel("sum_experts_shared" if extra else "sum_experts", names, ("out",), body, header)(
        inputs=[rows, scores, *extra],
        template=[("T", rows.dtype), ("TOP", chosen)],
        grid=(_SUM_THREADS * -(-tokens * width // (8 * _SUM_THREADS)), 1, 1),
        threadgroup=(_SUM_THREADS, 1, 1),
        output_shapes=[(tokens, width)],
        output_dtypes=[rows.dtype],
    )
    return out
