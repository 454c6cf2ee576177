"""Gemma's MLPs in two launches for few rows on CUDA: gates and ups and what joins them, and the module's own output.

Each kind is tried on one layer's own weights.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, gemma3_text, gemma4_text

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.joined_weights import JoinedWeights, joining_problem
from engine.runner.kv.layer_trial import LOSS, PACKED_LOSS, ROWS, difference, uncompiled, with_weights_of

_MLPS = gemma2.MLP, gemma3_text.MLP, gemma4_text.MLP
"""mlx-lm's modules that are down(gelu(gate(x)) * up(x)) with the tanh approximation of gelu. The first Gemma's is not,
and Gemma 3n's leaves out some gates."""


class GemmaMLPs:
    """The MLPs of a loaded Gemma 2, 3 or 4 that compute few rows in two launches.

    Choose, then install before a step is compiled.
    """

    def __init__(self, model: nn.Module, device_kind: DeviceKind) -> None:
        on_cuda = device_kind == "cuda"
        found = {id(module): module for module in model.modules() if on_cuda and type(module) in _MLPS}
        self._mlps: list[Any] = list(found.values())  # one that several layers share is joined once
        self._chosen: list[tuple[Any, JoinedWeights]] = []
        self._swapped = SwappedModules()
        self.problems: tuple[str, ...] = ()
        """Why MLPs are mlx-lm's own: a line each."""

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Try one MLP of each kind, and join the weights of those that are right. Raises nothing.

        ``progress(done, total)`` counts MLPs.
        """
        found: dict[tuple[object, ...], str | None] = {}
        problems: dict[str, None] = {}
        self._chosen = []
        for number, mlp in enumerate(self._mlps, 1):
            kind = _kind(mlp)
            if kind not in found:
                found[kind] = _problem(mlp)
            problem = found[kind]
            if problem is None:
                try:
                    self._chosen.append((mlp, _gates(mlp)))
                except RuntimeError as error:  # no memory to join its weights
                    problem = error_line(error)
            if problem is not None:
                problems[f"mlx-lm's own way: {problem}"] = None
            if progress is not None:
                progress(number, len(self._mlps))
        self.problems = tuple(problems)

    @property
    def note(self) -> str | None:
        """One line for people; None where there are no such MLPs."""
        if not self._mlps:
            return None
        return "; ".join([f"fused MLPs: {len(self._chosen)} of {len(self._mlps)} layers", *self.problems])

    @property
    def products(self) -> frozenset[int]:
        """Ids of the modules whose products are not computed for few rows any more.

        Packed weights stay out: MLX's product of them starts slowly, and short prompts go by them.
        """
        modules = [one for mlp, _ in self._chosen for one in _joined_modules(mlp)]
        return frozenset(id(one) for one in modules if type(one) is nn.Linear)

    def install(self) -> None:
        """Swap what was chosen into the model's MLPs."""
        self.remove()
        for mlp, gates in self._chosen:
            self._swapped.swap_method(mlp, "__call__", _call(type(mlp), gates))

    def remove(self) -> None:
        """Leave every MLP as it was; its weights stay slices of joined ones."""
        self._swapped.undo()


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


def _joined_modules(mlp: Any) -> list[nn.Module]:
    return [mlp.gate_proj, mlp.up_proj]


def _gates(mlp: Any) -> JoinedWeights:
    gates = JoinedWeights.of(_joined_modules(mlp), on_cuda=True)
    mx.clear_cache()  # of the weights that are joined now
    return gates


def _problem(mlp: Any) -> str | None:
    """Why MLPs like this one are mlx-lm's own, None if they are not."""
    try:
        return joining_problem(_joined_modules(mlp)) or _trial_problem(mlp, _gates(mlp))
    except Exception as error:  # noqa: BLE001  (whatever stops it, the MLPs have mlx-lm's own way)
        return error_line(error)


def _trial_problem(mlp: Any, gates: JoinedWeights) -> str | None:
    """What is wrong with ``gates`` on random rows, beside mlx-lm's own code before the output's product."""
    if not gates.most_few_rows:
        return "weights that no kernel for few rows takes"
    width = _width(mlp)
    trials = [mx.random.normal((rows, width), key=mx.random.key(rows)) for rows in ROWS if rows <= gates.most_few_rows]
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
    stand_in = SwappedModules()
    stand_in.swap_method(mlp.down_proj, "__call__", lambda _self, gated: gated)
    try:
        gated: mx.array = mlp(x)
    finally:
        stand_in.undo()
    return gated


def _kind(mlp: Any) -> tuple[object, ...]:
    """What MLPs have in common that are computed by the same kernels."""
    shapes = [(name, value.shape, value.dtype) for name, value in tree_flatten(mlp.parameters())]
    packed = [(getattr(one, "bits", 0), getattr(one, "group_size", 0)) for _, one in mlp.named_modules()]
    return type(mlp), *shapes, *packed
