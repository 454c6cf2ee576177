"""Blocks of mlx-lm that choose experts for a token, compute them and sum their rows, as a few launches compute them.

Whatever weighs otherwise than by a softmax of a product's logits is left as it is, and its experts alone are swapped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels import routing
from engine.runner.kernels.add_normed import ExpertRows
from engine.runner.kernels.expert_layers import ExpertKind, ExpertLayer
from engine.runner.kernels.reference import rows_apart
from engine.runner.kernels.routed_experts import MAX_PAIRS, Routes
from engine.runner.kernels.swapped_modules import SwappedModules, mlx_lm_name

_CHECKED_TOKENS = (1, 5, 40, 150)
_MOST_TOKENS = 256
"""From which on the kernels are the same for any number."""
_MOST_DIFFERENT = 2e-2
"""From what the block's own code gives, relative to a token's norm: that rounds logits' softmax to their own type."""
_SHARE_ALIKE = 0.75
"""Of tokens: where two logits are nearly equal another expert may be chosen."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block's parts by their names in it, and how it weighs.

    ``normalized``: by a softmax over the chosen experts, else over all; or the name of the attribute that says so.
    """

    router: str
    experts: str
    chosen: str
    normalized: bool | str
    shared: bool = False


_BLOCKS = {
    "qwen3_next.Qwen3NextSparseMoeBlock": Block("gate", "switch_mlp", "top_k", "norm_topk_prob", shared=True),
    "qwen2_moe.Qwen2MoeSparseMoeBlock": Block("gate", "switch_mlp", "top_k", False, shared=True),
    "qwen3_moe.Qwen3MoeSparseMoeBlock": Block("gate", "switch_mlp", "top_k", "norm_topk_prob"),
    "olmoe.OlmoeSparseMoeBlock": Block("gate", "switch_mlp", "top_k", "norm_topk_prob"),
    "mixtral.MixtralSparseMoeBlock": Block("gate", "switch_mlp", "num_experts_per_tok", True),
    "gpt_oss.MLPBlock": Block("router", "experts", "num_experts_per_tok", True),
}
_GEMMA = "gemma4_text.DecoderLayer"
_ROWS, _COUNT = "expert_rows", "expert_count"
"""What a swapped block has more: a method, and how many rows that gives for a token."""


def experts_of(block: nn.Module) -> nn.Module | None:
    """The experts of a block that is known; None of any other module."""
    name = mlx_lm_name(block)
    if name == _GEMMA:
        return block.experts.switch_glu if block.get("router") is not None else None
    return block.get(_BLOCKS[name].experts) if name in _BLOCKS and not _is_sharded(block) else None


def shared_of(block: Any) -> nn.Module | None:
    """The MLP that every token of a known block takes beside its experts; None where there is none."""
    known = _BLOCKS.get(mlx_lm_name(block))
    return block.shared_expert if known is not None and known.shared else None


def launch_block_kernels(block: Any, kind: ExpertKind, *, joined: bool) -> None:
    """Launch the kernels that a block takes; where kernels are only collected, say what to compile.

    ``kind`` of its experts, without a shared one; ``joined``: a shared one is taken as one of them.
    """
    known, chosen = _BLOCKS.get(mlx_lm_name(block)), _chosen(block)
    scale = None if known is not None else block.router.per_expert_scale
    for tokens in launched_tokens(kind.num_experts, chosen, gated=joined):
        logits = mx.zeros((tokens, kind.num_experts), kind.dtype)
        gate = mx.zeros((tokens, 1), kind.dtype)
        choice = routing.choose(
            logits, chosen, normalized=_is_normalized(block), scale=scale, gate=gate if joined else None
        )
        rows = mx.zeros((choice.scores.size, kind.hidden), kind.dtype)
        apart = known is not None and known.shared and not joined
        routing.weighted_sum(
            rows, choice.scores, *((mx.zeros((tokens, kind.hidden), kind.dtype), gate) if apart else ())
        )


def launched_tokens(num_experts: int, chosen: int, *, gated: bool = False) -> list[int]:
    """Numbers of tokens that take all kernels which any number takes."""
    ways = {routing.listing(tokens, num_experts, chosen, gated=gated): tokens for tokens in range(_MOST_TOKENS, 0, -1)}
    return sorted(ways.values())


