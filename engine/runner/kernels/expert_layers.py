"""What a model's layer of routed experts is made of, as kernels take it: weights, their packing, the activation."""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from engine.runner.kernels import routed_experts
from engine.runner.kernels.joined_arrays import in_one_array
from engine.runner.kernels.routed_experts import MAX_EXPERTS, MAX_PAIRS, Activation, ExpertWeights, Packing, Routes
from engine.runner.kernels.swapped_modules import mlx_lm_name

_ACTIVATIONS = {
    "switch_layers.SwiGLU": "silu",
    "gemma4_text.GeGLU": "gelu",
    "activations.SwigluOAI": "oai",
}
_SHARED = ("qwen3_next.Qwen3NextMLP", "qwen2_moe.MLP")
"""MLPs of a shared expert that activate as SwiGLU does."""
_PROJECTIONS, _ARRAYS = ("gate_proj", "up_proj", "down_proj"), ("weight", "scales", "biases", "bias")
_MOST_SCALE = 128
"""Of mxfp4, as its byte: 2, beyond which the kernels' unpacking leaves bfloat16's range."""


@dataclass(frozen=True, slots=True)
class ExpertKind:
    """What decides which kernels a layer takes: ``num_experts`` of [hidden, ``width``] and back, rows of ``dtype``."""

    num_experts: int
    hidden: int
    width: int
    dtype: mx.Dtype
    packings: tuple[Packing, Packing]
    """Of gate and up, and of down."""
    activation: Activation
    biased: bool

    def __str__(self) -> str:
        packing = self.packings[0]
        weights = {"dense": str(self.dtype).rpartition(".")[2], "affine": f"{packing.bits}-bit"}
        named = weights.get(packing.kind, packing.kind)
        return f"{named} experts {self.num_experts} x {self.hidden} x {self.width}"


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A layer's kind and its weights, which stay the modules' own."""

    kind: ExpertKind
    gate: ExpertWeights
    up: ExpertWeights
    down: ExpertWeights

    def takes(self, x: mx.array, indices: mx.array) -> bool:
        """Whether kernels compute ``x`` [..., hidden] by the experts of ``indices`` [..., k]."""
        return x.dtype == self.kind.dtype and 0 < indices.size <= MAX_PAIRS

    def compute(self, x: mx.array, indices: mx.array) -> mx.array:
        """As ``SwitchGLU``: ``x`` [..., hidden] and ``indices`` [..., k] give [..., k, hidden]."""
        routes = routed_experts.route(indices, self.kind.num_experts)
        return self.routed(x.reshape(-1, self.kind.hidden), routes).reshape(*indices.shape, self.kind.hidden)

    def routed(self, x: mx.array, routes: Routes) -> mx.array:
        """The pairs' rows [P, hidden] of ``x`` [T, hidden]."""
        kind = self.kind
        inner = routed_experts.gate_up(x, routes, self.gate, self.up, kind.packings[0], kind.activation)
        return routed_experts.down(inner, routes, self.down, kind.packings[1])


