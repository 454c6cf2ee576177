"""Gemma's MLPs in two launches for few rows on CUDA: gates and ups and what joins them, and the module's own output.

Each kind is tried on one layer's own weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2, gemma3_text, gemma4_text

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kv.joined_modules import JoinedModules, OwnProducts, each_once
from engine.runner.kv.joined_weights import JoinedWeights, joining_problem
from engine.runner.kv.layer_trial import (
    LOSS,
    PACKED_LOSS,
    difference,
    passing_on,
    rows_to_try,
    uncompiled,
    with_weights_of,
)

_MLPS = gemma2.MLP, gemma3_text.MLP, gemma4_text.MLP
"""mlx-lm's modules that are down(gelu(gate(x)) * up(x)) with the tanh approximation of gelu. The first Gemma's is not,
and Gemma 3n's leaves out some gates."""


class GemmaMLPs(JoinedModules[JoinedWeights]):
    """The MLPs of a loaded Gemma 2, 3 or 4 that compute few rows in two launches."""

    name, counted = "fused MLPs", " layers"
    unjoined = "mlx-lm's own way"
    left_out: Mapping[OwnProducts, str] = {"few": unjoined}

    def __init__(self, model: nn.Module, device_kind: DeviceKind) -> None:
        modules = each_once(model.modules()) if device_kind == "cuda" else []
        super().__init__([module for module in modules if type(module) in _MLPS], device_kind)

    def refused(self, module: Any) -> str | None:
        """See :class:`JoinedModules`."""
        return joining_problem(self.joined(module))

    def join(self, module: Any, own: OwnProducts) -> JoinedWeights:
        """See :class:`JoinedModules`."""
        return JoinedWeights.of(self.joined(module), on_cuda=own != "none")

    def wrong(self, module: Any, fused: JoinedWeights) -> str | None:
        """See :class:`JoinedModules`."""
        return _trial_problem(module, fused)

    def joined(self, module: Any) -> list[nn.Module]:
        """See :class:`JoinedModules`."""
        return [module.gate_proj, module.up_proj]

    def swap(self) -> None:
        """See :class:`JoinedModules`."""
        for mlp, gates in self.chosen:
            self.swapped.swap_method(mlp, "__call__", _call(type(mlp), gates))


def _call(kind: type[nn.Module], gates: JoinedWeights) -> Callable[..., mx.array]:
    """What an MLP of ``kind`` does when called: few rows go by one launch to its output's product."""
    own: Callable[..., mx.array] = kind.__call__
    most_rows = gates.most_few_rows

    def call(self: Any, x: mx.array) -> mx.array:
        size = x.shape[-1]
        if not 0 < x.size <= most_rows * size or x.dtype != gates.dtype:
            return own(self, x)
        gated = gates.few(x.reshape(-1, size), gated="gelu")
        result: mx.array = self.down_proj(gated.reshape(*x.shape[:-1], -1))
        return result

    return call


def _trial_problem(mlp: Any, gates: JoinedWeights) -> str | None:
    """What is wrong with ``gates`` on random rows, beside mlx-lm's own code before the output's product."""
    if not gates.most_few_rows:
        return "weights that no kernel for few rows takes"
    width = _width(mlp)
    numbers = [rows for rows in rows_to_try(gates.bits > 0) if rows <= gates.most_few_rows]
    trials = [mx.random.normal((rows, width), key=mx.random.key(rows)) for rows in numbers]
    trials = [x.astype(gates.dtype) for x in trials]
    with collecting() as awaited:
        for x in trials:
            gates.few(x, gated="gelu")
    compile_all(awaited)
    # Packed weights are unpacked for mlx-lm's code: MLX's product of them compiles for long on CUDA.
    exact, usual = _copied(mlp, mx.float32), _copied(mlp, gates.dtype) if gates.bits else mlp
    for x in trials:
        with uncompiled():  # a kernel for float32 that nothing else needs would take seconds on CUDA
            right = _own(exact, x.astype(mx.float32))
        loss = PACKED_LOSS if gates.bits else LOSS
        if problem := difference("its result", gates.few(x, gated="gelu"), _own(usual, x), right, x.dtype, loss):
            return f"{problem} at {x.shape[0]} rows"
    return None


def _copied(mlp: Any, dtype: mx.Dtype) -> Any:
    """A copy of ``mlp`` with the same weights, unpacked, in another element type."""
    copy: Any = nn.Module.__new__(type(mlp))
    nn.Module.__init__(copy)
    for name in ("gate_proj", "up_proj"):
        copy[name] = nn.Linear(_width(mlp), mlp[name].weight.shape[0], bias="bias" in mlp[name])
    return with_weights_of(mlp, copy, dtype, but="down_proj")


def _width(mlp: Any) -> int:
    """Elements of a row that ``mlp`` takes."""
    gate = mlp.gate_proj
    return int(gate.weight.shape[1]) * 32 // gate.bits if "scales" in gate else int(gate.weight.shape[1])


def _own(mlp: Any, x: mx.array) -> mx.array:
    """What mlx-lm's code multiplies by the weights of its output."""
    with passing_on(mlp.down_proj):
        gated: mx.array = mlp(x)
    return gated