def block_problem(block: Any, layer: ExpertLayer) -> str | None:
    """What a block's own code gives otherwise, in a line. Experts are looked up in a table for it on both sides.

    A shared expert is the last of the table's rows.
    """
    kind = layer.kind
    table = mx.random.normal((kind.num_experts, kind.hidden), key=mx.random.key(1)).astype(kind.dtype)
    stand_in = SwappedModules()
    try:
        stand_in.swap_method(experts_of(block) or block, "__call__", lambda _self, _x, indices: table[indices])
        if shared_of(block) is not None:
            last = table[-1:]
            stand_in.swap_method(block.shared_expert, "__call__", lambda _self, x: mx.broadcast_to(last, x.shape))
        for tokens in _CHECKED_TOKENS:
            x = mx.random.normal((1, tokens, kind.hidden), key=mx.random.key(tokens)).astype(kind.dtype)
            usual = _routed_part(block, x)
            rows = _computed(block, _TableLayer(layer, table))(block, x)
            if rows is None:
                return "logits of another type"
            if not _alike(usual, _summed(rows, x)):
                return f"{type(block).__name__} gives other sums with {tokens} tokens"
    except Exception as error:  # noqa: BLE001  (whatever stops it, the block has mlx-lm's own way)
        return error_line(error, 120)
    finally:
        stand_in.undo()
    return None


class _TableLayer:
    """A layer whose experts' rows are those of a table."""

    def __init__(self, layer: ExpertLayer, table: mx.array) -> None:
        self.kind, self._table = layer.kind, table

    def routed(self, _x: mx.array, routes: Routes) -> mx.array:
        return self._table[routes.indices]


Routed = ExpertLayer | _TableLayer
Compute = Callable[[Any, mx.array], ExpertRows | None]


def swap_block(block: nn.Module, layer: ExpertLayer, swapped: SwappedModules) -> None:
    """Have ``block`` compute in few launches, with ``layer`` for its experts; :func:`expert_rows` asks for its rows."""
    if mlx_lm_name(block) == _GEMMA:
        return _swap_gemma(block, layer, swapped)
    plain: Any = type(block).__call__
    compute = _computed(block, layer)

    def moe(self: nn.Module, x: mx.array) -> mx.array:
        rows = compute(self, x)
        return plain(self, x) if rows is None else _summed(rows, x)

    each = _chosen(block) + _has_shared(block, layer)
    return swapped.swap_methods(block, {"__call__": moe, _ROWS: compute, _COUNT: each})


def expert_rows(block: Any, *x: mx.array) -> ExpertRows | None:
    """The rows of a swapped block's experts and what they count, before they are summed; None of any other block.

    ``x`` [..., D]: a block's own input. Gemma 4's takes two: normalized by the router's norm, and by the experts'.
    """
    compute = getattr(type(block), _ROWS, None)
    return None if compute is None else compute(block, *x)


def row_counts(block: Any) -> list[tuple[int, bool]]:
    """How many rows a token's experts give, and whether a shared one's lie apart; what may be, of a block as it was."""
    if experts_of(block) is None and not hasattr(type(block), _COUNT):
        return []
    shared, chosen = shared_of(block) is not None, _chosen(block)
    each = getattr(type(block), _COUNT, None)
    found = [(chosen + 1, False), (chosen, True)] if shared else [(chosen, False)]
    return [one for one in found if each in (None, one[0])]


def router_gain(router: Any) -> mx.array:
    """The gain of the norm in Gemma 4's router."""
    gain: mx.array = router.scale * router._root_size
    mx.eval(gain)
    return gain


def _computed(block: Any, layer: Routed) -> Compute:
    """What computes the rows of a block's experts; None where it does not take them."""
    if mlx_lm_name(block) == _GEMMA:
        gain = router_gain(block.router)

        def gemma(self: Any, x: mx.array) -> ExpertRows | None:
            return _gemma_rows(self.router, layer, mx.fast.rms_norm(x, gain, self.router.eps), x)

        return gemma
    known, chosen, normalized = _BLOCKS[mlx_lm_name(block)], _chosen(block), _is_normalized(block)
    joined = _has_shared(block, layer)

    def compute(self: Any, x: mx.array) -> ExpertRows | None:
        logits = self[known.router](x)
        logits = logits.reshape(-1, logits.shape[-1])
        if not _takes(logits, chosen, x, layer, joined=joined):
            return None
        gate = self.shared_expert_gate(x) if known.shared else None
        choice = routing.choose(logits, chosen, normalized=normalized, gate=gate if joined else None)
        rows = _rows(layer, x, choice)
        return rows if gate is None or joined else rows._replace(shared=self.shared_expert(x), gate=gate)

    return compute


