"""Decoder layers of mlx-lm whose sums and norms are computed together on CUDA, between products that stay as they are.

A layer of experts is some 17 launches for one token, 29 in Gemma 4, where each sum, norm and scale is one. Here what
lies between attention and MLP is one, and what lies behind the MLP another: with it the sum of the experts' rows, and
the norm that the next layer begins with, which that finds with the rows.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.add_normed import Beside, ExpertRows, add_normed, takes
from engine.runner.kernels.handover import Handover
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.reference import rows_apart
from engine.runner.kernels.routed_blocks import expert_rows, router_gain, row_counts
from engine.runner.kernels.routed_experts import MAX_PAIRS
from engine.runner.kernels.swapped_modules import SwappedModules, mlx_lm_name

_MLPS = {
    "qwen3_5.DecoderLayer": "mlp",
    "qwen3_next.Qwen3NextDecoderLayer": "mlp",
    "qwen3_moe.Qwen3MoeDecoderLayer": "mlp",
    "qwen2_moe.Qwen2MoeDecoderLayer": "mlp",
    "olmoe.TransformerBlock": "mlp",
    "mixtral.MixtralDecoderLayer": "block_sparse_moe",
    "gpt_oss.TransformerBlock": "mlp",
}
"""Layers that are x + attention(norm(x)) and then x + mlp(norm(x)), and what each calls its MLP."""
_GEMMA = "gemma4_text.DecoderLayer"
_SCALES = 8
"""Elements of a layer's scale as the kernel reads it: arrays of up to 8 bytes lie in the host's memory on CUDA."""
_CHECKED_TOKENS = (1, 5)
_MOST_DIFFERENT = 1e-2
"""From what mlx's operations give, relative to a token's norm: a rounding or two."""


@dataclass(frozen=True, slots=True)
class ResidualLayer:
    """A layer's gains: of the norm after attention, and of the one that the next layer begins with, if that is swapped.

    ``gemma`` has what Gemma 4 has more.
    """

    mlp: str
    mlp_gain: mx.array
    next_gains: tuple[mx.array, ...]
    eps: float
    gemma: "GemmaGains | None" = None

    def between(self, mixed: mx.array, x: mx.array) -> tuple[mx.array, list[mx.array]]:
        """``x`` plus what attention gave, and that as the MLP takes it; Gemma's router and experts take their own.

        By mlx's operations where some rows are of another type than the gains, here and behind.
        """
        more = self.gemma
        if not self._takes(mixed, x):
            return _between(self, mixed, x)
        gains = [self.mlp_gain, *(more.routing if more else ())]
        return add_normed(mixed, x, gains, self.eps, before=more.attention if more else None)

    def behind(
        self, made: mx.array | ExpertRows, x: mx.array, beside: mx.array | None = None
    ) -> tuple[mx.array, list[mx.array]]:
        """``x`` plus what the MLP or the experts ``made``, and that as the next layer takes it."""
        more = self.gemma
        if not self._takes(*((made.rows, made.shared) if isinstance(made, ExpertRows) else (made,)), x, beside):
            return _behind(self, made, x, beside)
        if more is None:
            return add_normed(made, x, self.next_gains, self.eps)
        dense = None if beside is None else Beside(beside, *more.beside)
        return add_normed(made, x, self.next_gains, self.eps, beside=dense, before=more.before, scale=more.scale)

    def _takes(self, *rows: mx.array | None) -> bool:
        return all(one is None or one.dtype == self.mlp_gain.dtype for one in rows)


@dataclass(frozen=True, slots=True)
class GemmaGains:
    """Of the norms of what attention and MLP gave, and the layer's ``scale``, if it has one.

    With experts also of the router's and the experts' rows, and of the MLP's and the experts' results (``beside``).
    """

    attention: mx.array
    before: mx.array
    scale: mx.array | None
    routing: tuple[mx.array, ...] = ()
    beside: tuple[mx.array, ...] = ()


class ResidualLayers:
    """The layers of a loaded model that are computed so. Experts are to be swapped before."""

    def __init__(self, model: nn.Module, device_kind: DeviceKind) -> None:
        self._layers: list[Any] = []
        self._orders: list[list[int]] = []
        self._trusted = False
        self._swapped = SwappedModules()
        self.problem: str | None = None
        """Why the layers are as they were."""
        if device_kind != "cuda":
            return
        for module in model.modules():
            layers: Any = module.get("layers")
            if isinstance(layers, list) and layers and all(map(_is_known, layers)):
                same = {type(layer).__module__ for layer in layers} == {type(module).__module__}
                self._layers += layers
                self._orders += [[id(layer) for layer in layers]] if same else []

    @property
    def note(self) -> str | None:
        """One line for people; None where no layer is of a kind that is known."""
        if not self._layers:
            return None
        swapped = len(self._layers) if self._trusted else 0
        said = f"sums with their norms: one launch in {swapped} of {len(self._layers)} layers"
        return said if self.problem is None else f"{said}: {self.problem}"

    def launch_kernels(self) -> None:
        """Launch all kernels that the layers take; where kernels are only collected, say what to compile."""
        for layer in self._kinds():
            with suppress(Exception):  # what fails here fails again when it is checked, and is said then
                if _unknown(layer) is not None:
                    continue
                for parts in (residual_layer(layer, layer), residual_layer(layer, None)):
                    for trial in _trials(parts, 1, layer):
                        trial.by(parts.between, parts.behind)

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare the kernels with mlx's operations, with the gains of one layer of each kind. Raises nothing.

        ``progress(done, total)`` counts kinds.
        """
        self.problem = next(filter(None, (_unknown(layer) or _unswapped(layer) for layer in self._layers)), None)
        if self.problem is None and self._layers:
            with collecting() as awaited:
                self.launch_kernels()
            compile_all(awaited)
            kinds = self._kinds()
            for done, layer in enumerate(kinds, 1):
                self.problem = self.problem or _kernel_problem(layer)
                if progress is not None:
                    progress(done, len(kinds))
        self._trusted = bool(self._layers) and self.problem is None

    def install(self) -> None:
        """Swap the layers' own code for the kernels, if they were right."""
        self.remove()
        if not self._trusted:
            return
        handover = Handover[mx.array]()
        order = [id(layer) for layer in self._layers]
        passes_on = self._orders == [order] and len(set(order)) == len(order)  # each has one layer behind it
        for layer, behind in zip(self._layers, [*self._layers[1:], None], strict=True):
            parts = residual_layer(layer, behind if passes_on else None)
            call = _gemma_call if parts.gemma is not None else _plain_call
            self._swapped.swap_method(layer, "__call__", call(type(layer), parts, handover))

    def remove(self) -> None:
        """Leave every layer as it was."""
        self._swapped.undo()

    def _kinds(self) -> list[Any]:
        """A layer of each kind."""
        return list({_kind(layer): layer for layer in self._layers}.values())


