"""Whether the kernels of routed experts give right results: against float32, on a layer's own weights."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels import routed_experts
from engine.runner.kernels.expert_layers import ExpertLayer
from engine.runner.kernels.routed_experts import Activation, ExpertWeights, Packing, Routes, route

Values = np.ndarray[Any, np.dtype[np.float32]]
_LIMIT = {mx.bfloat16: 1e-2, mx.float16: 2e-3}
"""Largest difference from float32, relative to the result's norm."""
_CHECKED_COLUMNS = 96
_PER_TOKEN = 4
_CHOSEN = 12
"""Experts of which rows are checked: their weights are unpacked for it."""
_CASES = (
    # tokens, rows of a tile, whether all tokens have the same experts
    (1, 8, False), (3, 8, False), (11, 8, False), (32, 8, False), (40, 8, True), (32, 16, False), (48, 32, True),
    (200, 32, False),
)  # fmt: skip


def experts_problem(layer: ExpertLayer) -> str | None:
    """What is wrong with the kernels' results for ``layer``, in a line."""
    try:
        for tokens, rows, same in _CASES:
            difference = _difference(layer, tokens, rows, same)
            if not difference <= _LIMIT[layer.kind.dtype]:
                return f"results differ by {difference:.2g} with {tokens} tokens in tiles of {rows}"
    except Exception as error:  # noqa: BLE001  (a kernel's compiler may object in any way)
        return error_line(error, 120)
    return None


def launch_kernels(layer: ExpertLayer) -> None:
    """Launch every kernel that a check launches; where kernels are only collected, say what to compile."""
    for tokens, rows, same in _CASES:
        chosen = np.arange(min(_CHOSEN, layer.kind.num_experts))
        x, indices = _rows(tokens, layer.kind.hidden, layer.kind.dtype), _indices(chosen, tokens, same)
        _products(layer, x, route(mx.array(indices), layer.kind.num_experts, rows=rows))


def _products(layer: ExpertLayer, x: mx.array, routes: Routes) -> tuple[mx.array, mx.array, mx.array]:
    """What gate and up give, rows as long, and what down gives for those."""
    kind = layer.kind
    first = routed_experts.gate_up(x, routes, layer.gate, layer.up, kind.packings[0], kind.activation)
    inner = _rows(first.shape[0], kind.width, kind.dtype)
    return first, inner, routed_experts.down(inner, routes, layer.down, kind.packings[1])


def _difference(layer: ExpertLayer, tokens: int, rows: int, same: bool) -> float:
    kind = layer.kind
    # The last expert is among them: an index beyond the end of weights would show there.
    chosen = np.unique(np.linspace(0, kind.num_experts - 1, _CHOSEN).astype(np.int64))
    indices = _indices(chosen, tokens, same)
    x = _rows(tokens, kind.hidden, kind.dtype)
    # What is left unwritten shall not hold an older right result.
    left = mx.full((indices.size * (kind.width + kind.hidden),), math.nan, dtype=kind.dtype)
    mx.eval(left)
    del left
    first, inner, second = _products(layer, x, route(mx.array(indices), kind.num_experts, rows=rows))
    mx.eval(first, second)
    columns = _columns(kind.width)
    repeated = np.repeat(floats(x), indices.shape[1], axis=0)
    gate, up = (_expected(repeated, weights, kind.packings[0], indices, columns) for weights in (layer.gate, layer.up))
    apart = _distance(first, columns, activated(gate, up, kind.activation))
    columns = _columns(kind.hidden)
    expected = _expected(floats(inner), layer.down, kind.packings[1], indices, columns)
    return max(apart, _distance(second, columns, expected), key=lambda one: math.inf if math.isnan(one) else one)


def activated(gate: Values, up: Values, activation: Activation) -> Values:
    """What the activation makes of gate and up, in float32."""
    kinds: dict[str, Callable[[], Values]] = {
        "silu": lambda: gate / (1 + np.exp(-gate)) * up,
        "gelu": lambda: 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up,
        "oai": lambda: _clipped(gate, up, activation),
    }
    return kinds[activation.kind]()


def _clipped(gate: Values, up: Values, activation: Activation) -> Values:
    gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    result: Values = gate / (1 + np.exp(-activation.alpha * gate)) * (up + 1)
    return result


def _expected(rows: Values, weights: ExpertWeights, packing: Packing, indices: Any, columns: slice) -> Values:
    """Some columns of ``rows`` [P, K], each by the weights of its expert."""
    experts = indices.reshape(-1)
    result = np.zeros((len(rows), len(range(*columns.indices(weights.weight.shape[1])))), np.float32)
    for expert in np.unique(experts):
        added = 0.0 if weights.added is None else floats(weights.added[int(expert), columns])
        mine = experts == expert
        result[mine] = rows[mine] @ _unpacked(weights, packing, int(expert), columns).T + added
    return result


def _unpacked(weights: ExpertWeights, packing: Packing, expert: int, columns: slice) -> Values:
    some, scales, biases = (
        None if array is None else array[expert, columns] for array in (weights.weight, weights.scales, weights.biases)
    )
    assert some is not None
    if scales is None:
        return floats(some)
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return floats(
        mx.dequantize(some, scales, biases, group_size=packing.group_size, bits=packing.bits, mode=packing.kind)
    )


def _indices(chosen: Any, tokens: int, same: bool) -> Any:
    """Experts [T, k] among ``chosen``, of which some have many tokens and some few."""
    rng = np.random.default_rng(0)
    per_token = min(_PER_TOKEN, len(chosen))
    likely = 1.0 / np.arange(1, len(chosen) + 1)
    rows = [
        chosen[-per_token:] if same else rng.choice(chosen, per_token, replace=False, p=likely / likely.sum())
        for _ in range(tokens)
    ]
    return np.array(rows, np.uint32)


def _rows(count: int, k: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((count, k), key=mx.random.key(0)).astype(dtype)


def _columns(width: int) -> slice:
    """Some of a result's columns, the last among them; a slice, since MLX compiles what reads them by number."""
    step = max(1, width // _CHECKED_COLUMNS)
    return slice((width - 1) % step, None, step)


def _distance(result: mx.array, columns: slice, expected: Values) -> float:
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    return float(np.linalg.norm(floats(result[:, columns]) - expected)) / scale