def _chosen(block: Any) -> int:
    """Experts of a token."""
    name = mlx_lm_name(block)
    return int(block.router.config.top_k_experts if name == _GEMMA else getattr(block, _BLOCKS[name].chosen))


def _has_shared(block: Any, layer: Routed) -> bool:
    """Whether a shared expert is among those of ``layer``: then it has one more than the block's own."""
    module: Any = experts_of(block)
    return bool(layer.kind.num_experts > module["gate_proj"]["weight"].shape[0])


def _is_normalized(block: Any) -> bool:
    """Whether the chosen experts' weights add up to 1, before any scale."""
    if mlx_lm_name(block) == _GEMMA:
        return True
    normalized = _BLOCKS[mlx_lm_name(block)].normalized
    return bool(getattr(block, normalized)) if isinstance(normalized, str) else normalized


def _takes(logits: mx.array, chosen: int, x: mx.array, layer: Routed, *, joined: bool = False) -> bool:
    pairs = logits.shape[0] * (chosen + joined)
    return (
        x.dtype == layer.kind.dtype
        and 0 < pairs <= MAX_PAIRS
        and routing.takes(logits.shape[1], chosen, logits.dtype, gated=joined)
    )


def _rows(layer: Routed, x: mx.array, choice: routing.Choice) -> ExpertRows:
    return ExpertRows(layer.routed(x.reshape(-1, x.shape[-1]), choice.routes), choice.scores)


def _summed(rows: ExpertRows, x: mx.array) -> mx.array:
    """In the shape of the block's input ``x``."""
    shared = None if rows.shared is None else rows.shared.reshape(-1, x.shape[-1])
    return routing.weighted_sum(rows.rows, rows.scores, shared, rows.gate).reshape(x.shape)


def _gemma_choice(router: Any, normed: mx.array, layer: Routed) -> routing.Choice | None:
    """The choice of Gemma 4's router for rows that its norm was applied to."""
    logits = router.proj(normed)
    logits, chosen = logits.reshape(-1, logits.shape[-1]), router.config.top_k_experts
    if not _takes(logits, chosen, normed, layer):
        return None
    return routing.choose(logits, chosen, normalized=True, scale=router.per_expert_scale)


def _gemma_rows(router: Any, layer: Routed, normed: mx.array, x: mx.array) -> ExpertRows | None:
    choice = _gemma_choice(router, normed, layer)
    if choice is None:
        return None
    return _rows(layer, x, choice)


def _swap_gemma(block: Any, layer: ExpertLayer, swapped: SwappedModules) -> None:
    """Router and experts apart, as the block calls them: what the router listed waits for the experts."""
    waiting: list[tuple[mx.array, routing.Choice]] = []
    plain_router, plain_experts = type(block.router).__call__, type(block.experts).__call__
    gain = router_gain(block.router)

    def route(self: Any, x: mx.array) -> tuple[mx.array, mx.array]:
        waiting.clear()
        choice = _gemma_choice(self, mx.fast.rms_norm(x, gain, self.eps), layer)
        if choice is None:
            return plain_router(self, x)  # type: ignore[no-any-return]
        indices = choice.routes.indices.reshape(*x.shape[:-1], -1)
        waiting.append((indices, choice))
        return indices, choice.scores.reshape(indices.shape).astype(x.dtype)

    def compute(self: Any, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        if waiting and waiting[0][0] is indices:
            return _summed(_rows(layer, x, waiting.pop()[1]), x)
        return plain_experts(self, x, indices, weights)  # type: ignore[no-any-return]

    def rows(self: Any, normed: mx.array, x: mx.array) -> ExpertRows | None:
        return _gemma_rows(self.router, layer, normed, x)

    swapped.swap_method(block.router, "__call__", route)
    swapped.swap_method(block.experts, "__call__", compute)
    swapped.swap_methods(block, {_ROWS: rows, _COUNT: _chosen(block)})


def _routed_part(block: Any, x: mx.array) -> mx.array:
    """What the block's own code gives for its experts."""
    if mlx_lm_name(block) == _GEMMA:
        return block.experts(x, *block.router(x))  # type: ignore[no-any-return]
    return block(x)  # type: ignore[no-any-return]


def _alike(usual: mx.array, ours: mx.array) -> bool:
    apart = rows_apart(ours, usual)
    return bool(np.isfinite(floats(ours)).all() and (apart <= _MOST_DIFFERENT).mean() >= _SHARE_ALIKE)


def _is_sharded(block: Any) -> bool:
    return getattr(block, "sharding_group", None) is not None