def residual_layer(layer: Any, behind: Any) -> ResidualLayer:
    """The gains of ``layer``, with the one ``behind`` it, if there is any."""
    following = () if behind is None else (behind.input_layernorm.weight,)
    eps = float(layer.input_layernorm.eps)
    if mlx_lm_name(layer) != _GEMMA:
        return ResidualLayer(_MLPS[mlx_lm_name(layer)], layer.post_attention_layernorm.weight, following, eps)
    scale = layer.layer_scalar
    if scale is not None:
        scale = mx.concatenate([scale.reshape(1)] * _SCALES)  # a broadcast one stays a single element
        mx.eval(scale)
    routing: tuple[mx.array, ...] = ()
    beside: tuple[mx.array, ...] = ()
    if layer.enable_moe:
        routing = router_gain(layer.router), layer.pre_feedforward_layernorm_2.weight
        beside = layer.post_feedforward_layernorm_1.weight, layer.post_feedforward_layernorm_2.weight
    gains = GemmaGains(
        layer.post_attention_layernorm.weight, layer.post_feedforward_layernorm.weight, scale, routing, beside
    )
    return ResidualLayer("mlp", layer.pre_feedforward_layernorm.weight, following, eps, gains)


def _plain_call(kind: type[nn.Module], parts: ResidualLayer, handover: Handover[mx.array]) -> Callable[..., mx.array]:
    own: Callable[..., mx.array] = kind.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        normed = handover.take(x)
        if x.dtype != parts.mlp_gain.dtype:
            return own(self, x, mask, cache)
        mixer = self.linear_attn if getattr(self, "is_linear", False) else self.self_attn
        mixed = mixer(self.input_layernorm(x) if normed is None else normed, mask, cache)
        x, (normed,) = parts.between(mixed, x)
        mlp = self[parts.mlp]
        made = expert_rows(mlp, normed)
        total, following = parts.behind(mlp(normed) if made is None else made, x)
        return handover.leave(total, following[0] if following else None)

    return call