def expert_layer(module: nn.Module) -> ExpertLayer | None:
    """``module`` as kernels take it; None where they do not."""
    if not isinstance(module, SwitchGLU):
        return None
    activation = _activation(module.activation)
    children = [module.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    packings = [_packing(child) for child in children]
    if activation is None or None in packings or packings[0] != packings[1]:
        return None
    gate, up, down = (_weights(child) for child in children)
    dtypes = {_dtype(weights) for weights in (gate, up, down)} - {None}
    biases = {weights.added is not None for weights in (gate, up, down)}
    if len(dtypes) > 1 or len(biases) > 1 or gate.weight.shape != up.weight.shape:
        return None
    num_experts, hidden, width = gate.weight.shape[0], down.weight.shape[1], gate.weight.shape[1]
    known: tuple[Any, Any] = (packings[0], packings[2])
    # Bytes of scales say nothing of the rows' type.
    dtype = next((one for one in dtypes if one is not None), mx.bfloat16)
    kind = ExpertKind(num_experts, hidden, width, dtype, known, activation, biases.pop())
    sizes = [(hidden, width, gate), (width, hidden, down)]
    taken = all(
        routed_experts.takes(k, wide, dtype, packing) and weights.weight.shape[2] * 32 == k * _word_bits(packing)
        for (k, wide, weights), packing in zip(sizes, known, strict=True)
    )
    return ExpertLayer(kind, gate, up, down) if taken and num_experts <= MAX_EXPERTS else None


def joins(layer: ExpertLayer, module: Any, shared: Any) -> bool:
    """Whether ``shared``, an MLP, is packed and shaped as the experts of ``module`` are, which is ``layer``."""
    if mlx_lm_name(shared) not in _SHARED or layer.kind.activation.kind != "silu":
        return False
    pairs = [(module[name], shared[name]) for name in _PROJECTIONS]
    whole = layer.kind.num_experts == pairs[0][0]["weight"].shape[0] < MAX_EXPERTS  # without a shared one so far
    return whole and all(
        _packing(experts) == _packing_of_one(one)
        and [(key, experts[key].shape[1:], experts[key].dtype) for key in _ARRAYS if key in experts]
        == [(key, one[key].shape, one[key].dtype) for key in _ARRAYS if key in one]
        for experts, one in pairs
    )


def with_shared(layer: ExpertLayer, module: Any, shared: Any) -> ExpertLayer:
    """``layer``, the experts of ``module``, with a ``shared`` one behind the last, for what :func:`joins` allows.

    Their weights become one array, slices of which both modules keep: there is no second copy.
    """
    gate, up, down = (_weights(_joined(module[name], shared[name])) for name in _PROJECTIONS)
    return ExpertLayer(replace(layer.kind, num_experts=layer.kind.num_experts + 1), gate, up, down)


def _joined(experts: Any, one: Any) -> dict[str, mx.array]:
    """The arrays of a projection of all experts with those of ``one`` behind them."""
    found = {}
    for key in [key for key in _ARRAYS if key in experts]:
        found[key], (experts[key], last) = in_one_array([experts[key], one[key][None]])
        one[key] = last.squeeze(0)
        mx.eval(one[key])
    return found


def scales_in_range(layer: ExpertLayer) -> bool:
    """Whether all scales of mxfp4 weights are such as kernels unpack. Reads them."""
    scales = [weights.scales for weights in (layer.gate, layer.up, layer.down) if weights.scales is not None]
    return not any(mx.any(some > _MOST_SCALE).item() for some in scales if some.dtype == mx.uint8)


def _word_bits(packing: Packing) -> int:
    """Bits of a weight, as multiples of which 32-bit words count; dense weights are whole elements."""
    return 32 if packing.kind == "dense" else packing.bits


def _activation(activation: Any) -> Activation | None:
    kind: Any = _ACTIVATIONS.get(mlx_lm_name(activation))
    if kind == "oai":
        return Activation(kind, activation._alpha, activation._limit)
    return None if kind is None else Activation(kind)


def _packing(child: Any) -> Packing | None:
    if isinstance(child, SwitchLinear):
        return Packing("dense")
    if not isinstance(child, QuantizedSwitchLinear) or child.get("global_scale") is not None:
        return None
    return Packing(child.mode, child.bits, child.group_size) if child.mode in ("affine", "mxfp4") else None


def _packing_of_one(child: Any) -> Packing | None:
    if isinstance(child, nn.QuantizedLinear):
        return Packing(child.mode, child.bits, child.group_size)
    return Packing("dense") if isinstance(child, nn.Linear) else None


def _weights(child: Any) -> ExpertWeights:
    return ExpertWeights(child["weight"], child.get("scales"), child.get("biases"), child.get("bias"))


def _dtype(weights: ExpertWeights) -> mx.Dtype | None:
    """The rows' type; None where weights do not say."""
    array = weights.weight if weights.scales is None else weights.scales
    return array.dtype if mx.issubdtype(array.dtype, mx.floating) else None