def _gemma_call(kind: type[nn.Module], parts: ResidualLayer, handover: Handover[mx.array]) -> Callable[..., Any]:
    own: Callable[..., Any] = kind.__call__

    def call(
        self: Any, x: mx.array, mask: Any = None, cache: Any = None, per_layer_input: Any = None,
        shared_kv: Any = None, offset: Any = None,
    ) -> tuple[mx.array, Any, Any]:  # fmt: skip
        normed = handover.take(x)
        few = not self.enable_moe or x.size // x.shape[-1] * self.config.top_k_experts <= MAX_PAIRS
        if x.dtype != parts.mlp_gain.dtype or per_layer_input is not None or not few:
            result: tuple[mx.array, Any, Any] = own(self, x, mask, cache, per_layer_input, shared_kv, offset)
            return result
        normed = self.input_layernorm(x) if normed is None else normed
        mixed, shared_kv, offset = self.self_attn(normed, mask, cache, shared_kv=shared_kv, offset=offset)
        x, (normed, *routing) = parts.between(mixed, x)
        dense: mx.array = self.mlp(normed)
        if self.enable_moe:
            rows = expert_rows(self, *routing)
            made = self.experts(routing[1], *self.router(x)) if rows is None else rows
            total, following = parts.behind(made, x, dense)
        else:
            total, following = parts.behind(dense, x)
        return handover.leave(total, following[0] if following else None), shared_kv, offset

    return call


def _unknown(layer: Any) -> str | None:
    """Why a layer's norms or experts are other ones than the kernels compute."""
    norms = [one for _, one in layer.named_modules() if type(one) is nn.RMSNorm and one.weight.ndim == 1]
    own = [one for one in norms if one.weight.shape == layer.input_layernorm.weight.shape]
    gain = layer.input_layernorm.weight
    if type(layer.input_layernorm) is not nn.RMSNorm or len({one.eps for one in own}) > 1:
        return "norms of several kinds"
    if {one.weight.dtype for one in own} != {gain.dtype} or not takes(gain.shape[0], gain.dtype):
        return f"rows of {gain.shape[0]} elements in several types or {gain.dtype}"
    if mlx_lm_name(layer) != _GEMMA:
        return None
    if layer.per_layer_input_gate is not None:
        return "inputs of its own for each layer"
    if layer.layer_scalar is not None and layer.layer_scalar.dtype != gain.dtype:
        return "a scale of another type"
    return None


def _unswapped(layer: Any) -> str | None:
    """Why the kernels lack the rows of Gemma's experts: mlx-lm's code gives their sum."""
    lacks = mlx_lm_name(layer) == _GEMMA and layer.enable_moe and not hasattr(type(layer), "expert_rows")
    return "experts that no kernel computes" if lacks else None


def _kernel_problem(layer: Any) -> str | None:
    """What the kernels give otherwise with a layer's gains, where one follows it and where none does."""
    try:
        found = [_difference(residual_layer(layer, behind), layer) for behind in (layer, None)]
    except Exception as error:  # noqa: BLE001  (whatever stops it, the layers have mlx-lm's own way)
        return error_line(error, 120)
    return found[0] or found[1]


def _difference(parts: ResidualLayer, layer: Any) -> str | None:
    """What kernels give otherwise than mlx's operations."""
    for tokens in _CHECKED_TOKENS:
        for trial in _trials(parts, tokens, layer):
            found = trial.by(parts.between, parts.behind)
            wanted = trial.by(partial(_between, parts), partial(_behind, parts))
            for number, both in enumerate(zip(found, wanted, strict=True)):
                if not (rows_apart(*both) <= _MOST_DIFFERENT).all():  # nor is NaN
                    return f"sum or norm {number} differs with {tokens} tokens"
    return None


class _Trial(NamedTuple):
    """What comes between a layer's products: rows of attention, those they are added to, an MLP's or experts' rows."""

    mixed: mx.array
    x: mx.array
    made: mx.array | ExpertRows
    beside: mx.array | None = None

    def by(self, between: Callable[..., Any], behind: Callable[..., Any]) -> list[mx.array]:
        """All sums and norms."""
        (first, normed), (last, following) = between(self.mixed, self.x), behind(self.made, self.x, self.beside)
        return [first, *normed, last, *following]


def _trials(parts: ResidualLayer, tokens: int, layer: Any) -> Iterator[_Trial]:
    """Random rows of every kind that ``layer`` may add."""
    gain = layer.input_layernorm.weight
    keys = iter(mx.random.split(mx.random.key(tokens), 12))

    def rows(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys)).astype(gain.dtype)

    width = gain.shape[0]
    mixed, x, dense = (rows(tokens, 1, width) for _ in range(3))
    counts = row_counts(layer if parts.gemma is not None else layer[parts.mlp])
    if not (parts.gemma is not None and parts.gemma.routing):
        yield _Trial(mixed, x, dense)
    for each, shared in counts:
        experts = ExpertRows(rows(each * tokens, width), mx.random.uniform(shape=(tokens, each), key=next(keys)))
        if parts.gemma is not None:
            yield _Trial(mixed, x, experts, dense)
        else:
            yield _Trial(mixed, x, experts._replace(shared=dense, gate=rows(tokens, 1)) if shared else experts)


def _between(parts: ResidualLayer, mixed: mx.array, x: mx.array) -> tuple[mx.array, list[mx.array]]:
    """As :meth:`ResidualLayer.between`, by mlx's operations."""
    more = parts.gemma
    x = x + (mixed if more is None else mx.fast.rms_norm(mixed, more.attention, parts.eps))
    gains = [parts.mlp_gain, *(more.routing if more else ())]
    return x, [mx.fast.rms_norm(x, gain, parts.eps) for gain in gains]


def _behind(
    parts: ResidualLayer, made: mx.array | ExpertRows, x: mx.array, beside: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """As :meth:`ResidualLayer.behind`, by mlx's operations."""
    more = parts.gemma
    if isinstance(made, ExpertRows):
        rows = made.rows.reshape(*made.scores.shape, -1).astype(mx.float32)
        summed = (rows * made.scores[..., None]).sum(1, keepdims=True)
        if made.shared is not None and made.gate is not None:
            gate = mx.sigmoid(made.gate.astype(mx.float32)).reshape(-1, 1, 1)
            summed = summed + gate * made.shared.astype(mx.float32).reshape(summed.shape)
        made = summed.astype(x.dtype)
    made = made.reshape(x.shape)
    if beside is not None and more is not None:
        gain, own_gain = more.beside
        made = mx.fast.rms_norm(made, own_gain, parts.eps) + mx.fast.rms_norm(beside, gain, parts.eps).reshape(x.shape)
    if more is not None:
        made = mx.fast.rms_norm(made, more.before, parts.eps)
    x = x + made
    x = x if more is None or more.scale is None else x * more.scale[0]
    return x, [mx.fast.rms_norm(x, gain, parts.eps) for gain in parts.next_gains]


def _is_known(layer: Any) -> bool:
    return isinstance(layer, nn.Module) and (mlx_lm_name(layer) in _MLPS or mlx_lm_name(layer) == _GEMMA)


def _kind(layer: Any) -> tuple[object, ...]:
    gain = layer.input_layernorm.weight
    moe, scaled = getattr(layer, "enable_moe", False), layer.get("layer_scalar") is not None
    counts = row_counts(layer if mlx_lm_name(layer) == _GEMMA else layer[_MLPS[mlx_lm_name(layer)]])
    return mlx_lm_name(layer), gain.shape, gain.dtype, moe, scaled, *counts
